"""Figures of the book: one style, and sliders that need no server."""

from ewc_lib.figures.sliders import Slider, slider
from ewc_lib.figures.style import GREY, ellipse, save, use_style

__all__ = ["GREY", "Slider", "ellipse", "save", "slider", "use_style"]
