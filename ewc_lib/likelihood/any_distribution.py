r"""Any distribution of :mod:`torch.distributions` as the distribution of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from ewc_lib.likelihood.base import OutputDistribution, per_observation_sum, precise


@dataclass(frozen=True)
class TorchDistribution(OutputDistribution):
    r"""A target with any distribution whose parameters are functions of the output.

    .. math:: \log p(y \mid x) = \log p(y \mid h(f(x)))

    The function ``make`` computes the parameters :math:`h(f(x))` and returns the distribution. It
    is a likelihood by itself: ``likelihood=lambda f: Gamma(f[:, 0].exp(), 1.0)`` means this
    class.

    The kinds ``"sampled"`` and ``"empirical"`` need nothing but ``sample`` and ``log_prob`` of the
    distribution. ``"exact"`` and ``"sketch"`` differentiate its Kullback-Leibler divergence twice;
    :func:`ewc_lib.fisher.divergence.information` says where that is known.

    Parameters
    ----------
    make
        From an output ``[N, ...]`` to a distribution whose ``batch_shape + event_shape`` is the
        shape of the target, ``N`` first. It must not mix observations.

    Notes
    -----
    Distributions of PyTorch draw from the global random state. :meth:`sample` seeds it for every
    observation from the generator, and gives it back as it was.

    Examples
    --------
    >>> import torch
    >>> from torch.distributions import Normal
    >>> learned_variance = TorchDistribution(lambda f: Normal(f[:, 0], f[:, 1].exp()))
    >>> learned_variance.log_prob(torch.zeros(1, 2), torch.zeros(1))
    tensor([-0.9189])
    """

    make: Callable[[Tensor], Distribution]

    def log_prob(self, output: Tensor, target: Tensor) -> Float[Tensor, " N"]:
        return per_observation_sum(self.of(precise(output)).log_prob(target))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        device, n = output.device, len(output)
        seeds = torch.randint(2**62, (n,), generator=generator, device=device).tolist()
        with _global_source(device) as source, torch.no_grad():
            draws = []
            for row, seed in zip(precise(output).split(1), seeds, strict=True):
                source.manual_seed(seed)
                draws.append(self.of(row).sample())
        return torch.cat(draws)

    def outcomes(self, output: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.of(precise(output))
        if not distribution.has_enumerate_support or distribution.event_shape:
            raise TypeError(f"the values of a {_name(distribution)} cannot be listed")
        values = distribution.enumerate_support()
        return values, distribution.log_prob(values).exp()

    def check(self, output: Tensor, target: Tensor, first: int = 0) -> None:
        with torch.no_grad(), validating(True):
            if self._problem(output, target) is None:
                self._check_apart(output, target)
                return
            for n, pair in enumerate(zip(output.split(1), target.split(1), strict=True)):
                if problem := self._problem(*pair):
                    raise ValueError(f"observation {first + n}: {problem}")
        raise ValueError(
            "the function that makes the distribution mixes observations: together they have "
            f"none ({self._problem(output, target)}), but each of them has one by itself"
        )

    def _check_apart(self, output: Tensor, target: Tensor) -> None:
        """Raise a ValueError if a half of the observations has another probability alone."""
        together = self.log_prob(output, target)[::2]
        alone = self.log_prob(output[::2], target[::2])
        if not torch.allclose(alone, together, rtol=torch.finfo(alone.dtype).eps ** 0.5):
            raise ValueError(
                "the function that makes the distribution mixes observations: their probability "
                "is another without the rest of the batch"
            )

    def of(self, output: Tensor) -> Distribution:
        """Return the distribution of all targets of a batch."""
        distribution = self.make(output)
        if not isinstance(distribution, Distribution):
            raise TypeError(
                "a function as the likelihood must return a distribution of torch.distributions, "
                f"got {type(distribution).__name__}"
            )
        return distribution

    def _problem(self, output: Tensor, target: Tensor) -> str | None:
        """Say what is wrong with a target, if anything is."""
        try:
            distribution = self.of(precise(output))
            shape = distribution.batch_shape + distribution.event_shape
            if target.shape != shape:
                return (
                    f"a target of shape {tuple(target.shape)} is not one of the "
                    f"{_name(distribution)}, whose batch_shape + event_shape is {tuple(shape)}"
                )
            log_p = distribution.log_prob(target)
        except ValueError as error:
            return str(error)
        if not log_p.isfinite().all():
            return f"the {_name(distribution)} gives its target no finite log-probability"
        return None


def _name(distribution: Distribution) -> str:
    return type(distribution).__name__


@contextmanager
def _global_source(device: torch.device) -> Iterator[torch.Generator]:
    """Lend the global generator of a device and bring it back to where it was."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield torch.default_generator
        return
    with torch.random.fork_rng(devices=[device]):
        index = torch.cuda.current_device() if device.index is None else device.index
        yield torch.cuda.default_generators[index]


@contextmanager
def validating(wanted: bool) -> Iterator[None]:
    """Switch the value checks of torch.distributions on or off, and back."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(wanted)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
