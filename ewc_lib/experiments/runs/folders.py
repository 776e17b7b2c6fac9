"""Where the measured results of the book are, and where new ones go.

A checkout keeps them in ``book/results``, and an installed package carries a copy of its own.
"""

from pathlib import Path

__all__ = ["OUTPUT", "RESULTS"]

_CHECKOUT = Path(__file__).parents[3] / "book" / "results"
_COPY = Path(__file__).with_name("results")

RESULTS = _COPY if _COPY.is_dir() else _CHECKOUT
"""Where the book finds its numbers."""

OUTPUT = Path("results") if RESULTS == _COPY else RESULTS
"""Where measurements are written by default: never into an installed package."""
