"""Sums over observations of the outer products of their gradients, one class a structure."""
