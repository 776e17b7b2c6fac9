"""Figures of what a network knows after each task."""

from __future__ import annotations

import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

__all__ = ["draw_curves", "draw_matrix"]


def draw_matrix(axes: Axes, R: Float[Tensor, "T T"]) -> None:
    """Draw the matrix of accuracies as a heat map, in percent.

    Parameters
    ----------
    axes
        Where to draw.
    R
        Row ``t`` after task ``t``, column ``j`` for task ``j``, as
        :attr:`ewc_lib.continual.Learned.accuracies`. What is NaN, or not learned yet, stays empty.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import torch
    >>> draw_matrix(plt.figure().add_subplot(), torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
    """
    numbers = range(1, len(R) + 1)
    sns.heatmap(
        100 * R.numpy(),
        mask=(R.isnan() | torch.ones_like(R).triu(1).bool()).numpy(),
        ax=axes,
        vmin=0,
        vmax=100,
        cmap="cividis",
        annot=len(R) <= 10,
        fmt=".0f",
        square=True,
        xticklabels=numbers,
        yticklabels=numbers,
        cbar_kws={"label": "accuracy, %"},
    )
    axes.set(xlabel="accuracy on task", ylabel="after task")
    axes.tick_params(rotation=0)


def draw_curves(axes: Axes, R: Float[Tensor, "T T"]) -> None:
    """Draw the accuracy on each task from when it was learned, over the tasks.

    Parameters
    ----------
    axes
        Where to draw.
    R
        As for :func:`draw_matrix`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import torch
    >>> draw_curves(plt.figure().add_subplot(), torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
    """
    T = len(R)
    for j, colour in enumerate(sns.color_palette("viridis", T)):
        after = range(j + 1, T + 1)
        axes.plot(after, R[j:, j].tolist(), marker="o", ms=3, color=colour, label=f"task {j + 1}")
    axes.set(xlabel="after task", ylabel="accuracy", ylim=(0, 1), xticks=range(1, T + 1))
