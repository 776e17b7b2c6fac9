"""One progress bar for everything that takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY = 2.0
"""Seconds before a bar appears."""


def progress(
    items: Iterable[T], description: str, show: bool | None = None, *, total: int | None = None
) -> Iterable[T]:
    """Show progress over ``items`` on stderr once it lasts longer than two seconds.

    Parameters
    ----------
    items
        What to iterate over.
    description
        The text before the bar.
    show
        True or False to force it; None shows it in a terminal and in a notebook only.
    total
        Number of items, where they do not know it themselves.
    """
    visible = (sys.stderr.isatty() or _in_notebook()) if show is None else show
    if not visible:
        return items
    bar: Iterable[T] = tqdm(items, desc=description, total=total, delay=DELAY, leave=False)
    return bar


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
