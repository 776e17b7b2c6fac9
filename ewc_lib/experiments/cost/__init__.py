"""What the Fisher information costs, here and elsewhere."""
