r"""What a network's output says about its target: four output distributions.

Each class reads an output ``f(x)`` of shape ``[N, ...]`` as the natural parameter of a
distribution of the target ``y``. One entry of the first axis is one observation: its
log-probability is the sum over all its positions (the tokens of a sequence, the components of
a vector).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ewc_lib._arguments import check_choice

__all__ = ["Bernoulli", "Categorical", "Gaussian", "OutputDistribution", "Poisson"]


class OutputDistribution(ABC):
    """The distribution of a target given the output of a network."""

    @abstractmethod
    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        """Log-probability of each observation, summed over its positions."""

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one target for each observation."""

    @abstractmethod
    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        r"""Every value of one position and its probability, each ``[K, *target.shape]``.

        Where the values are infinitely many (Gaussian, Poisson) these are two values with the
        mean and the variance of the distribution. Scores of these families are affine in
        :math:`y`, so expectations of their products need nothing more.
        """

    @abstractmethod
    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        """Raise a ValueError that names the first bad observation, counted from ``first``."""

    def invalid(self, output: Tensor) -> Bool[Tensor, ...]:
        """Mark the entries of an output that no distribution has."""
        return ~output.isfinite()

    def mask(self, target: Tensor) -> Bool[Tensor, ...] | None:
        """Mark the positions that count, or None if all do."""
        return None


def _per_observation(values: Tensor) -> Float[Tensor, " N"]:
    return values.reshape(len(values), -1).sum(1)


def _precise(output: Tensor) -> Tensor:
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _uniform(like: Tensor, generator: torch.Generator | None, shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device, dtype=torch.float64)


def _first_bad(bad: Tensor, first: int) -> int:
    return first + int(bad.reshape(len(bad), -1).any(1).nonzero()[0])


@dataclass(frozen=True)
class Categorical(OutputDistribution):
    r"""A class label; the output holds its logits on the last axis.

    .. math:: \log p(y \mid x) = f_y(x) - \log \sum_c e^{f_c(x)}

    Parameters
    ----------
    ignore_index
        Positions with this label do not count. The default is that of
        :func:`torch.nn.functional.cross_entropy`.

    Notes
    -----
    Output ``[N, C]`` with target ``[N]``, or ``[N, T, C]`` with ``[N, T]`` for sequences, which
    sum over their tokens. Logits of minus infinity (classes that are masked out) are allowed.

    Examples
    --------
    >>> import torch
    >>> Categorical().log_prob(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """

    ignore_index: int = -100

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        ignored = ~self.mask(target)
        label = _wide(target).masked_fill(ignored, 0).unsqueeze(-1)
        log_p = _precise(output).log_softmax(-1).gather(-1, label).squeeze(-1)
        return _per_observation(log_p.masked_fill(ignored, 0))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        cumulative = output.double().softmax(-1).cumsum(-1)
        u = _uniform(output, generator, output.shape[:-1]).unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, u, right=True).squeeze(-1)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        p = _precise(output).softmax(-1).movedim(-1, 0)
        labels = torch.arange(len(p), device=p.device).reshape(-1, *[1] * (p.dim() - 1))
        return labels.expand(p.shape), p

    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        if output.dim() < 2 or target.shape != output.shape[:-1]:
            raise ValueError(
                "a categorical output must be [N, ..., classes] and its target [N, ...], "
                f"got {tuple(output.shape)} and {tuple(target.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"class labels must be integers, got {target.dtype}")
        target, n_classes = _wide(target), output.shape[-1]
        bad = ((target < 0) | (target >= n_classes)) & self.mask(target)
        if bad.any():
            raise ValueError(
                f"label {int(target[bad][0])} of observation {_first_bad(bad, first)} is outside "
                f"the {n_classes} classes of the output"
            )

    def invalid(self, output: Tensor) -> Bool[Tensor, ...]:
        impossible = output.isneginf().all(-1, keepdim=True)
        return output.isnan() | output.isposinf() | impossible

    def mask(self, target: Tensor) -> Bool[Tensor, ...]:
        return _wide(target) != self.ignore_index


def _wide(labels: Tensor) -> Tensor:
    """Turn narrow integers into int64: in uint8 -100 is 156, and in int8 200 is -56."""
    return labels if labels.is_floating_point() else labels.long()


class _Elementwise(OutputDistribution):
    """One output, one target: all positions are independent."""

    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        if target.shape != output.shape:
            raise ValueError(
                f"a {type(self).__name__} target must have the shape of the output, "
                f"got {tuple(target.shape)} and {tuple(output.shape)}"
            )
        bad = self._outside_support(target)
        if bad.any():
            raise ValueError(
                f"target {target[bad][0].item():g} of observation {_first_bad(bad, first)} is "
                f"outside the support of a {type(self).__name__}: {self._support}"
            )

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
        output = _precise(output)
        return _per_observation(target * output - F.softplus(output))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = _uniform(output, generator, output.shape)
        return (u < output.double().sigmoid()).to(output.dtype)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        p = _precise(output).sigmoid()
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
        z = (target - _precise(output)) / self.sigma
        return _per_observation(-z.square() / 2 - math.log(self.sigma * math.sqrt(2 * math.pi)))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # the inverse distribution function, because the values of torch.randn depend on its size
        tiny = torch.finfo(torch.float64).tiny
        u = _uniform(output, generator, output.shape).clamp_min(tiny)
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
        output = _precise(output)
        target = target.to(output.dtype)
        return _per_observation(target * output - output.exp() - torch.lgamma(target + 1))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(output.double().exp(), generator=generator).to(output.dtype)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        rate = _precise(output).exp()
        return _two_points(rate, rate.sqrt())

    def _outside_support(self, target: Tensor) -> Tensor:
        return ~target.isfinite() | (target < 0) | (target != target.floor())


_BY_NAME: dict[str, OutputDistribution] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "poisson": Poisson(),
}


def output_distribution(likelihood: str | OutputDistribution) -> OutputDistribution:
    """Return the output distribution of that name, or the one that was given."""
    if isinstance(likelihood, OutputDistribution):
        return likelihood
    check_choice(
        "likelihood", likelihood, _BY_NAME, " or an output distribution such as Gaussian(sigma=0.5)"
    )
    return _BY_NAME[likelihood]
