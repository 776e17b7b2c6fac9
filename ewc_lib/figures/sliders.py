"""Figures that a reader moves with a slider: drawn beforehand, so they need no server.

A slider is a row of SVG drawings of which the page shows one. Everything is in the page, with no
reference to a file or an address, so it works offline and in a notebook that is only opened.
Where there is no HTML, on paper, the first drawing that a reader would see takes its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ewc_lib.figures._svg import inline

__all__ = ["MAX_BYTES", "Slider", "slider"]

MAX_BYTES = 300_000
"""What one interactive figure may weigh. A scattered point costs about 45 bytes in each frame."""

DOTS_PER_INCH = 150
"""Resolution of the picture that stands in for the slider on paper."""


@dataclass(frozen=True)
class Slider:
    """A figure with frames that a slider chooses from; notebooks and the book show it.

    Attributes
    ----------
    html
        The interactive figure: a part of a page that refers to nothing outside itself.
    png
        The frame shown first, as a picture for paper.
    """

    html: str = field(repr=False)
    png: bytes = field(repr=False)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        picture = base64.b64encode(self.png).decode("ascii")
        return {"text/html": self.html, "image/png": picture, "text/plain": repr(self)}


def slider(
    frames: Mapping[str, Figure],
    texts: Sequence[str],
    *,
    name: str,
    alt: str,
    background: Figure | None = None,
    start: int = 0,
) -> Slider:
    r"""Let the reader move through figures that were drawn beforehand.

    The control is the range input of the browser: the arrow keys, Home and End move it, and
    screen readers read the text of the frame that it moves to. Text and axes in the grey of
    :func:`ewc_lib.figures.use_style` take the text colour of the page, light or dark. The same
    figures give the same page. All figures are closed.

    Parameters
    ----------
    frames
        The figures, by the value that the slider shows for each. All must have one size.
    texts
        For each frame one sentence: what it shows. Written below the slider and read aloud.
    name
        What the slider changes, for example ``"strength λ"``.
    alt
        What the figure shows, for those who do not see it, whatever the frame.
    background
        What all frames share, drawn once below them.
    start
        Index of the frame to show first, on the screen and on paper.

    Returns
    -------
    Slider
        An object that notebooks render.

    Raises
    ------
    ValueError
        If ``start`` is not one of the frames, if a frame has no text, if the sizes differ, or if
        the figure weighs more than :data:`MAX_BYTES`.

    Examples
    --------
    >>> figures = {}
    >>> for power in (1, 2):
    ...     figures[f"{power}"], axes = plt.subplots()
    ...     _ = axes.plot([x**power for x in range(5)])
    >>> slider(figures, ["A straight line.", "A parabola."], name="power", alt="A rising curve.")
    Slider()
    """
    _check(frames, texts, background, start)
    layers = [] if background is None else [_layer(inline(background, f"{_ID}b"))]
    for k, figure in enumerate(frames.values()):
        attributes = ' class="frame"' + (' hidden=""' if k != start else "")
        layers.append(_layer(inline(figure, f"{_ID}f{k}-"), attributes))
    readings = [{"value": value, "text": text} for value, text in zip(frames, texts, strict=True)]
    html = _TEMPLATE.format(
        alt=escape(alt),
        name=escape(name),
        layers="".join(layers),
        last=len(frames) - 1,
        start=start,
        **{key: escape(text) for key, text in readings[start].items()},
        readings=json.dumps(readings, ensure_ascii=False).translate(_IN_SCRIPT),
    )
    html = html.replace(_ID, "s" + hashlib.sha256(html.encode()).hexdigest()[:8])
    weight = len(html.encode())
    if weight > MAX_BYTES:
        raise ValueError(f"the figure weighs {weight} bytes, more than {MAX_BYTES}: draw less")
    png = _png(list(frames.values())[start], background)
    for figure in (*frames.values(), *([] if background is None else [background])):
        plt.close(figure)
    return Slider(html, png)


def _check(
    frames: Mapping[str, Figure], texts: Sequence[str], background: Figure | None, start: int
) -> None:
    if not 0 <= start < len(frames):
        raise ValueError(f"start={start} is not one of the {len(frames)} frames")
    if len(texts) != len(frames) or not all(text.strip() for text in texts):
        raise ValueError(f"{len(frames)} frames need as many texts, got {list(texts)}")
    figures = [*frames.values(), *([] if background is None else [background])]
    sizes = {tuple(figure.get_size_inches().tolist()) for figure in figures}
    if len(sizes) > 1:
        raise ValueError(f"all figures must have one size, got {sorted(sizes)}")


_ID = "SLIDERID"
"""Stands for the identity of a slider, which is a hash of all the rest."""

_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
"""Nothing inside a script may look like markup."""

# HTML and at the same time XML. Without scripts the control would do nothing, so a script shows
# it. The control is named by its label, and says value and text itself whenever it moves; the
# written ones are silent, or they would be read twice.
_TEMPLATE = """\
<div class="ewc-slider" id="SLIDERID">
<div role="img" aria-label="{alt}" aria-describedby="SLIDERID-text" style="display:grid">
{layers}</div>
<div class="control" hidden="">
<label for="SLIDERID-range">{name}</label>
<input id="SLIDERID-range" type="range" min="0" max="{last}" step="1" value="{start}"
 autocomplete="off" aria-valuetext="{value}. {text}" style="width:min(100%,22rem)" />
</div>
<p id="SLIDERID-text">{name} = <b>{value}</b>. <span>{text}</span></p>
<script type="application/json">{readings}</script>
<script>(function () {{
const figure = document.getElementById("SLIDERID");
const [range, value, text] = ["input", "p b", "p span"].map(s => figure.querySelector(s));
const frames = figure.querySelectorAll(".frame");
const readings = JSON.parse(figure.querySelector("script").textContent);
function show() {{
  const k = Number(range.value);
  frames.forEach((frame, i) => {{ frame.hidden = i !== k; }});
  value.textContent = readings[k].value;
  text.textContent = readings[k].text;
  range.setAttribute("aria-valuetext", readings[k].value + ". " + readings[k].text);
}}
range.addEventListener("input", show);
figure.querySelector(".control").hidden = false;
show();
}})();</script>
</div>"""


def _layer(drawing: str, attributes: str = "") -> str:
    """Put a drawing into the one cell that all drawings share."""
    return f'<div style="grid-area:1/1"{attributes}>{drawing}</div>\n'


def _png(frame: Figure, background: Figure | None) -> bytes:
    """Draw a frame over its background as a picture for paper."""
    if background is not None:
        frame.set_dpi(DOTS_PER_INCH)  # of the pixels that figimage places
        frame.figimage(plt.imread(io.BytesIO(_png(background, None))), zorder=-1)
    picture = io.BytesIO()
    frame.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()
