"""Warnings that point to the line that called the package."""

from __future__ import annotations

import sys
import warnings


def warn(text: str) -> None:
    """Warn where the package was called, whichever of its functions finds it out.

    Frames of PyTorch are left out, too: its decorators and hooks stand in between.
    """
    depth, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(("ewc_lib.", "torch.")):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=depth)


class Once:
    """Says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, text: str) -> None:
        """Warn, unless the same was said before."""
        if what not in self._said:
            self._said.add(what)
            warn(text)
