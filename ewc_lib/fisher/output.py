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
from itertools import chain, islice, product
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

COLUMNS_AT_ONCE = 16
"""Columns of a block, so that what they have in common is computed once for all of them."""

Column: TypeAlias = Float[Tensor, "N ..."]
Block: TypeAlias = Float[Tensor, "K N ..."]


def columns(
    kind: Kind,
    distribution: OutputDistribution,
    output: Float[Tensor, "N ..."],
    target: Tensor,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Block]:
    """Yield the columns of a root in blocks, each column in the shape of the output.

    ``exact`` yields all of them, ``sketch`` and ``sampled`` yield ``draws`` random ones whose
    outer product is right on average, ``empirical`` yields the score of the observed target.
    """
    if isinstance(distribution, Categorical) and (axis := distribution.class_dim) is not None:
        distribution = replace(distribution, class_dim=None)
        found = columns(kind, distribution, output.movedim(axis, -1), target, draws, generator)
        return (block.movedim(-1, axis + 1 if axis >= 0 else axis) for block in found)
    if kind == "exact":
        return exact(distribution, output, target)
    if kind == "sketch":
        return _blocks(sketch(distribution, output, target, draws, generator))
    if kind == "sampled":
        return _blocks(sampled(distribution, output, target, draws, generator))
    return _blocks(iter([output_score(distribution, output, target)]))


def _blocks(columns: Iterator[Column]) -> Iterator[Block]:
    while block := list(islice(columns, COLUMNS_AT_ONCE)):
        yield torch.stack(block) if len(block) > 1 else block[0].unsqueeze(0)


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


def exact(distribution: OutputDistribution, output: Tensor, target: Tensor) -> Iterator[Block]:
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
    positions, blocks = root_at_positions(distribution, output)
    masked = (_masked(block, mask, axis=1) for block in blocks)
    return masked if not positions else _blocks(_at_each(positions, masked))


def _at_each(positions: torch.Size, blocks: Iterator[Block]) -> Iterator[Column]:
    """Yield each column at one position after the other, and zero elsewhere."""
    for column in chain.from_iterable(blocks):
        for index in product(*map(range, positions)):
            at: tuple[Any, ...] = (slice(None), *index)
            alone = torch.zeros_like(column)
            alone[at] = column[at]
            yield alone


@singledispatch
def root_at_positions(
    distribution: OutputDistribution, output: Tensor
) -> tuple[torch.Size, Iterator[Block]]:
    """Return the shape of the positions, and the columns that each of them has."""
    return output.shape[1:], root(distribution, output)


@root_at_positions.register
def _(distribution: Categorical, output: Tensor) -> tuple[torch.Size, Iterator[Block]]:
    return output.shape[1:-1], root(distribution, output)


@root_at_positions.register
def _(distribution: TorchDistribution, output: Tensor) -> tuple[torch.Size, Iterator[Block]]:
    roots = Curvature(distribution, output).root()
    parts = (part.reshape(output.shape).to(output.dtype) for part in roots.unbind(-1))
    return roots.shape[1:-2], _blocks(parts)


@singledispatch
def root(distribution: OutputDistribution, output: Tensor) -> Iterator[Block]:
    """Yield the columns of the root in blocks, each column at every position."""
    raise TypeError(f"no root of the Fisher information is known for {distribution}")


@singledispatch
def root_times(distribution: OutputDistribution, output: Tensor, v: Tensor) -> Column:
    """Multiply the root by a vector with one entry for each entry of the output."""
    return next(root(distribution, output))[0] * v


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
    return next(root(distribution, output))[0].square() * v


@_information_times.register
def _(distribution: TorchDistribution, output: Tensor, v: Tensor) -> Tensor:
    return Curvature(distribution, output).times(v).to(output.dtype)


@_information_times.register
def _(distribution: Categorical, output: Tensor, v: Tensor) -> Tensor:
    p = output.softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True))


@root.register
def _(distribution: Categorical, output: Tensor) -> Iterator[Block]:
    r"""``C - 1`` columns without cancellation, pivot on the most likely class ``r``.

    :math:`S_{jk} = \sqrt{p_k}\,(\delta_{jk} - p_j / (1 + \sqrt{p_r}))` for the other classes and
    :math:`S_{rk} = -\sqrt{p_k p_r}`.
    """
    root_p, share, pivot = _pivoted(output)
    numbers = torch.arange(output.shape[-1] - 1, device=output.device)
    for some in numbers.split(COLUMNS_AT_ONCE) if len(numbers) else ():
        k = some.reshape(-1, *[1] * output.dim())
        other = k + (pivot <= k)
        root_pk = root_p.expand(len(some), *root_p.shape).gather(-1, other)
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
def _(distribution: Bernoulli, output: Tensor) -> Iterator[Block]:
    return iter([(output.sigmoid() * (-output).sigmoid()).sqrt().unsqueeze(0)])


@root.register
def _(distribution: Gaussian, output: Tensor) -> Iterator[Block]:
    return iter([torch.full_like(output, 1 / distribution.sigma).unsqueeze(0)])


@root.register
def _(distribution: Poisson, output: Tensor) -> Iterator[Block]:
    return iter([(output / 2).exp().unsqueeze(0)])


def _masked(column: Tensor, mask: Tensor | None, axis: int = 0) -> Tensor:
    """Leave out positions that do not count; ``axis`` is that of the observations."""
    if mask is None:
        return column
    ends = [1] * (column.dim() - axis - mask.dim())
    return column * mask.reshape(*mask.shape, *ends)


def _repeat(values: Tensor, draws: int) -> Tensor:
    """Draws of one observation stand together, so that the batch size does not matter."""
    return values.detach().repeat_interleave(draws, 0)


def _unrepeat(values: Tensor, draws: int) -> Iterator[Tensor]:
    return iter(values.unflatten(0, (-1, draws)).unbind(1))
