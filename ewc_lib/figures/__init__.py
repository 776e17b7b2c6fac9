"""Figures of the book: one style, and figures that a reader moves without a server."""

from ewc_lib.figures._colors import GREY
from ewc_lib.figures._interactive import MAX_BYTES, Interactive
from ewc_lib.figures.draggables import draggable
from ewc_lib.figures.sliders import slider
from ewc_lib.figures.style import drawing, ellipse, outline, save, use_style

__all__ = [
    "GREY",
    "MAX_BYTES",
    "Interactive",
    "draggable",
    "drawing",
    "ellipse",
    "outline",
    "save",
    "slider",
    "use_style",
]
