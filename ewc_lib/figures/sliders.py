"""Figures that a reader moves with a slider: drawn beforehand, so they need no server.

A slider is a row of SVG drawings of which the page shows one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from ewc_lib.figures._interactive import Interactive, finish, in_script, typeset
from ewc_lib.figures._panels import windows
from ewc_lib.figures._svg import ID, ROW, inline

__all__ = ["slider"]


def slider(
    frames: Mapping[str, Figure],
    texts: Sequence[str],
    *,
    name: str,
    alt: str,
    background: Figure | None = None,
    start: int = 0,
) -> Interactive:
    r"""Let the reader move through figures that were drawn beforehand.

    The control is the range input of the browser: the arrow keys, Home and End move it, and
    screen readers read the text of the frame that it moves to. Text and axes in the grey of
    :func:`ewc_lib.figures.use_style` follow the page, light or dark. The same figures give the same
    page. All figures are closed.

    Parameters
    ----------
    frames
        The figures, by the value that the slider shows for each. All must have one size.
    texts
        For each frame one sentence: what it shows. Written below the slider and read aloud. It
        need not say the value, which stands above the slider.
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
    Interactive
        An object that notebooks render.

    Raises
    ------
    ValueError
        If ``start`` is not one of the frames, if a frame has no text, if the sizes differ, or if
        the figure weighs more than :data:`ewc_lib.figures.MAX_BYTES`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> figures = {}
    >>> for power in (1, 2):
    ...     figures[f"{power}"], axes = plt.subplots()
    ...     _ = axes.plot([x**power for x in range(5)])
    >>> slider(figures, ["A straight line.", "A parabola."], name="power", alt="A rising curve.")
    Interactive()
    """
    _check(frames, texts, background, start)
    drawn = [*([] if background is None else [background]), *frames.values()]
    cut = windows(*drawn)
    layers = [] if background is None else [_layer(inline(background, f"{ID}b", cut))]
    for k, figure in enumerate(frames.values()):
        attributes = ' class="frame"' + (' hidden=""' if k != start else "")
        layers.append(_layer(inline(figure, f"{ID}f{k}-", cut), attributes))
    said = zip(map(typeset, frames), map(typeset, texts), strict=True)
    readings = [{"value": value, "text": text} for value, text in said]
    html = _TEMPLATE.format(
        alt=escape(alt),
        name=escape(name),
        layers="".join(layers),
        last=len(frames) - 1,
        start=start,
        **{key: escape(text) for key, text in readings[start].items()},
        readings=in_script(readings),
    )
    return finish(html, list(frames.values())[start], background, drawn)


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


# HTML and at the same time XML. Without scripts the control would do nothing, so a script shows
# it. Label and value share a line, and the text repeats neither. The control is named by the label
# alone, and says value and text itself whenever it moves; the written ones are silent, or they
# would be read twice.
_TEMPLATE = """\
<div class="ewc-figure" id="FIGUREID">
<div role="img" aria-label="{alt}" aria-describedby="FIGUREID-value FIGUREID-text" style="\
display:grid;grid-template-columns:minmax(0,1fr)">
{layers}</div>
<div id="FIGUREID-value"><label for="FIGUREID-range">{name}</label> = <b>{value}</b></div>
<input id="FIGUREID-range" type="range" min="0" max="{last}" step="1" value="{start}"
 autocomplete="off" aria-valuetext="{value}. {text}" style="width:min(100%,22rem)" hidden="" />
<p id="FIGUREID-text">{text}</p>
<script type="application/json">{readings}</script>
<script>(function () {{
const figure = document.getElementById("FIGUREID");
const [range, value, text] = ["input", "b", "p"].map(s => figure.querySelector(s));
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
range.hidden = false;
show();
}})();</script>
</div>"""


def _layer(drawing: str, attributes: str = "") -> str:
    """Put a drawing into the one cell that all drawings share."""
    return f'<div style="grid-area:1/1"{attributes}><div style="{ROW}">{drawing}</div></div>\n'
