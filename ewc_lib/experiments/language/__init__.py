"""Language models that learn one text after another."""
