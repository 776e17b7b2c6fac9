"""Figures that the chapters share: legible on light and dark pages, and without a server.

Nothing happens at import; a chapter calls :func:`use_style` once.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["ellipse", "save", "slider", "use_style"]

GREY = "#787878"
"""Text and axes: a contrast of at least 4.2 against white and against the dark page."""


def use_style() -> None:
    """Set transparent figures with mid-grey text and colours that colour-blind people can tell.

    Examples
    --------
    >>> use_style()
    >>> import matplotlib as mpl
    >>> mpl.rcParams["figure.facecolor"]
    'none'
    """
    text = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    sns.set_theme(style="ticks", palette="colorblind")
    plt.style.use(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.figsize": (5.6, 3.4),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.fonttype": "none",
            **dict.fromkeys(text, GREY),
        }
    )


def ellipse(
    axes: Axes,
    centre: Float[Tensor, " 2"],
    covariance: Float[Tensor, "2 2"],
    probability: float = 0.95,
    **style: Any,
) -> None:
    r"""Draw the region that holds a Gaussian vector with the given probability.

    .. math:: \{\theta : (\theta - c)^\top \Sigma^{-1} (\theta - c) = -2 \log(1 - q)\}

    Parameters
    ----------
    axes
        Where to draw.
    centre
        The middle of the ellipse, ``[2]``.
    covariance
        The covariance :math:`\Sigma`, ``[2, 2]``, positive definite.
    probability
        The probability :math:`q` inside; 95 % is the usual confidence region.
    style
        Passed on to :meth:`matplotlib.axes.Axes.plot`.

    Examples
    --------
    >>> import torch
    >>> figure, axes = plt.subplots()
    >>> ellipse(axes, torch.zeros(2), torch.eye(2), label="95 %")
    >>> plt.close(figure)
    """
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=covariance.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    radius = math.sqrt(-2 * math.log(1 - probability))
    x, y = centre.unsqueeze(1) + radius * torch.linalg.cholesky(covariance) @ circle
    axes.plot(x, y, **style)


def save(figure: Figure, name: str) -> None:
    """Write a figure for the README, if the build asks for it by ``$EWC_FIGURES``.

    Parameters
    ----------
    figure
        What to write.
    name
        File name without its ending; a PNG with a white ground is written.
    """
    folder = os.environ.get("EWC_FIGURES")
    if folder:
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


class Slider:
    """A figure with frames that a slider chooses from; notebooks show it by itself."""

    def __init__(self, markup: str) -> None:
        self._markup = markup

    def _repr_html_(self) -> str:
        return self._markup

    def __repr__(self) -> str:
        return "Slider (an interactive figure; open it in a notebook or in the book)"


def slider(
    frames: Mapping[str, Figure],
    *,
    name: str,
    alt: str,
    caption: str,
    background: Figure | None = None,
    start: int = 0,
) -> Slider:
    """Let the reader move through figures that were drawn beforehand.

    Works in static pages without a network and by keyboard, and is announced by screen readers.
    The figures are closed.

    Parameters
    ----------
    frames
        The figures, by the value that the slider shows for each. All must have one size.
    name
        What the slider changes, for example ``"λ"``.
    alt
        What the figure shows, for those who do not see it.
    caption
        Text below the figure.
    background
        What all frames share, drawn once below them.
    start
        Index of the first frame to show.

    Returns
    -------
    Slider
        An object that notebooks render.

    Raises
    ------
    ValueError
        If there is no frame, or if ``start`` is not one of them.

    Examples
    --------
    >>> figures = {}
    >>> for power in (1, 2):
    ...     figures[str(power)], axes = plt.subplots()
    ...     _ = axes.plot([x**power for x in range(5)])
    >>> slider(figures, name="power", alt="A curve.", caption="Powers.")
    Slider (an interactive figure; open it in a notebook or in the book)
    """
    if not 0 <= start < len(frames):
        raise ValueError(f"start={start} is not one of the {len(frames)} frames")
    base = "" if background is None else _svg(background, f"{name}-back")
    images = [_svg(figure, f"{name}-{i}") for i, figure in enumerate(frames.values())]
    layers = "".join(
        f'<div class="frame"{"" if i == start else " hidden"}>{image}</div>'
        for i, image in enumerate(images)
    )
    markup = _TEMPLATE.format(
        id=f"slider-{next(_numbers)}-{re.sub(r'[^a-z0-9]+', '-', alt.lower())[:24]}",
        alt=html.escape(alt),
        base=f"<div>{base}</div>",
        layers=layers,
        name=html.escape(name),
        last=len(images) - 1,
        start=start,
        keys=html.escape("\n".join(frames)),
        first=html.escape(list(frames)[start]),
        caption=html.escape(caption),
    )
    return Slider(markup)


_numbers = itertools.count(1)

_TEMPLATE = """\
<figure class="ewc-slider" id="{id}" data-keys="{keys}">
<div role="img" aria-label="{alt}" style="display:grid;max-width:36rem">
<style>#{id} [role=img]>div{{grid-area:1/1}} #{id} svg{{width:100%;height:auto}}</style>
{base}{layers}</div>
<label for="{id}-r">{name} = <output>{first}</output></label>
<input id="{id}-r" type="range" min="0" max="{last}" step="1" value="{start}"
 style="width:min(100%,24rem);display:block">
<figcaption>{caption}</figcaption>
<script>(function(){{
const figure = document.getElementById("{id}"), keys = figure.dataset.keys.split("\\n");
const range = figure.querySelector("input"), shown = figure.querySelector("output");
const frames = figure.querySelectorAll(".frame");
range.addEventListener("input", show); show();
function show() {{
  frames.forEach((frame, i) => {{ frame.hidden = i !== Number(range.value); }});
  shown.textContent = keys[range.value];
  range.setAttribute("aria-valuetext", "{name} = " + keys[range.value]);
}}
}})();</script>
</figure>"""


def _svg(figure: Figure, salt: str) -> str:
    """Draw a figure as inline SVG whose grey follows the page's text colour."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(GREY, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    )
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", text)
