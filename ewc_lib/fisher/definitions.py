r"""The two definitions of the Fisher information, word for word.

Slow and obvious: every matrix is formed, every expectation is a plain weighted sum. The fast
engine of :func:`ewc_lib.fisher_information` is tested against these functions.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.utils._pytree import tree_map

from ewc_lib._calling import forward
from ewc_lib._parameters import Data, Params, count, ravel
from ewc_lib._restoring import untouched
from ewc_lib.likelihood.definition import LogProb, check_log_prob, per_observation
from ewc_lib.likelihood.outputs import Likelihood, output_distribution
from ewc_lib.score.definition import scores

__all__ = ["every_label", "negative_expected_hessian", "score_covariance"]


def score_covariance(
    log_prob: LogProb, theta: Params, data: Data, weights: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "P P"]:
    r"""Return definition 1: the covariance of the score of one observation.

    .. math:: F(\theta) = \mathbb{E}_{x}\left[s(\theta; x)\, s(\theta; x)^\top\right]
              \approx \frac1N \sum_{n=1}^N s_n s_n^\top

    This is :eq:`eq-fisher-covariance` with the expectation replaced by a weighted sum over data.
    It is the Fisher information if the data follow the model; with the labels of a data set it
    is the *empirical* Fisher (Kunstner et al. 2019), which differs away from the truth. The mean
    score is not subtracted: under the model it is zero.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta
        Parameters, ``[P]`` or a dict of tensors; a dict is flattened in its order.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.
    weights
        The probability of each observation, ``[N]``. By default all have ``1/N``.

    Returns
    -------
    Tensor
        ``[P, P]``, per observation, in nats per squared unit of the parameters.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> coin = lambda p, x: torch.distributions.Bernoulli(p).log_prob(x)
    >>> outcomes = torch.tensor([0.0, 1.0])
    >>> score_covariance(coin, torch.tensor(0.2), outcomes, weights=torch.tensor([0.8, 0.2]))
    tensor([[6.2500]])
    """
    s = scores(log_prob, theta, data)
    w = _weights(weights, data, s)
    return s.mT @ (w.unsqueeze(1) * s)


def negative_expected_hessian(
    log_prob: LogProb, theta: Params, data: Data, weights: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "P P"]:
    r"""Return definition 2: the expectation of minus the Hessian of the log-probability.

    .. math:: F(\theta) = -\mathbb{E}_{x}\left[\nabla^2_\theta \log p(x \mid \theta)\right]
              \approx -\frac1N \sum_{n=1}^N \nabla^2_\theta \log p(x_n \mid \theta)

    This is :eq:`eq-fisher-hessian` with the expectation replaced by a weighted sum over data. It
    equals definition 1 if the data follow the model (:eq:`eq-fisher-equal`). With observed
    data it is the *observed information*, which need not even be positive semi-definite.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``, twice
        differentiable.
    theta
        Parameters, ``[P]`` or a dict of tensors; a dict is flattened in its order.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.
    weights
        The probability of each observation, ``[N]``. By default all have ``1/N``.

    Returns
    -------
    Tensor
        ``[P, P]``, per observation, in nats per squared unit of the parameters.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> coin = lambda p, x: torch.distributions.Bernoulli(p).log_prob(x)
    >>> outcomes = torch.tensor([0.0, 1.0])
    >>> negative_expected_hessian(
    ...     coin, torch.tensor(0.2), outcomes, weights=torch.tensor([0.8, 0.2])
    ... )
    tensor([[6.2500]])
    """
    check_log_prob(log_prob, theta, data)
    flat, restore = ravel(theta)
    w = _weights(weights, data, flat)

    def expected_log_prob(vector: Tensor) -> Tensor:
        return w @ per_observation(log_prob, restore(vector), data)

    hessian: Tensor = jacrev(grad(expected_log_prob))(flat)
    return -hessian


def every_label(
    model: nn.Module, inputs: Any, likelihood: Likelihood = "categorical"
) -> tuple[tuple[Any, Tensor], Float[Tensor, " M"]]:
    r"""Pair every input with every label that the model thinks possible.

    .. math:: \mathbb{E}_{y \sim p(y \mid x, \theta)}[g(x, y)]
              = \sum_y p(y \mid x, \theta)\, g(x, y)

    The result turns the expectation over the model's own labels into a weighted sum over data,
    as :func:`score_covariance` and :func:`negative_expected_hessian` take it. Gaussian and
    Poisson targets are replaced by two values with the same mean and variance; the score is
    affine in the target, so the covariance of the score and the expected Hessian stay exact.

    Parameters
    ----------
    model
        The network whose output gives the probabilities; it is left as it was.
    inputs
        A batch of inputs, ``[N, ...]``.
    likelihood
        How to read the output, as in :func:`ewc_lib.likelihood.network_log_prob`.

    Returns
    -------
    data : tuple
        Inputs and labels, ``M = N K`` rows, where ``K`` is the number of labels of one input
        (the product over its positions, so keep sequences short).
    weights : Tensor
        ``[M]``, the probability of each label over ``N``; they sum to one.

    Examples
    --------
    >>> import torch
    >>> data, weights = every_label(torch.nn.Linear(3, 2), torch.zeros(5, 3))
    >>> data[1].shape, round(float(weights.sum()), 5)
    (torch.Size([10]), 1.0)
    """
    with untouched(model):
        output = forward(model, inputs).detach()
    values, probabilities = output_distribution(likelihood).outcomes(output)
    shape = values.shape[1:]
    n, positions = shape[0], shape[1:].numel()
    values, probabilities = (t.reshape(len(t), n, positions) for t in (values, probabilities))
    at = torch.arange(positions)
    labels, weights = [], []
    for choice in product(range(len(values)), repeat=positions):
        index = torch.tensor(choice)
        labels.append(values[index, :, at].mT.reshape(shape))
        weights.append(probabilities[index, :, at].prod(0) / n)
    k = len(labels)
    repeated = tree_map(lambda x: x.repeat(k, *[1] * (x.dim() - 1)), inputs)
    return (repeated, torch.cat(labels)), torch.cat(weights)


def _weights(weights: Tensor | None, data: Data, like: Tensor) -> Float[Tensor, " N"]:
    n = count(data)
    if weights is None:
        return like.new_full((n,), 1 / n)
    if weights.shape != (n,):
        raise ValueError(f"weights must have shape ({n},), got {tuple(weights.shape)}")
    return weights.to(like)
