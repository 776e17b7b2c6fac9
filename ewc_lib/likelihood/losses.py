r"""Whether a loss is the negative log-likelihood of a named distribution.

.. math:: \ell = c_1 \Big(c_0 - \sum_n \log p(y_n \mid f(x_n))\Big)

with constants from a list: sums and means of several kinds, squared errors, and densities without
their constant factors. Nothing is fitted. Where the derivative of the loss in the output is
known, it has to agree as well, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.likelihood.base import OutputDistribution
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    Poisson,
    TorchDistribution,
)

HALF = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Loss:
    """What somebody's loss says of one batch.

    Attributes
    ----------
    value
        The number, or several that are summed.
    gradient
        Its derivative in the output, if that is known.
    whose
        Who computed it, in words.
    way_out
        What to do if it is not the loss that counts, in words.
    any_constant
        Whether a difference that does not depend on the output is of no interest.
    """

    value: Tensor
    gradient: Float[Tensor, "N ..."] | None
    whose: str
    way_out: str
    any_constant: bool = False


def candidates(output: Tensor, ignore_index: int = -100) -> dict[str, OutputDistribution]:
    """Return the distributions that a loss is compared with, by what one writes to name them."""
    by_name: dict[str, OutputDistribution] = {
        "'categorical'": Categorical(ignore_index),
        "'next-token'": Categorical(ignore_index, next_token=True),
        "'gaussian'": Gaussian(),
        "'bernoulli'": Bernoulli(),
        "'poisson'": Poisson(),
    }
    if output.dim() > 2:
        by_name["Categorical(class_dim=1)"] = Categorical(ignore_index, class_dim=1)
    return by_name


@dataclass(frozen=True)
class Comparison:
    """One distribution beside a loss.

    Attributes
    ----------
    distribution
        The distribution.
    agrees
        Whether the loss is one of its negative log-likelihoods.
    told
        The numbers of the distribution, or why it has none, in words.
    possible
        Whether it has any.
    distance
        How far the value is from that of the loss, whichever way it is summed.
    """

    distribution: OutputDistribution
    agrees: bool
    told: str
    possible: bool = True
    distance: float = math.inf


def compare(
    loss: Loss, distribution: OutputDistribution, output: Float[Tensor, "N ..."], target: Tensor
) -> Comparison:
    """Compare the loss of a batch with the negative log-likelihood of its targets."""
    try:
        distribution.check(output, target)
    except (TypeError, ValueError) as error:
        return Comparison(distribution, False, str(error), possible=False)
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        total = -distribution.log_prob(output, target).sum()
    (slope,) = torch.autograd.grad(total, output)
    total = total.detach()
    means = _means(distribution, output, target)
    told = ", ".join(f"{what} {float(total * factor):.6g}" for what, factor in means.items())
    for scale, constant, mean in product(
        _scales(distribution), _constants(distribution, target), means.values()
    ):
        value = (total - constant) * (scale * mean)
        if _same_value(loss, value, output) and _same_slope(loss, slope, scale * mean):
            return Comparison(distribution, True, told)
    found = float(loss.value.detach().sum())
    distance = min(abs(found - float(total * factor)) for factor in means.values())
    return Comparison(distribution, False, told, distance=distance)


def _means(distribution: OutputDistribution, output: Tensor, target: Tensor) -> dict[str, float]:
    mask = distribution.mask(target)
    n_labels = target.numel() if mask is None else int(mask.sum())
    return {
        "sum": 1.0,
        "mean over observations": 1 / len(output),
        "mean over labels": 1 / max(1, n_labels),
    }


def _scales(distribution: OutputDistribution) -> list[float]:
    if isinstance(distribution, Gaussian):  # squared errors and their halves know no sigma
        return [1.0, distribution.sigma**2, 2 * distribution.sigma**2]
    return [1.0]


def _constants(distribution: OutputDistribution, target: Tensor) -> Iterator[float]:
    """Yield what the negative logarithm of a density holds beside what depends on the output."""
    yield 0.0
    if isinstance(distribution, Gaussian):
        yield target.numel() * math.log(distribution.sigma * math.sqrt(2 * math.pi))
    elif isinstance(distribution, TorchDistribution):
        yield target.numel() * math.log(math.sqrt(2 * math.pi))
    elif isinstance(distribution, Poisson):
        yield float(torch.lgamma(target.double() + 1).sum())


def _precision(*tensors: Tensor) -> tuple[float, bool]:
    """Return the unit of rounding of a comparison, and whether it is one of half precision."""
    dtypes = {tensor.dtype for tensor in tensors}
    return max(torch.finfo(dtype).eps for dtype in dtypes), bool(dtypes & set(HALF))


def _same_value(loss: Loss, value: Tensor, output: Tensor) -> bool:
    if loss.any_constant and loss.gradient is not None:
        return True
    found, expected = float(loss.value.detach().sum()), float(value)
    size = max(abs(found), abs(expected))
    eps, half = _precision(loss.value, value)
    if half:
        return abs(found - expected) <= 4 * eps * size
    finite = output.detach()[output.isfinite()]  # what the logarithm of a sum cancels
    cancelled = float(finite.abs().max()) if finite.numel() else 0.0
    return abs(found - expected) <= 64 * eps * (size + cancelled)


def _same_slope(loss: Loss, slope: Tensor, factor: float) -> bool:
    if loss.gradient is None:
        return True
    if loss.gradient.shape != slope.shape:
        return False
    eps, half = _precision(loss.value, loss.gradient, slope)
    found, expected = loss.gradient.to(slope) / factor, slope
    size = float(torch.maximum(found.abs(), expected.abs()).max()) if slope.numel() else 0.0
    return bool(((found - expected).abs() <= (4 if half else 64) * eps * (size + 1)).all())
