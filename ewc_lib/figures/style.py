"""What the figures of the chapters share: a style that reads on light and on dark pages.

Nothing happens at import; a chapter calls :func:`use_style` once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from PIL import Image
from torch import Tensor

from ewc_lib.figures._colors import GREY, PALETTE
from ewc_lib.figures._panels import windows
from ewc_lib.figures._svg import ID, ROW, identify, inline

__all__ = ["drawing", "ellipse", "outline", "save", "use_style"]

REPOSITORY = Path(__file__).parents[2]


def use_style() -> None:
    """Set transparent figures with mid-grey text and colours that colour-blind people can tell.

    A notebook then shows each figure as SVG, with the fonts and the text colour of the page, and
    as PNG where there is no HTML. Panels in a row stand below each other on a narrow page.

    Text of 11 points, the smallest here, takes at least 11 pixels on a phone (375 pixels, 343 of
    them for a figure) if a figure, or each panel of a row, is at most 4.75 inches wide; the default
    is 4.7 by 3.2 inches. A figure takes at most 100 pixels an inch.

    Examples
    --------
    >>> use_style()
    >>> import matplotlib as mpl
    >>> mpl.rcParams["figure.facecolor"]
    'none'
    """
    text = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    sns.set_theme(style="ticks", palette=PALETTE)
    plt.style.use(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.figsize": (4.7, 3.2),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "none",
            "legend.frameon": False,
            "svg.fonttype": "none",
            **dict.fromkeys(text, GREY),
        }
    )
    notebook = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if notebook:  # when it makes its first figure, it forgets what was set for the class Figure
        notebook.display_formatter.formatters["text/html"].for_type(FigureBase, drawing)


def drawing(figure: Figure) -> str:
    """Return a figure as a part of a page.

    Parameters
    ----------
    figure
        What to draw.

    Returns
    -------
    str
        HTML that refers to nothing outside itself. The same figure gives the same text. The book
        replaces its name, ``"Figure"``, by the alternative text.

    Examples
    --------
    >>> figure, axes = plt.subplots()
    >>> drawing(figure)[:45]
    '<div class="ewc-figure" role="img" aria-label'
    >>> plt.close(figure)
    """
    html = inline(figure, ID, windows(figure))
    html = f'<div class="ewc-figure" role="img" aria-label="Figure" style="{ROW}">{html}</div>'
    return identify(html)


def ellipse(
    axes: Axes,
    centre: Float[Tensor, " 2"],
    covariance: Float[Tensor, "2 2"],
    probability: float = 0.95,
    **style: Any,
) -> None:
    r"""Draw the region that holds a Gaussian vector with the given probability.

    Parameters
    ----------
    axes
        Where to draw.
    centre, covariance, probability
        As for :func:`outline`.
    style
        Passed on to :meth:`matplotlib.axes.Axes.plot`.

    Examples
    --------
    >>> import torch
    >>> figure, axes = plt.subplots()
    >>> ellipse(axes, torch.zeros(2), torch.eye(2), label="95 %")
    >>> plt.close(figure)
    """
    axes.plot(*outline(centre, covariance, probability, n_points=200).T, **style)


def outline(
    centre: Float[Tensor, " 2"],
    covariance: Float[Tensor, "2 2"],
    probability: float = 0.95,
    n_points: int = 40,
) -> Float[Tensor, "n_points 2"]:
    r"""Return points around the region that holds a Gaussian vector with the given probability.

    .. math:: \{\theta : (\theta - c)^\top \Sigma^{-1} (\theta - c) = -2 \log(1 - q)\}

    Parameters
    ----------
    centre
        The middle :math:`c` of the ellipse, ``[2]``.
    covariance
        The covariance :math:`\Sigma`, ``[2, 2]``, positive definite.
    probability
        The probability :math:`q` inside; 95 % is the usual confidence region.
    n_points
        How many points, of which the last is the first again. Of 40 the eye sees no corners, and
        a figure that holds many ellipses stays light.

    Returns
    -------
    Float[Tensor, "n_points 2"]
        The points in a row.

    Examples
    --------
    >>> import torch
    >>> outline(torch.zeros(2), torch.eye(2)).norm(dim=1).max()
    tensor(2.4477)
    """
    angle = torch.linspace(0, 2 * math.pi, n_points, dtype=covariance.dtype)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    radius = math.sqrt(-2 * math.log(1 - probability))
    points: Tensor = centre + radius * circle @ torch.linalg.cholesky(covariance).mT
    return points


def save(figure: Figure, name: str, numbers: Mapping[str, tuple[float, float]]) -> None:
    """Write a figure for other pages if ``$EWC_FIGURES`` asks for it; else see that it is current.

    The numbers are kept in the picture. Training rounds differently on every machine, so they are
    current if they are within two standard errors.

    Parameters
    ----------
    figure
        What to write.
    name
        File name without its ending. A PNG with a white ground is written for the README, and
        beside it what :func:`drawing` returns, which the book shows in its place.
        ``$EWC_FIGURES`` is their folder, seen from the repository.
    numbers
        What the figure shows: values with their standard errors.

    Raises
    ------
    ValueError
        If the picture in the repository shows other numbers. Outside of it there is no picture.
    """
    folder = os.environ.get("EWC_FIGURES")
    path = REPOSITORY / (folder or "book/figures") / f"{name}.png"
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, "Numbers": json.dumps(numbers)}
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)
        path.with_suffix(".html").write_text(drawing(figure) + "\n", encoding="utf-8")
    elif path.exists():
        _check_numbers(path, numbers)


def _check_numbers(path: Path, numbers: Mapping[str, tuple[float, float]]) -> None:
    with Image.open(path) as picture:
        known = json.loads(picture.info.get("Numbers", "{}"))
    stale = known.keys() ^ numbers.keys() or {
        key
        for key, (value, error) in known.items()
        if not abs(numbers[key][0] - value) <= 2 * error
    }
    if stale:
        raise ValueError(f"{path} shows other numbers for {sorted(stale)}: run `make figures`")
