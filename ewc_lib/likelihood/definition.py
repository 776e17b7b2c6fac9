r"""What a model says about data, and the parameters that say it best.

A model is a function ``log_prob(theta, x)`` that returns the log-probability (a scalar) of ONE
observation. ``theta`` is a vector ``[P]`` or a dict of tensors; ``data`` is a tensor
``[N, ...]`` or a tuple of tensors with ``N`` rows each. A network becomes such a function by
:func:`network_log_prob`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from ewc_lib._calling import forward
from ewc_lib._parameters import Data, Params, count, row, rows
from ewc_lib._restoring import evaluating
from ewc_lib._selecting import select_parameters
from ewc_lib.likelihood.any_distribution import validating
from ewc_lib.likelihood.outputs import Likelihood, output_distribution

__all__ = ["LogProb", "likelihood", "log_likelihood", "network_log_prob"]

LogProb: TypeAlias = Callable[[Any, Any], Tensor]
"""``log_prob(theta, observation)``: a differentiable scalar."""


def likelihood(log_prob: LogProb, theta: Params, data: Data) -> Float[Tensor, ""]:
    r"""Return the likelihood, the product over observations.

    .. math:: L(\theta \mid D) = \prod_{n=1}^N p(x_n \mid \theta)

    This is :eq:`eq-likelihood` as it stands. It underflows to zero after a few dozen observations
    in float32 and a few hundred in float64; :func:`log_likelihood` does not.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta
        Parameters, ``[P]`` or a dict of tensors.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.

    Returns
    -------
    Tensor
        A scalar. It is a probability where the data are discrete, else a density of ``N``
        observations, in units of one over the data's unit to the power of ``N``.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> coin = lambda p, x: torch.distributions.Bernoulli(p).log_prob(x)
    >>> likelihood(coin, torch.tensor(0.5), torch.tensor([1.0, 0.0, 1.0]))
    tensor(0.1250)
    """
    return log_probs(log_prob, theta, data).exp().prod()


def log_likelihood(log_prob: LogProb, theta: Params, data: Data) -> Float[Tensor, ""]:
    r"""Return the log-likelihood, the sum over observations.

    .. math:: \mathcal{L}(\theta \mid D) = \sum_{n=1}^N \log p(x_n \mid \theta)

    This is :eq:`eq-log-likelihood`.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta
        Parameters, ``[P]`` or a dict of tensors.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.

    Returns
    -------
    Tensor
        A scalar, in nats; differentiable in ``theta``.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, or if ``log_prob`` returns no scalar.

    Examples
    --------
    >>> import torch
    >>> coin = lambda p, x: torch.distributions.Bernoulli(p).log_prob(x)
    >>> log_likelihood(coin, torch.tensor(0.5), torch.tensor([1.0, 0.0, 1.0]))
    tensor(-2.0794)
    """
    return log_probs(log_prob, theta, data).sum()


def log_probs(log_prob: LogProb, theta: Params, data: Data) -> Float[Tensor, " N"]:
    """Return the log-probability of each observation."""
    check_log_prob(log_prob, theta, data)
    return per_observation(log_prob, theta, data)


def per_observation(function: LogProb, theta: Params, data: Data) -> Float[Tensor, "N ..."]:
    """Stack ``function(theta, x_n)`` over all observations: at once, or one by one."""
    with validating(False):  # vmap cannot follow it
        try:
            return vmap(function, in_dims=(None, 0))(theta, data)
        except RuntimeError:  # vmap cannot follow it; a mistake of the caller's own shows below
            return torch.stack([function(theta, observation) for observation in rows(data)])


def check_log_prob(log_prob: LogProb, theta: Params, data: Data) -> None:
    """Try ``log_prob`` on the first observation and raise a ValueError unless it is a scalar."""
    count(data)
    with validating(True):  # torch.compile switches it off for the whole process
        value = log_prob(theta, row(data, 0))
    if not isinstance(value, Tensor) or value.shape != ():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"log_prob must return a scalar for one observation, got {shape}")


def network_log_prob(
    model: nn.Module, likelihood: Likelihood = "categorical"
) -> tuple[LogProb, dict[str, Tensor]]:
    r"""Turn a network into a function ``log_prob(theta, (x, y))`` and its present parameters.

    .. math:: \log p(y \mid x, \theta) = \log p(y \mid f_\theta(x))

    This is :eq:`eq-network-likelihood`; its negative, averaged over observations, is the usual
    training loss (cross-entropy for a categorical target, half the squared error for a Gaussian
    one).

    Parameters
    ----------
    model
        Any module that maps a batch of inputs to a batch of outputs. It is run in eval mode and
        gets its own modes back.
    likelihood
        How to read the output: ``"categorical"`` (logits), ``"next-token"`` (logits of the next
        label), ``"bernoulli"`` (logits), ``"gaussian"`` (means), ``"poisson"`` (log rates), an
        object such as ``Gaussian(sigma=0.5)``, or a function from the output to a distribution
        of :mod:`torch.distributions`.

    Returns
    -------
    log_prob : callable
        ``log_prob(theta, (x, y)) -> scalar`` for ONE input and its target.
    theta : dict of Tensor
        A copy of the trainable parameters, by name.

    Raises
    ------
    ValueError
        If the model has no trainable parameter or the likelihood is unknown.

    Examples
    --------
    >>> import torch
    >>> log_prob, theta = network_log_prob(torch.nn.Linear(3, 2))
    >>> x, y = torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
    >>> loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, **theta), y)
    >>> torch.allclose(loss, -log_likelihood(log_prob, theta, (x, y)) / 5)
    True
    """
    distribution = output_distribution(likelihood)
    theta = {name: p.detach().clone() for name, p in select_parameters(model).items()}

    def log_prob(theta: dict[str, Tensor], observation: Any) -> Tensor:
        inputs, target = tree_map(lambda leaf: leaf.unsqueeze(0), observation)
        with evaluating(model):
            output = forward(model, inputs, theta)
        return distribution.log_prob(output, target).squeeze(0)

    return log_prob, theta
