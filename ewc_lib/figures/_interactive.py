"""Figures that a reader moves: what the kinds of them share.

Everything is in the page, with no reference to a file or an address, so it works offline and in a
notebook that is only opened. Where there is no HTML, on paper, what a reader would see first takes
its place.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ewc_lib.figures._svg import identify

__all__ = ["MAX_BYTES", "Interactive"]

MAX_BYTES = 300_000
"""What one interactive figure may weigh. A scattered point costs about 45 bytes in each frame."""

DOTS_PER_INCH = 150
"""Resolution of the picture that stands in for the figure on paper."""


@dataclass(frozen=True)
class Interactive:
    """A figure that a reader moves; notebooks and the book show it.

    Attributes
    ----------
    html
        The interactive figure: a part of a page that refers to nothing outside itself.
    png
        How it looks first, as a picture for paper.
    """

    html: str = field(repr=False)
    png: bytes = field(repr=False)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        picture = base64.b64encode(self.png).decode("ascii")
        return {"text/html": self.html, "image/png": picture, "text/plain": repr(self)}


def typeset(text: str) -> str:
    """Write numbers with a minus sign, and keep a sign of per cent beside its number."""
    text = re.sub(r"(?<![\w.)-])-(?=\.?\d)", "−", text)
    return re.sub(r"(?<=\d)%", "\N{NO-BREAK SPACE}%", text)


def in_script(data: object) -> str:
    """Write data as JSON inside a script, where nothing may look like markup."""
    escapes = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(escapes)


def finish(
    html: str, shown: Figure, background: Figure | None, drawn: Sequence[Figure]
) -> Interactive:
    """Name the figure by what it holds, see that it is light, and close what was drawn."""
    html = identify(html)
    weight = len(html.encode())
    if weight > MAX_BYTES:
        raise ValueError(f"the figure weighs {weight} bytes, more than {MAX_BYTES}: draw less")
    png = _png(shown, background)
    for figure in drawn:
        plt.close(figure)
    return Interactive(html, png)


def _png(frame: Figure, background: Figure | None) -> bytes:
    """Draw a frame over its background as a picture for paper."""
    if background is not None:
        frame.set_dpi(DOTS_PER_INCH)  # of the pixels that figimage places
        frame.figimage(plt.imread(io.BytesIO(_png(background, None))), zorder=-1)
    picture = io.BytesIO()
    frame.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()
