"""Streams of tasks on which the methods are compared."""
