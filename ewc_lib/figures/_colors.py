"""The colours of the figures, by names that a page may give other values.

A drawing says `var(--ewc-1,#de8f05)`: the value that the page sets for its theme, or, where it
sets none, that of the palette. Black lines and grey text take the text colour of the page.
"""

from __future__ import annotations

import re

import seaborn as sns

__all__ = ["GREY", "on_page"]

GREY = "#787878"
"""Text and axes: a contrast of at least 4.2 against white and against the dark page."""

PALETTE = "colorblind"
"""Colours that colour-blind people can tell."""

_VARIABLES = {color: f"--ewc-{k}" for k, color in enumerate(sns.color_palette(PALETTE).as_hex())}
_BLACK = {"#000000", "#1a1a1a"}  # "black", and what seaborn makes of "k"
_WHITE = "#ffffff"
_VARIABLES |= {GREY: "--ewc-grey", _WHITE: "--ewc-ground"}


def on_page(style: str, is_text: bool) -> str:
    """Let a page choose the colours of a CSS style. Grey text takes the text colour."""

    def variable(color: re.Match[str]) -> str:
        if color[0] in _BLACK or (is_text and color[0] == GREY):
            return "currentColor"
        is_fixed = is_text and color[0] == _WHITE  # stands on a ground of its own
        if color[0] not in _VARIABLES or is_fixed:
            return color[0]
        return f"var({_VARIABLES[color[0]]},{color[0]})"

    return re.sub("#[0-9a-f]{6}", variable, style)
