"""The measured results of the book, one module each."""
