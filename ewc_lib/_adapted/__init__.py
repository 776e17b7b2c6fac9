"""Layers with adapters, and the network of plain layers that one with adapters amounts to."""
