"""Where the library meets the tools that train large models."""
