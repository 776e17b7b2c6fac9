r"""What a model says about data, and the parameters that say it best.

A model is a function ``log_prob(theta, x)`` that returns the log-probability (a scalar) of ONE
observation. ``theta`` is a vector ``[P]`` or a dict of tensors; ``data`` is a tensor
``[N, ...]`` or a tuple of tensors with ``N`` rows each. A network becomes such a function by
:func:`network_log_prob`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap
from torch.utils._pytree import tree_map

from ewc_lib._model import evaluating, forward, select_parameters
from ewc_lib._optimum import FOUND, OUTSIDE, find_maximum
from ewc_lib._parameters import Data, Params, count, ravel, row, rows
from ewc_lib.distributions import (
    Bernoulli,
    Categorical,
    Gaussian,
    OutputDistribution,
    Poisson,
    output_distribution,
)

__all__ = [
    "MLE",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "LogProb",
    "Poisson",
    "likelihood",
    "log_likelihood",
    "maximum_likelihood",
    "network_log_prob",
]

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
    with _validation(False):  # vmap cannot follow it
        try:
            return vmap(function, in_dims=(None, 0))(theta, data)
        except RuntimeError:  # vmap cannot follow it; a mistake of the caller's own shows below
            return torch.stack([function(theta, observation) for observation in rows(data)])


def check_log_prob(log_prob: LogProb, theta: Params, data: Data) -> None:
    """Try ``log_prob`` on the first observation and raise a ValueError unless it is a scalar."""
    count(data)
    with _validation(True):  # torch.compile switches it off for the whole process
        value = log_prob(theta, row(data, 0))
    if not isinstance(value, Tensor) or value.shape != ():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"log_prob must return a scalar for one observation, got {shape}")


@contextmanager
def _validation(wanted: bool) -> Iterator[None]:
    """Switch the value checks of torch.distributions on or off, and back."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(wanted)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@dataclass(frozen=True)
class MLE:
    r"""A maximum-likelihood estimate, :eq:`eq-mle`, and what is known of it.

    Attributes
    ----------
    estimate
        The maximiser, in the form of ``theta0``; the last iterate if the limit of iterations was
        hit; NaN if the search ended elsewhere, as it does if the likelihood has no maximum.
    converged
        Whether a maximum was found.
    iterations
        Iterations of L-BFGS.
    standard_errors
        Square roots of the diagonal of the inverse observed information, in the form of
        ``theta0`` and the units of the parameters. Infinite in directions about which the data
        say nothing; NaN if no maximum was found.
    message
        What happened, in one sentence.
    """

    estimate: Params
    converged: bool
    iterations: int
    standard_errors: Params
    message: str


def maximum_likelihood(
    log_prob: LogProb, theta0: Params, data: Data, *, max_iter: int = 500
) -> MLE:
    r"""Maximise the likelihood by L-BFGS, and say honestly whether that worked.

    .. math:: \hat\theta = \arg\max_\theta \mathcal{L}(\theta \mid D)

    This is :eq:`eq-mle`. L-BFGS with strong Wolfe conditions (Nocedal and Wright 2006,
    algorithms 7.5 and 3.5) maximises the mean log-likelihood; one Newton step then removes the
    error that rounding leaves in a line search. The estimate counts as a maximum if the *next*
    Newton step is negligible. That test does not depend on the scale of the data, and it does
    not take a gradient that only fades away, as on separable data, for a maximum.

    Parameters
    ----------
    log_prob
        Log-probability of one observation, ``log_prob(theta, x) -> scalar``.
    theta0
        Where to start, ``[P]`` or a dict of tensors; its dtype is that of the computation.
    data
        Observations, ``[N, ...]`` or a tuple of such tensors.
    max_iter
        Most iterations of L-BFGS. Smooth problems of a few parameters need 10 to 50.

    Returns
    -------
    MLE
        Estimate, whether it converged, iterations, standard errors and a message.

    Raises
    ------
    ValueError
        If the data are empty or of unequal lengths, if ``log_prob`` returns no scalar, or if
        the log-likelihood is not finite at ``theta0``.

    Warns
    -----
    RuntimeWarning
        If no maximum was found, or if it is not unique.

    Notes
    -----
    The Hessian ``[P, P]`` is formed, so this is for models of up to a few thousand parameters.

    Examples
    --------
    >>> import torch
    >>> def coin(logit, x):
    ...     return torch.distributions.Bernoulli(logits=logit).log_prob(x)
    >>> fit = maximum_likelihood(coin, torch.zeros(()), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    >>> fit.converged, fit.estimate.sigmoid()
    (True, tensor(0.7500))
    """
    flat, restore = ravel(tree_map(torch.detach, theta0))
    n = count(data)
    check_log_prob(log_prob, theta0, data)

    def mean_log_likelihood(vector: Tensor) -> Tensor:
        return per_observation(log_prob, restore(vector), data).sum() / n

    if not mean_log_likelihood(flat).isfinite():
        raise ValueError("the log-likelihood is not finite at theta0; start inside its domain")
    search = find_maximum(mean_log_likelihood, flat, max_iter)
    estimate = restore(search.point.theta)
    try:
        check_log_prob(log_prob, estimate, data)
    except ValueError:  # torch.distributions clamps what vmap did not let it check
        search = search._replace(converged=False, message=OUTSIDE)
    if search.message != FOUND:
        warnings.warn(search.message, RuntimeWarning, stacklevel=2)
    undefined = restore(torch.full_like(flat, torch.nan))
    errors = restore(search.point.standard_errors(n)) if search.converged else undefined
    return MLE(
        estimate=estimate if search.usable else undefined,
        converged=search.converged,
        iterations=search.iterations,
        standard_errors=errors,
        message=search.message,
    )


def network_log_prob(
    model: nn.Module, likelihood: str | OutputDistribution = "categorical"
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
        How to read the output: ``"categorical"`` (logits), ``"bernoulli"`` (logits),
        ``"gaussian"`` (means), ``"poisson"`` (log rates), or an object such as
        ``Gaussian(sigma=0.5)``.

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
