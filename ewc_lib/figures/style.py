"""What the figures of the chapters share: a style that reads on light and on dark pages.

Nothing happens at import; a chapter calls :func:`use_style` once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

__all__ = ["ellipse", "save", "use_style"]

REPOSITORY = Path(__file__).parents[2]

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


def save(figure: Figure, name: str, numbers: Mapping[str, tuple[float, float]]) -> None:
    """Write a figure for the README if ``$EWC_FIGURES`` asks for it; else see that it is current.

    The numbers are kept in the picture. Training rounds differently on every machine, so they are
    current if they are within two standard errors.

    Parameters
    ----------
    figure
        What to write.
    name
        File name without its ending; a PNG with a white ground is written. ``$EWC_FIGURES`` is
        its folder, seen from the repository.
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
