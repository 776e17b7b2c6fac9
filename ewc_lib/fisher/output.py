r"""Columns of a root of the Fisher information of the output distribution.

With the Fisher information :math:`H` of the output distribution at :math:`f(x)`, any root
:math:`S S^\top = H` turns the Fisher information of the network into a sum of squares,
:math:`F = \mathbb{E}_x \sum_k (J^\top s_k)(J^\top s_k)^\top`: one backward pass for each column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import singledispatch
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.fisher.divergence import Curvature
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    OutputDistribution,
    Poisson,
    TorchDistribution,
)
from ewc_lib.score.network import output_score

Kind: TypeAlias = Literal["exact", "sketch", "sampled", "empirical"]
KINDS: tuple[str, ...] = get_args(Kind)

MAX_EXACT_COLUMNS = 1024
"""More columns than this cost more backward passes than anyone means to pay."""

Column: TypeAlias = Float[Tensor, "N ..."]


def columns(
    kind: Kind,
    distribution: OutputDistribution,
    output: Float[Tensor, "N ..."],
    target: Tensor,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Column]:
    """Yield the columns of a root, each in the shape of the output.

    ``exact`` yields all of them, ``sketch`` and ``sampled`` yield ``draws`` random ones whose
    outer product is right on average, ``empirical`` yields the score of the observed target.
    """
    if isinstance(distribution, Categorical) and (axis := distribution.class_dim) is not None:
        distribution = replace(distribution, class_dim=None)
        found = columns(kind, distribution, output.movedim(axis, -1), target, draws, generator)
        return (column.movedim(-1, axis) for column in found)
    if kind == "exact":
        return exact(distribution, output, target)
    if kind == "sketch":
        return sketch(distribution, output, target, draws, generator)
    if kind == "sampled":
        return sampled(distribution, output, target, draws, generator)
    return iter([output_score(distribution, output, target)])


def sampled(
    distribution: OutputDistribution,
    output: Tensor,
    target: Tensor,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Column]:
    """Score of a target drawn from the model itself."""
    mask = distribution.mask(target)
    if isinstance(distribution, Categorical):  # what was drawn always counts
        distribution = replace(distribution, ignore_index=-100)
    label = distribution.sample(_repeat(output, draws), generator)
    for draw in _unrepeat(label, draws):
        yield _masked(output_score(distribution, output, draw), mask) / math.sqrt(draws)


def sketch(
    distribution: OutputDistribution,
    output: Tensor,
    target: Tensor,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Column]:
    """Multiply the root by a vector of random signs (Martens, Sutskever and Swersky 2012)."""
    shape = _repeat(output, draws).shape
    bits = torch.randint(0, 2, shape, generator=generator, device=output.device)
    for draw in _unrepeat(bits, draws):
        column = root_times(distribution, output, 2 * draw.to(output.dtype) - 1)
        yield _masked(column, distribution.mask(target)) / math.sqrt(draws)


def exact(distribution: OutputDistribution, output: Tensor, target: Tensor) -> Iterator[Column]:
    """Every column: each position of the output by itself, since positions are independent."""
    n_columns = output.shape[1:].numel()
    if isinstance(distribution, Categorical):
        n_columns -= output.shape[1:-1].numel()
    if n_columns > MAX_EXACT_COLUMNS:
        raise ValueError(
            f"the exact Fisher information of outputs of shape {tuple(output.shape[1:])} takes "
            f"{n_columns} backward passes, more than {MAX_EXACT_COLUMNS}; kind='sketch' is "
            "unbiased and takes one"
        )
    mask = distribution.mask(target)
    positions, parts = root_at_positions(distribution, output)
    for part in parts:
        part = _masked(part, mask)
        for index in product(*map(range, positions)):
            at: tuple[Any, ...] = (slice(None), *index)
            column = torch.zeros_like(part)
            column[at] = part[at]
            yield column


@singledispatch
def root_at_positions(
    distribution: OutputDistribution, output: Tensor
) -> tuple[torch.Size, Iterator[Column]]:
    """Return the shape of the positions, and the columns that each of them has."""
    return output.shape[1:], root(distribution, output)


@root_at_positions.register
def _(distribution: Categorical, output: Tensor) -> tuple[torch.Size, Iterator[Column]]:
    return output.shape[1:-1], root(distribution, output)


@root_at_positions.register
def _(distribution: TorchDistribution, output: Tensor) -> tuple[torch.Size, Iterator[Column]]:
    roots = Curvature(distribution, output).root()
    parts = (part.reshape(output.shape).to(output.dtype) for part in roots.unbind(-1))
    return roots.shape[1:-2], parts


@singledispatch
def root(distribution: OutputDistribution, output: Tensor) -> Iterator[Column]:
    """Yield the columns of the root, each at every position."""
    raise TypeError(f"no root of the Fisher information is known for {distribution}")


@singledispatch
def root_times(distribution: OutputDistribution, output: Tensor, v: Tensor) -> Column:
    """Multiply the root by a vector with one entry for each entry of the output."""
    return next(root(distribution, output)) * v


@root_times.register
def _(distribution: TorchDistribution, output: Tensor, v: Tensor) -> Tensor:
    roots = Curvature(distribution, output).root()
    return (
        (roots @ v.to(roots).reshape(*roots.shape[:-1], 1)).reshape(output.shape).to(output.dtype)
    )


def information_times(
    distribution: OutputDistribution, output: Tensor, target: Tensor, v: Tensor
) -> Float[Tensor, "N ..."]:
    """Multiply the Fisher information of the output distribution by a vector, in closed form."""
    if isinstance(distribution, Categorical) and (axis := distribution.class_dim) is not None:
        distribution = replace(distribution, class_dim=None)
        output, v = output.movedim(axis, -1), v.movedim(axis, -1)
        return information_times(distribution, output, target, v).movedim(-1, axis)
    return _masked(_information_times(distribution, output, v), distribution.mask(target))


@singledispatch
def _information_times(distribution: OutputDistribution, output: Tensor, v: Tensor) -> Tensor:
    return next(root(distribution, output)).square() * v


@_information_times.register
def _(distribution: TorchDistribution, output: Tensor, v: Tensor) -> Tensor:
    return Curvature(distribution, output).times(v).to(output.dtype)


@_information_times.register
def _(distribution: Categorical, output: Tensor, v: Tensor) -> Tensor:
    p = output.softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True))


@root.register
def _(distribution: Categorical, output: Tensor) -> Iterator[Column]:
    r"""``C - 1`` columns without cancellation, pivot on the most likely class ``r``.

    :math:`S_{jk} = \sqrt{p_k}\,(\delta_{jk} - p_j / (1 + \sqrt{p_r}))` for the other classes and
    :math:`S_{rk} = -\sqrt{p_k p_r}`.
    """
    root_p, share, pivot = _pivoted(output)
    for k in range(output.shape[-1] - 1):
        other = k + (pivot <= k)
        root_pk = root_p.gather(-1, other)
        yield (-root_pk * share).scatter_add(-1, other, root_pk)


@root_times.register
def _(distribution: Categorical, output: Tensor, v: Tensor) -> Tensor:
    """Combine the same columns in ``O(C)``; the entry of ``v`` at the pivot is not used."""
    root_p, share, _ = _pivoted(output)
    u = root_p * v
    return u - share * u.sum(-1, keepdim=True)


def _pivoted(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of the probabilities with 0 at the pivot, what each class subtracts, the pivot."""
    p = output.softmax(-1)
    p_pivot, pivot = p.max(-1, keepdim=True)
    share = (p / (1 + p_pivot.sqrt())).scatter(-1, pivot, p_pivot.sqrt())
    return p.sqrt().scatter(-1, pivot, 0.0), share, pivot


@root.register
def _(distribution: Bernoulli, output: Tensor) -> Iterator[Column]:
    return iter([(output.sigmoid() * (-output).sigmoid()).sqrt()])


@root.register
def _(distribution: Gaussian, output: Tensor) -> Iterator[Column]:
    return iter([torch.full_like(output, 1 / distribution.sigma)])


@root.register
def _(distribution: Poisson, output: Tensor) -> Iterator[Column]:
    return iter([(output / 2).exp()])


def _masked(column: Column, mask: Tensor | None) -> Column:
    if mask is None:
        return column
    return column * mask.reshape(*mask.shape, *[1] * (column.dim() - mask.dim()))


def _repeat(values: Tensor, draws: int) -> Tensor:
    """Draws of one observation stand together, so that the batch size does not matter."""
    return values.detach().repeat_interleave(draws, 0)


def _unrepeat(values: Tensor, draws: int) -> Iterator[Tensor]:
    return iter(values.unflatten(0, (-1, draws)).unbind(1))
