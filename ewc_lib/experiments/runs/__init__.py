"""Runs of an experiment: what is tried, where it is kept, and how it is told."""
