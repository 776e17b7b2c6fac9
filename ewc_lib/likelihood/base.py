"""What every output distribution can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ewc_lib._checking import Problem


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
        :math:`y`, so expectations of their products need nothing more. Where they cannot be
        listed at all, as for most functions to a distribution of PyTorch, a TypeError says so.
        """

    @abstractmethod
    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        """Raise a ValueError that names the first bad observation, counted from ``first``."""

    def problems(self, output: Tensor, target: Tensor, first: int = 0) -> list[Problem]:
        """Return what may be wrong with a target, to be settled together with other problems.

        What shapes and types show raises a ValueError at once.
        """
        self.check(output, target, first)
        return []

    def invalid(self, output: Tensor) -> Bool[Tensor, ...]:
        """Mark the entries of an output that no distribution has."""
        return ~output.isfinite()

    def mask(self, target: Tensor) -> Bool[Tensor, ...] | None:
        """Mark the positions of the output that count, or None if all do."""
        return None


def per_observation_sum(values: Tensor) -> Float[Tensor, " N"]:
    """Sum over all axes but the first."""
    return values.reshape(len(values), -1).sum(1)


def check_real(output: Tensor, distribution: OutputDistribution) -> None:
    """Raise a ValueError if an output is complex."""
    if output.is_complex():
        raise ValueError(
            f"the output of the model is {output.dtype}, and a {type(distribution).__name__} is "
            "about real numbers: let it return such, as torch.view_as_real(output)"
        )


def precise(output: Tensor) -> Tensor:
    """Bring half precision to single."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def uniform(like: Tensor, generator: torch.Generator | None, shape: torch.Size) -> Tensor:
    """Draw from the unit interval, observation after observation."""
    return torch.rand(shape, generator=generator, device=like.device, dtype=torch.float64)


def first_bad(bad: Tensor, first: int) -> int:
    """Return the number of the first observation that is marked, counted from ``first``."""
    return first + int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
