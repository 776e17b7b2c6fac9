"""Where a tensor holds the observations: a guess, which the gradient check judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Size, Tensor


@dataclass(frozen=True)
class BatchAxis:
    """Observations lie along one axis, alone or flattened together with positions.

    Attributes
    ----------
    axis
        The axis of the observations.
    inner
        Whether the observation changes fastest along a flattened axis.
    """

    axis: int = 0
    inner: bool = False

    def fits(self, shape: Size, n: int) -> bool:
        """Whether tensors of this shape can hold ``n`` observations so."""
        return len(shape) > self.axis and shape[self.axis] % n == 0 and 0 not in shape

    def split(self, tensor: Tensor, n: int) -> Shaped[Tensor, "N ..."]:
        """Cut into what the operation would have seen with each observation alone."""
        before, after = tensor.shape[: self.axis], tensor.shape[self.axis + 1 :]
        sizes = (-1, n) if self.inner else (n, -1)
        cut = tensor.reshape(*before, *sizes, *after)
        return cut.movedim(self.axis + self.inner, 0) if self.axis or self.inner else cut

    def split_columns(self, tensors: Shaped[Tensor, "K ..."], n: int) -> Shaped[Tensor, "K N ..."]:
        """Cut several tensors of one shape, one behind the other."""
        if len(tensors) == 1:
            return self.split(tensors[0], n).unsqueeze(0)
        return BatchAxis(self.axis + 1, self.inner).split(tensors, n).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class RaggedRows:
    """Each row of the first axis belongs to some observation, of which it may have any number.

    Attributes
    ----------
    owner
        The observation of each row; ``n`` where no observation has a part in it.
    n
        The number of observations.
    """

    owner: Int[Tensor, " R"]
    n: int

    def fits(self, shape: Size, n: int) -> bool:
        """Whether tensors of this shape hold these rows."""
        return n == self.n and shape[:1] == self.owner.shape

    def split(self, tensor: Tensor, n: int) -> Shaped[Tensor, "N ..."]:
        """Cut into the rows of each observation, filled up with zeros."""
        order, owner, position, most = self._places
        rows = tensor.new_zeros(n, most, *tensor.shape[1:])
        rows[owner, position] = tensor[order]
        return rows

    def split_columns(self, tensors: Shaped[Tensor, "K ..."], n: int) -> Shaped[Tensor, "K N ..."]:
        """Cut several tensors of one shape, one behind the other."""
        return torch.stack([self.split(tensor, n) for tensor in tensors])

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return the owned rows in the order of their owners, and the place of each there."""
        owner, order = self.owner.sort(stable=True)
        counts = owner.bincount(minlength=self.n + 1)
        first = counts.cumsum(0) - counts
        position = torch.arange(len(owner), device=owner.device) - first[owner]
        owned, most = int(first[self.n]), int(counts[: self.n].max())
        return order[:owned], owner[:owned], position[:owned], max(1, most)


Placement: TypeAlias = BatchAxis | RaggedRows
"""Where a tensor holds the observations."""


def batch_axes(shape: Size, n: int) -> Iterator[BatchAxis]:
    """Yield every axis that the shape allows, the usual one first."""
    if BatchAxis().fits(shape, n):
        yield BatchAxis()
        if shape[0] > n:
            yield BatchAxis(inner=True)
    yield from (BatchAxis(axis) for axis, size in enumerate(shape) if axis and size == n)


def weigh(split: Float[Tensor, "N ..."], weights: Float[Tensor, " N"]) -> Float[Tensor, "N ..."]:
    """Multiply each observation by its weight."""
    return split * weights.to(split).reshape(-1, *[1] * (split.dim() - 1))
