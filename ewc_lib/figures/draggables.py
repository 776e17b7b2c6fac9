"""Figures of two parameters in which a reader moves a point, by pointer or by keyboard.

A cell computes what there is to show at each point of a grid, and the page chooses from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ewc_lib.figures._interactive import Interactive, finish, in_script, typeset
from ewc_lib.figures._panels import windows
from ewc_lib.figures._svg import ID, ROW, inline

__all__ = ["draggable"]

HANDLE = 32
"""Diameter of what a finger can hold, around a point of 10, in units of 1/72 inch."""

Line = Callable[[float, float], Float[Tensor, "m 2"]]
"""What gives a line at each place of the point."""


def draggable(
    axes: Axes,
    x: Float[Tensor, " columns"],
    y: Float[Tensor, " rows"],
    text: Callable[[float, float], str],
    *,
    names: tuple[str, str],
    alt: str,
    lines: Mapping[Line2D, Line] | None = None,
    start: tuple[int, int] = (0, 0),
) -> Interactive:
    r"""Let the reader move a point over a grid, and say what holds there.

    The point follows mouse, finger and pen. Elsewhere on the figure a finger scrolls the page, and
    a tap moves the point. Below stand two range inputs of the browser, one for each parameter, for
    the keyboard and for screen readers, which read the text. The same figure gives the same page.
    The figure is closed.

    Parameters
    ----------
    axes
        Where the point moves. Its limits stay as they are; it may be one panel of several.
    x, y
        The values of the two parameters, ``[columns]`` and ``[rows]``, in increasing order.
    text
        One sentence on each pair of values: what holds there. It need not say the values, which
        stand beside the sliders.
    names
        What the parameters are called, for example ``("mean μ", "spread σ")``.
    alt
        What the figure shows, for those who do not see it, wherever the point is.
    lines
        Lines that follow the point, on any panel of the figure, such as an ellipse around it: each
        one as it was drawn, without markers, with the function that returns its points for a pair
        of values, ``[m, 2]``. A point costs about 11 bytes for each pair.
    start
        Indices of the values to begin with, on the screen and on paper.

    Returns
    -------
    Interactive
        An object that notebooks render.

    Raises
    ------
    ValueError
        If ``start`` is not on the grid, if a text is empty, if a line leaves the finite numbers, or
        if the figure weighs more than :data:`ewc_lib.figures.MAX_BYTES`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> figure, axes = plt.subplots()
    >>> _ = axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p", ylabel="q")
    >>> (box,) = axes.plot([], [])
    >>> corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    >>> draggable(
    ...     axes,
    ...     torch.linspace(0, 1, 11),
    ...     torch.linspace(0, 1, 11),
    ...     lambda p, q: f"Both happen with probability {p * q:.2f}.",
    ...     names=("probability p", "probability q"),
    ...     alt="A box from the origin to the point.",
    ...     lines={box: lambda p, q: corners * torch.tensor([p, q])},
    ... )
    Interactive()
    """
    if not (0 <= start[0] < len(x) and 0 <= start[1] < len(y)):
        raise ValueError(f"start={start} is not on the grid of {len(x)} × {len(y)} points")
    lines = dict(lines or {})
    pairs = [(p, q) for p in x.tolist() for q in y.tolist()]
    texts = [_reading(pair, text(*pair)) for pair in pairs]
    values = [[typeset(f"{value:.3g}") for value in axis.tolist()] for axis in (x, y)]
    first = start[0] * len(y) + start[1]
    _draw(axes, pairs[first], lines)
    figure = _fixed(axes)
    data = {
        "x": [u for u, _ in _places(axes, torch.cartesian_prod(x, y[:1]))],
        "y": [v for _, v in _places(axes, torch.cartesian_prod(x[:1], y))],
        "values": values,
        "texts": texts,
        "lines": [[_path(line, at(*pair)) for pair in pairs] for line, at in lines.items()],
    }
    html = _TEMPLATE.format(
        alt=escape(alt),
        row=ROW,
        drawing=inline(figure, ID, windows(figure)),
        controls="".join(map(_control, "xy", names, values, start, [texts[first]] * 2)),
        text=escape(texts[first]),
        data=in_script(data),
        radius=HANDLE // 2,
    )
    return finish(html, figure, None, [figure])


def _reading(pair: tuple[float, float], text: str) -> str:
    if not text.strip():
        raise ValueError(f"there is no text at {pair}")
    return typeset(text)


def _draw(axes: Axes, place: tuple[float, float], lines: Mapping[Line2D, Line]) -> None:
    """Draw the point, and what a finger can hold around it, and the lines where they begin."""
    for k, (line, at) in enumerate(lines.items()):
        line.set_data(*at(*place).T.tolist())
        line.set_gid(f"{ID}-line{k}")
    axes.autoscale(False)
    style: dict[str, Any] = {"s": [HANDLE**2, 100], "c": ["#00000000", "C3"], "linewidths": 0}
    x, y = ([value] * 2 for value in place)
    axes.scatter(x, y, gid=f"{ID}-point", clip_on=False, zorder=9, **style)


def _fixed(axes: Axes) -> Figure:
    """Return the figure of a panel, in which everything now has its place."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes stand in one
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _places(axes: Axes, points: Float[Tensor, "m 2"]) -> list[tuple[float, float]]:
    """Return where points of a panel stand in the drawing."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = axes.transData.transform(points.tolist()) * 72 / figure.dpi
    height = 72 * figure.get_figheight()
    return [(round(u, 1), round(height - v, 1)) for u, v in pixels.tolist()]


def _path(line: Line2D, points: Float[Tensor, "m 2"]) -> str:
    """Return a line as the path of an SVG, in which points in a row need no letter."""
    assert isinstance(line.axes, Axes)  # it is drawn
    places = _places(line.axes, points)
    if not all(map(math.isfinite, chain(*places))):
        raise ValueError(f"a line leaves the finite numbers: {points.tolist()}")
    return "M" + " ".join(f"{u:g} {v:g}" for u, v in places)


def _control(axis: str, name: str, values: list[str], start: int, text: str) -> str:
    """Return a label, the value, with room for the longest, and the control beside them."""
    room, value = max(map(len, values)), values[start]
    return f"""
