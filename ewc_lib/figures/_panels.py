"""Where a figure may be cut, so that its panels stand below each other on a narrow page."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Window", "windows"]

Window = tuple[float, float]
"""Left edge and width of a part of a figure, in units of 1/72 inch."""

GAP = 2.0
"""The least space between two panels that are cut apart, in units of 1/72 inch."""


def windows(*figures: Figure) -> list[Window]:
    """Cut figures of one size upright between panels, where none has ink.

    Colour bars, legends and titles beside a panel stay with it.
    """
    end, cuts = -GAP, [0.0]
    for left, right, is_panel in sorted(box for figure in figures for box in _boxes(figure)):
        if is_panel and left - end >= GAP and end > 0:
            cuts.append(round((end + left) / 2, 1))
        end = max(end, right) if is_panel or end > 0 else end
    width = round(72 * float(figures[0].get_figwidth()), 1)
    return [(a, round(b - a, 1)) for a, b in zip(cuts, [*cuts[1:], width], strict=True)]


def _boxes(figure: Figure) -> Iterator[tuple[float, float, bool]]:
    """Yield from where to where each part of a figure has ink, and whether it is a panel."""
    figure.draw_without_rendering()  # places the panels
    for artist in figure.get_children():
        box = artist.get_tightbbox()
        if artist is not figure.patch and artist.get_visible() and box is not None and box.width:
            is_panel = isinstance(artist, Axes) and artist.get_label() != "<colorbar>"
            yield 72 * float(box.x0) / figure.dpi, 72 * float(box.x1) / figure.dpi, is_panel
