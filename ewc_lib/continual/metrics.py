r"""How well a network does on tasks, and what is left of earlier ones.

All but :func:`accuracy` read the matrix of accuracies :math:`R`, with :math:`R_{t,j}` the accuracy
on task :math:`j` after task :math:`t` was learned, for :math:`T` tasks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ewc_lib._restoring import evaluating

__all__ = [
    "accuracy",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
]

CHUNK = 10_000
"""Inputs that are classified at a time."""

Matrix = Float[Tensor, "T T"]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]) -> float:
    """Return the share of inputs whose most likely class is the right one.

    Parameters
    ----------
    model
        A classifier; it is run in eval mode and gets its own modes back.
    data
        Inputs ``[N, D]`` and labels ``[N]``.

    Returns
    -------
    float
        Between 0 and 1.

    Examples
    --------
    >>> import torch
    >>> accuracy(torch.nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))
    0.75
    """
    x, y = data
    with evaluating(model):
        parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
        right = sum(int((model(part).argmax(-1) == labels).sum()) for part, labels in parts)
    return right / len(y)


def average_accuracy(R: Matrix) -> float:
    r"""Return the average over all tasks after the last one (Lopez-Paz and Ranzato 2017, ACC).

    .. math:: \frac1T \sum_{j=1}^T R_{T,j}

    Examples
    --------
    >>> average_accuracy(torch.tensor([[1.0, 0.5], [0.75, 1.0]]))
    0.875
    """
    return float(_square(R)[-1].mean())


def backward_transfer(R: Matrix) -> float:
    r"""Return what later tasks did to earlier ones (Lopez-Paz and Ranzato 2017, BWT).

    .. math:: \frac{1}{T-1} \sum_{j=1}^{T-1} \left( R_{T,j} - R_{j,j} \right)

    It is negative if the network forgets, and NaN for a single task.

    Examples
    --------
    >>> backward_transfer(torch.tensor([[1.0, 0.5], [0.75, 1.0]]))
    -0.25
    """
    return float((_square(R)[-1] - R.diagonal())[:-1].mean())


def forward_transfer(R: Matrix, initial: Float[Tensor, " T"]) -> float:
    r"""Return what earlier tasks did for later ones (Lopez-Paz and Ranzato 2017, FWT).

    .. math:: \frac{1}{T-1} \sum_{j=2}^{T} \left( R_{j-1,j} - b_j \right)

    with :math:`b_j` the accuracy of the untrained network. NaN for a single task, and where
    :math:`R_{j-1,j}` was not measured.

    Raises
    ------
    ValueError
        If there is not one initial accuracy for each task.

    Examples
    --------
    >>> forward_transfer(torch.tensor([[1.0, 0.5], [0.75, 1.0]]), torch.tensor([0.1, 0.25]))
    0.25
    """
    if initial.shape != _square(R).shape[:1]:
        raise ValueError(f"initial must have {len(R)} entries, got {tuple(initial.shape)}")
    return float((R.diagonal(1) - initial[1:]).mean())


def forgetting(R: Matrix) -> float:
    r"""Return how far each task has fallen below its best (Chaudhry et al. 2018, equation 3).

    .. math:: \frac{1}{T-1} \sum_{j=1}^{T-1} \left(
              \max_{t \in \{j, \dots, T-1\}} R_{t,j} - R_{T,j} \right)

    NaN for a single task, and where an accuracy on a task already learned was not measured.

    Examples
    --------
    >>> forgetting(torch.tensor([[1.0, 0.5], [0.75, 1.0]]))
    0.25
    """
    later = torch.ones_like(_square(R)).triu(1).bool()
    learned = R.masked_fill(later, 0)  # what comes before a task was learned does not count
    drops = learned[:-1].amax(0) - learned[-1] if len(R) > 1 else learned[-1]
    return float(drops[:-1].mean())


def learning_accuracy(R: Matrix) -> float:
    r"""Return the average accuracy right after a task was learned (Riemer et al. 2019, LA).

    .. math:: \frac1T \sum_{j=1}^T R_{j,j}

    It falls if a method holds on to old tasks so firmly that it cannot learn new ones.

    Examples
    --------
    >>> learning_accuracy(torch.tensor([[1.0, 0.5], [0.75, 1.0]]))
    1.0
    """
    return float(_square(R).diagonal().mean())


def _square(R: Matrix) -> Matrix:
    if R.dim() != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R must have one row and one column for each task, got {tuple(R.shape)}")
    return R