<span id="{ID}-{axis}-value"><label for="{ID}-{axis}">{escape(name)}</label> = \
<b style="display:inline-block;min-width:{room}ch">{value}</b></span>
<input id="{ID}-{axis}" type="range" min="0" max="{len(values) - 1}" step="1" value="{start}"
 autocomplete="off" aria-valuetext="{value}. {escape(text)}" style="width:100%" hidden="" />"""


# As for a slider: HTML and at the same time XML, a control that only a script shows, and a text
# that the controls say. Only a finger that begins on the point drags it: elsewhere it scrolls.
_TEMPLATE = """\
<div class="ewc-figure" id="FIGUREID">
<div role="img" aria-label="{alt}" aria-describedby="FIGUREID-x-value FIGUREID-y-value \
FIGUREID-text" style="{row}">{drawing}</div>
<div style="display:grid;grid-template-columns:auto 1fr;gap:0 .5rem;max-width:26rem;\
margin:auto;text-align:left">{controls}
</div>
<p id="FIGUREID-text">{text}</p>
<script type="application/json">{data}</script>
<script>(function () {{
const get = name => document.getElementById("FIGUREID-" + name);
const [x, y, point, text] = ["x", "y", "point", "text"].map(get);
const figure = document.getElementById("FIGUREID"), picture = figure.querySelector("[role=img]");
const values = figure.querySelectorAll("b");
const data = JSON.parse(figure.querySelector("script").textContent);
const lines = data.lines.map((_, n) => get("line" + n).querySelector("path"));
const first = [data.x[x.defaultValue], data.y[y.defaultValue]];
let held = null;  // the window of the drawing in which the point is being moved
function show() {{
  const k = x.value * data.y.length + Number(y.value);
  const shift = [data.x[x.value] - first[0], data.y[y.value] - first[1]];
  point.setAttribute("transform", "translate(" + shift + ")");
  lines.forEach((line, n) => line.setAttribute("d", data.lines[n][k]));
  text.textContent = data.texts[k];
  [x, y].forEach((range, n) => {{
    const value = data.values[n][range.value];
    values[n].textContent = value;
    range.setAttribute("aria-valuetext", value + ". " + data.texts[k]);
  }});
}}
function place(event, svg) {{
  const at = new DOMPoint(event.clientX, event.clientY);
  return at.matrixTransform(svg.getScreenCTM().inverse());
}}
function nearest(values, at) {{
  const far = values.map(value => Math.abs(value - at));
  return far.indexOf(Math.min(...far));
}}
function move(event) {{
  if (!held) return;
  const at = place(event, held);
  x.value = nearest(data.x, at.x);
  y.value = nearest(data.y, at.y);
  show();
}}
function beyond(values, at) {{
  return Math.max(Math.min(...values) - at, at - Math.max(...values));
}}
function hold(event) {{
  const svg = event.target.closest("svg");
  if (!svg) return;
  const at = place(event, svg), scrolls = event.type + event.pointerType === "pointerdowntouch";
  const columns = scrolls ? [data.x[x.value]] : data.x, rows = scrolls ? [data.y[y.value]] : data.y;
  if (Math.max(beyond(columns, at.x), beyond(rows, at.y)) > {radius}) return;
  held = svg;
  move(event);
}}
const on = (type, does) => picture.addEventListener(type, does, {{ passive: false }});
const release = () => {{ held = null; }};
on("pointerdown", event => {{
  hold(event);
  if (held) picture.setPointerCapture(event.pointerId);
}});
on("pointermove", move);
on("click", event => {{ hold(event); release(); }});
["pointerup", "pointercancel"].forEach(end => on(end, release));
["mousedown", "touchstart"].forEach(start => on(start, event => {{
  if (held) event.preventDefault();  // no text is marked, and the page does not scroll
}}));
[x, y].forEach(range => range.addEventListener("input", show));
point.style.cursor = "grab";
[x, y].forEach(range => {{ range.hidden = false; }});
show();
}})();</script>
</div>"""
