"""What the structures and the kinds of the Fisher information are worth."""
