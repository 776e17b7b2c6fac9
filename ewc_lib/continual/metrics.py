r"""How well a network does on tasks, and what is left of earlier ones.

All but :func:`accuracy` read the matrix of accuracies :math:`R`, with :math:`R_{t,j}` the accuracy
on task :math:`j` after task :math:`t` was learned, for :math:`T` tasks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._calling import forward
from ewc_lib._forms import Pick, picked
from ewc_lib._restoring import evaluating, untouched
from ewc_lib.continual._reading import Piece, device_of, in_order
from ewc_lib.likelihood.agreement import agreed
from ewc_lib.likelihood.categorical import Categorical
from ewc_lib.likelihood.labelled import takes

__all__ = [
    "accuracy",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "min_accuracy",
]

CHUNK = 10_000
"""Inputs that are classified at a time."""

Matrix = Float[Tensor, "T T"]


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: Any,
    *,
    class_dim: int | None = None,
    ignore_index: int = -100,
    batch: Pick | None = None,
) -> float:
    """Return the share of labels that are the most likely class.

    Parameters
    ----------
    model
        A classifier; it is run in eval mode and gets its own modes back. Its output is a tensor,
        or has ``.logits``: ``[N, C]``, ``[N, T, C]`` for sequences, or ``[N, C, H, W]`` for
        pixels.
    data
        One tuple ``(inputs, labels)``, a data set, a DataLoader or another iterable of batches;
        also of dicts with ``"labels"``. Labels have the shape of the output without its classes.
        Where the loss that a model computes from such a dict is about the label that follows, as
        that of causal language models, so is the accuracy.
    class_dim
        The axis of the classes; needed where the shapes leave a choice.
    ignore_index
        Labels of this number do not count.
    batch
        Picks ``(inputs, labels)`` from a batch that holds more.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If the data are empty or of another form, or the shapes do not fit or leave a choice.

    Examples
    --------
    >>> import torch
    >>> accuracy(torch.nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))
    0.75
    """
    right, n = 0, 0
    follows: bool | None = None
    with evaluating(model), torch.random.fork_rng(devices=()):  # a loader draws from it
        for piece in in_order(picked(data, batch), device_of(model), CHUNK):
            output, labels = forward(model, piece.inputs), piece.target
            if follows is None:
                follows = _is_about_the_next(model, piece)
            if follows:
                output, labels = output[:, :-1], labels[:, 1:]
            found, counted = right_answers(output, labels, class_dim, ignore_index)
            right, n = right + found, n + counted
    return right / n if n else float("nan")


def _is_about_the_next(model: nn.Module, piece: Piece) -> bool | None:
    """Tell whether a model's own loss compares with the label that follows, if a batch shows it."""
    labels = piece.target
    if not piece.labelled or labels.dim() != 2 or not takes(model, "labels"):
        return False
    if not (labels[:, 1:] != -100).any():
        return None
    try:
        with untouched(model):
            _, likelihood = agreed(model, [{**piece.inputs, "labels": labels}])
    except ValueError:  # it is the loss of no likelihood that is known
        return False
    return isinstance(likelihood, Categorical) and likelihood.next_token


def right_answers(
    output: Tensor, labels: Tensor, class_dim: int | None = None, ignore_index: int = -100
) -> tuple[int, int]:
    """Return how many labels are the most likely class, and how many count."""
    labels = labels if labels.is_floating_point() else labels.long()  # in uint8 there is no -100
    right = output.argmax(class_axis(output, labels, class_dim)) == labels
    counts = labels != ignore_index
    return int((right & counts).sum()), int(counts.sum())


def class_axis(output: Tensor, labels: Tensor, class_dim: int | None = None) -> int:
    """Return the axis of the classes: that which the labels do not have.

    Raises
    ------
    ValueError
        If there is none, or both the second and the last one can be meant.
    """
    shape, wanted = tuple(output.shape), tuple(labels.shape)
    axes = {1, len(shape) - 1} if class_dim is None else {class_dim % max(1, len(shape))}
    there = axes & set(range(1, len(shape)))
    fits = {axis for axis in there if (*shape[:axis], *shape[axis + 1 :]) == wanted}
    if len(fits) == 1:
        return fits.pop()
    got = f"got {list(shape)} and {list(wanted)}"
    if fits:
        raise ValueError(
            f"the classes may be on axis 1 or on the last axis of the output, {got}: say which by "
            "class_dim= of accuracy, a regularizer with likelihood=Categorical(class_dim=...) or "
            "a criterion; torch.nn.CrossEntropyLoss() reads axis 1"
        )
    hint = ""
    if len(shape) == len(wanted) and wanted[-1:] == (1,):
        hint = "; take the last axis of the labels away, as by y.squeeze(-1)"
    raise ValueError(
        f"an output [N, C] needs labels [N], and one of [N, C, ...] or [N, ..., C] labels "
        f"[N, ...], {got}{hint}"
    )


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


def min_accuracy(R: Matrix, lowest: Matrix) -> float:
    r"""Return how low earlier tasks have ever fallen (De Lange et al. 2023, min-ACC).

    .. math:: \frac{1}{T-1} \sum_{j=1}^{T-1} \min_{t > j} \, \min(L_{t,j}, R_{t,j})

    with :math:`L_{t,j}` the lowest accuracy on task :math:`j` while task :math:`t` was learned.
    What comes back until the end of a task is not in :math:`R`: the *stability gap*. NaN for a
    single task.

    Parameters
    ----------
    R, lowest
        ``accuracies`` and ``lowest`` of :class:`ewc_lib.continual.Learned`.

    Raises
    ------
    ValueError
        If the shapes differ, or nothing was measured while some task was learned.

    Examples
    --------
    >>> R = torch.tensor([[1.0, 0.5], [0.75, 1.0]])
    >>> min_accuracy(R, torch.tensor([[torch.nan, torch.nan], [0.25, torch.nan]]))
    0.25
    """
    if lowest.shape != _square(R).shape:
        raise ValueError(f"lowest must have the shape of R, got {tuple(lowest.shape)}")
    later = torch.ones_like(R).tril(-1).bool()
    unwatched = (later & lowest.isnan() & ~R.isnan()).any(1)  # what diverged is NaN in both
    if unwatched.any():
        rows = unwatched.nonzero().flatten().tolist()
        raise ValueError(
            f"nothing was measured while the tasks of rows {rows} were learned: give learn() "
            "watch=, numbers of updates that every task has"
        )
    lows = torch.fmin(R, lowest).masked_fill(~later, torch.inf)
    return float(lows.amin(0)[:-1].mean())


def _square(R: Matrix) -> Matrix:
    if R.dim() != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R must have one row and one column for each task, got {tuple(R.shape)}")
    return R
