"""How good an estimate of the Fisher information is: measured over draws, and in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib.fisher import Categorical, every_label
from ewc_lib.fisher.output import root
from ewc_lib.likelihood import network_log_prob
from ewc_lib.score import scores

__all__ = [
    "Quality",
    "label_scores",
    "quality",
    "rank_agreement",
    "sampling_variance",
    "sketch_columns",
    "sketch_variance",
]


class Quality(NamedTuple):
    """How an estimator of the diagonal compares with the exact one; all are ratios to it."""

    bias: float
    standard_error: float
    trace: float
    rank: float

    @property
    def error(self) -> float:
        """The root mean square error, bias and standard error together."""
        return math.hypot(self.bias, self.standard_error)


def quality(draws: Float[Tensor, "R P"], exact: Float[Tensor, " P"]) -> Quality:
    r"""Compare independent draws of an estimator of the diagonal with the exact diagonal.

    .. math:: \text{bias} = \frac{\|\mathbb{E}\hat F - F\|}{\|F\|} , \qquad
              \text{standard error}
              = \frac{\sqrt{\mathbb{E}\|\hat F - \mathbb{E}\hat F\|^2}}{\|F\|}

    This is :eq:`eq-relative-error`. The mean of :math:`R` draws misses the expectation by chance;
    what that adds to the square of the bias on average is subtracted, and what is then below zero
    is no bias.

    Parameters
    ----------
    draws
        One draw in each row. An estimator without randomness has a single row; its standard
        error is 0.
    exact
        The exact diagonal, not all zero.

    Returns
    -------
    Quality
        Relative bias and standard error of the whole diagonal, the share of the trace that is
        kept on average, and the mean :func:`rank_agreement` of a draw.

    Examples
    --------
    >>> import torch
    >>> exact = torch.tensor([3.0, 4.0])
    >>> found = quality(torch.tensor([[3.0, 2.0], [3.0, 6.0]]), exact)  # right on average
    >>> round(found.bias, 3), round(found.standard_error, 3), round(found.trace, 3)
    (0.0, 0.566, 1.0)
    """
    mean, size = draws.mean(0), exact.norm()
    variance = draws.var(0).sum().item() if len(draws) > 1 else 0.0
    squared_bias = (mean - exact).square().sum().item() - variance / len(draws)
    return Quality(
        bias=math.sqrt(max(squared_bias, 0.0)) / size.item(),
        standard_error=math.sqrt(variance) / size.item(),
        trace=(mean.sum() / exact.sum()).item(),
        rank=sum(rank_agreement(draw, exact) for draw in draws) / len(draws),
    )


def rank_agreement(estimate: Float[Tensor, " P"], exact: Float[Tensor, " P"]) -> float:
    """Return Spearman's rank correlation over the entries with information.

    Entries that are exactly zero are zero in every estimate; they would agree for no merit, and
    are left out. What is left has no ties, so ranks are places in the sorted order.

    Parameters
    ----------
    estimate, exact
        Two diagonals of the same parameters, at least two of them with information.

    Examples
    --------
    >>> import torch
    >>> exact = torch.tensor([0.0, 1.0, 2.0, 5.0])
    >>> round(rank_agreement(exact**2, exact), 6), round(rank_agreement(-exact, exact), 6)
    (1.0, -1.0)
    """
    informative = exact > 0
    places = [values[informative].argsort().argsort().double() for values in (estimate, exact)]
    return float(torch.corrcoef(torch.stack(places))[0, 1])


def label_scores(
    model: nn.Module, inputs: Float[Tensor, "N ..."]
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C P"]]:
    r"""Return the probability and the score of every label of every input of a classifier.

    .. math:: \pi_{ny} = p(y \mid x_n, \theta) , \qquad
              g_{ny} = \nabla_\theta \log p(y \mid x_n, \theta)

    Every estimator in :prf:ref:`def-estimators` reads this table. It has ``N C P`` entries, so it
    serves to look at small networks only.

    Parameters
    ----------
    model
        A classifier that returns logits ``[N, C]``.
    inputs
        A batch of inputs.

    Returns
    -------
    probabilities : Tensor
        ``[N, C]``.
    scores : Tensor
        ``[N, C, P]``, parameters in the order of ``model.named_parameters()``.

    Examples
    --------
    >>> import torch
    >>> p, g = label_scores(torch.nn.Linear(3, 2), torch.ones(5, 3))
    >>> g.shape  # a weight for each class and input, and a bias for each class
    torch.Size([5, 2, 8])
    >>> mean = torch.einsum("nc,ncp->np", p, g)
    >>> bool((mean.abs() < 1e-6).all())
    True
    """
    log_prob, theta = network_log_prob(model)
    pairs, weights = every_label(model, inputs)
    n = len(inputs)
    table = scores(log_prob, theta, pairs).unflatten(0, (-1, n)).transpose(0, 1)
    return n * weights.unflatten(0, (-1, n)).mT, table


def sketch_columns(
    probabilities: Float[Tensor, "N C"], scores: Float[Tensor, "N C P"]
) -> Float[Tensor, "N K P"]:
    r"""Return what the columns of the root become in the parameters: the sketch mixes their signs.

    .. math:: w_{nk} = J_n^\top s_{nk} = \sum_y S_{yk}\, g_{ny} , \qquad
              \sum_k w_{nk}^2 = F_n

    Each column of the root sums to zero over the labels, so scores may stand for the Jacobian.
    There are :math:`K = C - 1` columns.

    Parameters
    ----------
    probabilities, scores
        As :func:`label_scores` returns them.

    Examples
    --------
    >>> import torch
    >>> p, g = label_scores(torch.nn.Linear(3, 2), torch.ones(5, 3))
    >>> w = sketch_columns(p, g)
    >>> F = torch.einsum("nc,ncp->np", p, g**2)
    >>> w.shape, torch.allclose(w.square().sum(1), F)
    (torch.Size([5, 1, 8]), True)
    """
    columns = torch.cat(list(root(Categorical(), probabilities.log())))
    return torch.einsum("knc,ncp->nkp", columns, scores)


def sketch_variance(
    probabilities: Float[Tensor, "N C"], scores: Float[Tensor, "N C P"]
) -> Float[Tensor, "N P"]:
    r"""Return the variance of the sketch of one observation, for each entry of the diagonal.

    .. math:: \operatorname{Var}\big[(w^\top v)^2\big]
              = 2\Big(\big(\textstyle\sum_k w_k^2\big)^2 - \sum_k w_k^4\Big)

    This is :eq:`eq-sketch-variance`, for one vector :math:`v` of random signs.

    Parameters
    ----------
    probabilities, scores
        As :func:`label_scores` returns them.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(5, 3, dtype=torch.float64)
    >>> p, g = label_scores(torch.nn.Linear(3, 2, dtype=x.dtype), x)
    >>> noise = sketch_variance(p, g)
    >>> bool((noise.abs() < 1e-12).all())  # two classes: none
    True
    """
    squares = sketch_columns(probabilities, scores).square()
    return 2 * (squares.sum(1).square() - squares.square().sum(1))


def sampling_variance(
    probabilities: Float[Tensor, "N C"], scores: Float[Tensor, "N C P"]
) -> Float[Tensor, "N P"]:
    r"""Return the variance of the squared score of one drawn label, for each entry.

    .. math:: \operatorname{Var}_{y \sim \pi}\big[g_y^2\big]
              = \sum_y \pi_y g_y^4 - \Big(\sum_y \pi_y g_y^2\Big)^2

    Relative to the square of the mean it is at least :eq:`eq-sampling-variance`.

    Parameters
    ----------
    probabilities, scores
        As :func:`label_scores` returns them.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(5, 3, dtype=torch.float64)
    >>> p, g = label_scores(torch.nn.Linear(3, 2, dtype=x.dtype), x)
    >>> e, F = p[:, :1], torch.einsum("nc,ncp->np", p, g**2)
    >>> bound = (1 - 2 * e) ** 2 / (e * (1 - e)) * F**2
    >>> torch.allclose(sampling_variance(p, g), bound)  # two classes: equal
    True
    """
    squares = scores.square()
    mean = torch.einsum("nc,ncp->np", probabilities, squares)
    return torch.einsum("nc,ncp->np", probabilities, squares.square()) - mean.square()
