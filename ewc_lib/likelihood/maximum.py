"""The parameters that say it best: a maximum that is found, not unique, or not there at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad, jacrev
from torch.utils._pytree import tree_map

from ewc_lib._parameters import Data, Params, count, ravel
from ewc_lib.likelihood.definition import LogProb, check_log_prob, per_observation

__all__ = ["MLE", "maximum_likelihood"]

Objective: TypeAlias = Callable[[Tensor], Tensor]

FOUND = "found a maximum"
NOT_UNIQUE = (
    "found a maximum, but it is not unique: the data say nothing about some direction of theta"
)
NO_MAXIMUM = (
    "the likelihood has no maximum: it keeps rising while theta grows without bound, as on "
    "separable data"
)
NOT_FINITE = "the search ran to parameters where the log-likelihood is not finite"
OUTSIDE = (
    "the search left the domain of the model: its likelihood has no maximum inside, or a "
    "parameter without bounds is needed (a logit for a probability, a log for a scale)"
)


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


def _stopped(iterations: int, max_iter: int) -> str:
    limit = f"the limit of {max_iter}" if iterations >= max_iter else f"{iterations}"
    return f"no maximum was reached after {limit} iterations of L-BFGS"


def _lbfgs(objective: Objective, start: Tensor, max_iter: int) -> tuple[Tensor, int]:
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=max_iter,
        max_eval=2 * max_iter + 100,
        tolerance_grad=torch.finfo(theta.dtype).eps ** 0.6,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -objective(theta)
        (theta.grad,) = torch.autograd.grad(loss, theta)
        if not loss.isfinite():  # outside the domain: a wall, from which the line search steps back
            theta.grad = torch.zeros_like(theta)
            loss = torch.full_like(loss, torch.finfo(loss.dtype).max ** 0.25)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return theta.detach(), int(optimizer.state[theta]["n_iter"])


def _tolerance(theta: Tensor) -> float:
    return float(torch.finfo(theta.dtype).eps ** 0.5)


class Search(NamedTuple):
    """Where a search ended, and what that means."""

    point: Optimum
    iterations: int
    converged: bool
    message: str

    @property
    def usable(self) -> bool:
        """Whether the end is a maximum or on the way to one."""
        return self.converged or self.message == _stopped(self.iterations, self.iterations)


def find_maximum(objective: Objective, start: Float[Tensor, " P"], max_iter: int) -> Search:
    """Climb by L-BFGS, take one Newton step, and judge by the next one."""
    theta, iterations = _lbfgs(objective, start, max_iter)
    point = Optimum.at(objective, theta)
    finished = Optimum.at(objective, theta + point.newton_step)
    if finished.value >= point.value - _tolerance(theta) * (1 + point.value.abs()):
        point = finished
    converged, message = point.verdict(iterations, max_iter)
    if message == NOT_UNIQUE and _levels_off(objective, start, point):
        converged, message = False, NO_MAXIMUM
    return Search(point, iterations, converged, message)


@dataclass(frozen=True)
class Optimum:
    """A candidate maximum, with the eigenvectors of the information there."""

    theta: Float[Tensor, " P"]
    value: Float[Tensor, ""]
    gradient: Float[Tensor, " P"]
    curvatures: Float[Tensor, " P"]
    directions: Float[Tensor, "P P"]

    @classmethod
    def at(cls, objective: Objective, theta: Tensor) -> Optimum:
        gradient = grad(objective)(theta)
        information = -jacrev(grad(objective))(theta)
        if information.isfinite().all():
            curvatures, directions = torch.linalg.eigh(information)
        else:
            directions = information
            curvatures = torch.full_like(theta, torch.nan)
        return cls(theta, objective(theta), gradient, curvatures, directions)

    @property
    def informed(self) -> Tensor:
        """Mark the directions about which the data say something."""
        floor = len(self.theta) * torch.finfo(self.theta.dtype).eps
        return self.curvatures.abs() > floor * self.curvatures.abs().max()

    @property
    def newton_step(self) -> Float[Tensor, " P"]:
        along = self.directions.mT @ self.gradient / self.curvatures
        return self.directions @ along.where(self.informed, torch.zeros_like(along))

    def standard_errors(self, n: int) -> Float[Tensor, " P"]:
        weights = self.directions.square()
        variance = weights[:, self.informed] @ (1 / (n * self.curvatures[self.informed]))
        blind = weights[:, ~self.informed].sum(1) > _tolerance(self.theta)
        return variance.sqrt().masked_fill(blind, torch.inf)

    def verdict(self, iterations: int, max_iter: int) -> tuple[bool, str]:
        small = _tolerance(self.theta)
        if not (self.value.isfinite() and self.curvatures.isfinite().all()):
            return False, NOT_FINITE
        settled = self.newton_step.norm() <= small * (1 + self.theta.norm())
        if settled and (self.curvatures[self.informed] > 0).all():
            return True, FOUND if self.informed.all() else NOT_UNIQUE
        if self.gradient.norm() <= small * (1 + self.value.abs()):
            return False, NO_MAXIMUM
        return False, _stopped(iterations, max_iter)


def _levels_off(objective: Objective, start: Tensor, point: Optimum) -> Bool[Tensor, ""]:
    """Tell a likelihood that rises without end from one that is flat in some direction.

    Where the data say nothing, the first goes on as it is or rises, and falls on the way back.
    """
    blind = point.directions[:, ~point.informed]
    away = blind @ (blind.mT @ (point.theta - start))
    step = (1 + point.theta.abs().max()) * away / away.abs().max()
    level = point.value - _tolerance(start) * (1 + point.value.abs())
    return (objective(point.theta + step) >= level) & (objective(point.theta - step) < level)
