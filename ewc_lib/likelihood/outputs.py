r"""What a network's output says about its target: the families with a name.

Each class reads an output ``f(x)`` of shape ``[N, ...]`` as the natural parameter of a
distribution of the target ``y``. One entry of the first axis is one observation: its
log-probability is the sum over all its positions (the tokens of a sequence, the components of
a vector).
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from ewc_lib._arguments import check_choice
from ewc_lib._checking import Problem, settle
from ewc_lib.likelihood.any_distribution import TorchDistribution
from ewc_lib.likelihood.base import (
    OutputDistribution,
    check_real,
    first_bad,
    per_observation_sum,
    precise,
    uniform,
)
from ewc_lib.likelihood.categorical import Categorical

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "OutputDistribution",
    "Poisson",
    "TorchDistribution",
]

Likelihood: TypeAlias = str | OutputDistribution | Callable[[Tensor], Distribution]
"""How to read an output: a name, an output distribution, or a function to one of PyTorch's."""


class _Elementwise(OutputDistribution):
    """One output, one target: all positions are independent."""

    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        settle(self.problems(output, target, first))

    def problems(self, output: Tensor, target: Tensor, first: int = 0) -> list[Problem]:
        check_real(output, self)
        if target.shape != output.shape:
            raise ValueError(
                f"a {type(self).__name__} target must have the shape of the output, "
                f"got {tuple(target.shape)} and {tuple(output.shape)}"
            )
        bad = self._outside_support(target)

        def explain() -> None:
            raise ValueError(
                f"target {target[bad][0].item():g} of observation {first_bad(bad, first)} is "
                f"outside the support of a {type(self).__name__}: {self._support}"
            )

        return [Problem(bad.any(), explain)]

    _support = ""

    @abstractmethod
    def _outside_support(self, target: Tensor) -> Tensor: ...


def _two_points(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.stack([mean - deviation, mean + deviation])
    return values, torch.full_like(values, 0.5)


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    r"""A binary target; the output is the logit of its probability.

    .. math:: \log p(y \mid x) = y f(x) - \log(1 + e^{f(x)})

    Examples
    --------
    >>> import torch
    >>> Bernoulli().log_prob(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])).exp()
    tensor([0.5000, 0.5000])
    """

    _support = "0 or 1"

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        output = precise(output)
        return per_observation_sum(target * output - F.softplus(output))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = uniform(output, generator, output.shape)
        return (u < output.double().sigmoid()).to(output.dtype)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        p = precise(output).sigmoid()
        return torch.stack([torch.zeros_like(p), torch.ones_like(p)]), torch.stack([1 - p, p])

    def _outside_support(self, target: Tensor) -> Tensor:
        return (target != 0) & (target != 1)


@dataclass(frozen=True)
class Gaussian(_Elementwise):
    r"""A real target; the output is its mean, and the noise has a known size.

    .. math:: \log p(y \mid x) = -\tfrac{1}{2\sigma^2} (y - f(x))^2 - \log(\sigma \sqrt{2\pi})

    Parameters
    ----------
    sigma
        Standard deviation of the noise, in units of the target. With the default 1 the negative
        log-likelihood is half the squared error.

    Raises
    ------
    ValueError
        If ``sigma`` is not positive.

    Examples
    --------
    >>> import torch
    >>> Gaussian(sigma=2.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
    tensor([-1.6121])
    """

    sigma: float = 1.0

    _support = "finite real numbers"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {self.sigma}")

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        z = (target - precise(output)) / self.sigma
        return per_observation_sum(-z.square() / 2 - math.log(self.sigma * math.sqrt(2 * math.pi)))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # the inverse distribution function, because the values of torch.randn depend on its size
        tiny = torch.finfo(torch.float64).tiny
        u = uniform(output, generator, output.shape).clamp_min(tiny)
        noise: Tensor = self.sigma * torch.special.ndtri(u)
        return output + noise.to(output.dtype)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return _two_points(output, torch.full_like(output, self.sigma))

    def _outside_support(self, target: Tensor) -> Tensor:
        return ~target.isfinite()


@dataclass(frozen=True)
class Poisson(_Elementwise):
    r"""A count; the output is the logarithm of its rate.

    .. math:: \log p(y \mid x) = y f(x) - e^{f(x)} - \log y!

    Examples
    --------
    >>> import torch
    >>> Poisson().log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
    tensor([-1.])
    """

    _support = "0, 1, 2, ..."

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        output = precise(output)
        target = target.to(output.dtype)
        return per_observation_sum(target * output - output.exp() - torch.lgamma(target + 1))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(output.double().exp(), generator=generator).to(output.dtype)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        rate = precise(output).exp()
        return _two_points(rate, rate.sqrt())

    def _outside_support(self, target: Tensor) -> Tensor:
        return ~target.isfinite() | (target < 0) | (target != target.floor())


_BY_NAME: dict[str, OutputDistribution] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "poisson": Poisson(),
    "next-token": Categorical(next_token=True),
}


def given_distribution(likelihood: Likelihood | None) -> OutputDistribution | None:
    """Return the output distribution, if there is one."""
    return None if likelihood is None else output_distribution(likelihood)


def output_distribution(likelihood: Likelihood) -> OutputDistribution:
    """Return the output distribution of that name, or the one that was given."""
    if isinstance(likelihood, OutputDistribution):
        return likelihood
    is_loss = isinstance(likelihood, torch.nn.Module) or (
        getattr(likelihood, "__module__", None) == F.__name__
    )
    if callable(likelihood) and not isinstance(likelihood, type) and not is_loss:
        return TorchDistribution(likelihood)
    check_choice(
        "likelihood",
        likelihood,
        _BY_NAME,
        ", an output distribution such as Gaussian(sigma=0.5), or a function from the output to a "
        "distribution of torch.distributions",
    )
    return _BY_NAME[str(likelihood)]


def in_words(distribution: OutputDistribution) -> str:
    """Say which output distribution it is, in the same words in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(distribution))


def in_words_if_given(likelihood: Likelihood | None) -> dict[str, str]:
    """Return a setting that a state notes, or nothing if the likelihood is left to the data."""
    return {} if likelihood is None else {"likelihood": in_words(output_distribution(likelihood))}
