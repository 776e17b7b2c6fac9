r"""How the gradient of one parameter, observation by observation, follows from one operation.

An operation that uses a parameter is known by its other input ``a`` and by the gradient ``g``
that arrives at its output; both have one observation per row. A rule turns the two into the
gradient of the parameter for each observation, into their sum, or into the sum of their
squares, the last without holding all of them where it can be avoided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK_BYTES = 2**21
"""Per-observation gradients are squared in pieces of this size, which stay in the cache."""


@dataclass(frozen=True)
class Rule(ABC):
    """The gradient of a parameter of a given shape through one operation."""

    shape: torch.Size

    @abstractmethod
    def fits(self, a: Tensor, output: Tensor, n: int) -> bool:
        """Guess whether the first axes hold the ``n`` observations; a certificate checks it."""

    @abstractmethod
    def gradients(self, a: Tensor, g: Tensor) -> Float[Tensor, "N ..."]:
        """Gradient for each observation, ``[N, *shape]``."""

    @abstractmethod
    def total(self, a: Tensor, g: Tensor) -> Tensor:
        """Sum of the gradients over observations, ``[*shape]``."""

    def squares(self, a: Tensor, g: Tensor) -> Tensor:
        """Sum of the squared gradients over observations, ``[*shape]``."""
        pieces = (self.gradients(a[part], g[part]) for part in chunks(g, self.shape))
        return sum_of_squares(pieces, g.new_zeros(self.shape))


def chunks(g: Tensor, shape: torch.Size) -> Iterator[slice]:
    """Cut the observations so that a piece of ``[n, *shape]`` fits into the cache."""
    step = max(1, CHUNK_BYTES // max(1, shape.numel() * g.element_size()))
    return (slice(start, start + step) for start in range(0, len(g), step))


def sum_of_squares(pieces: Iterator[Tensor], total: Tensor) -> Tensor:
    """Add the squares of all rows of all pieces to ``total``."""
    for piece in pieces:
        total += piece.square().sum(0)
    return total


@dataclass(frozen=True)
class OuterProduct(Rule):
    r"""A matrix in a linear map: ``y = a Wᵀ``, or ``y = a W`` if transposed.

    :math:`G_n = \sum_t g_{nt} a_{nt}^\top` over the positions ``t`` of observation ``n``.
    """

    transposed: bool = False

    def fits(self, a: Tensor, output: Tensor, n: int) -> bool:
        return a.dim() == output.dim() >= 2 and len(a) == len(output) == n

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        left, right = self._factors(a, g)
        return left.mT @ right

    def total(self, a: Tensor, g: Tensor) -> Tensor:
        left, right = self._factors(a, g)
        return left.flatten(0, 1).mT @ right.flatten(0, 1)

    def squares(self, a: Tensor, g: Tensor) -> Tensor:
        left, right = self._factors(a, g)
        if left.shape[1] == 1:  # one position: the square of a product is a product of squares
            return left.squeeze(1).square().mT @ right.squeeze(1).square()
        return super().squares(a, g)

    def _factors(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        a, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, g))
        return (a, g) if self.transposed else (g, a)


@dataclass(frozen=True)
class Broadcast(Rule):
    r"""A parameter that is added, as a bias is: ``y = x + b``, broadcast over positions."""

    def fits(self, a: Tensor, output: Tensor, n: int) -> bool:
        inner = self.shape[1:] if self.shape[:1] == (1,) else self.shape
        return output.dim() > len(inner) and len(output) == n

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        padded = (1,) * (g.dim() - len(self.shape)) + tuple(self.shape)
        dims = [d for d in range(1, g.dim()) if padded[d] == 1 and g.shape[d] > 1]
        return (g.sum(dims) if dims else g).reshape(len(g), *self.shape)

    def total(self, a: Tensor, g: Tensor) -> Tensor:
        return self.gradients(a, g).sum(0)


@dataclass(frozen=True)
class Rows(Rule):
    """A table of which the rows ``a`` are looked up: an embedding."""

    padding_idx: int | None = None

    def fits(self, a: Tensor, output: Tensor, n: int) -> bool:
        return a.dim() >= 1 and len(a) == len(output) == n

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        n, (n_rows, width) = len(a), self.shape
        index = (a.reshape(n, -1) + n_rows * self._arange(a)).reshape(-1)
        table = g.new_zeros(n * n_rows, width).index_add_(0, index, g.reshape(-1, width))
        return self._without_padding(table.reshape(n, n_rows, width))

    def total(self, a: Tensor, g: Tensor) -> Tensor:
        width = self.shape[1]
        table = g.new_zeros(self.shape).index_add_(0, a.reshape(-1), g.reshape(-1, width))
        return self._without_padding(table)

    def squares(self, a: Tensor, g: Tensor) -> Tensor:
        """Sum only the rows that each observation used, then square them."""
        n_rows, width = self.shape
        key = (a.reshape(len(a), -1) + n_rows * self._arange(a)).reshape(-1)
        used, position = key.unique(return_inverse=True)
        sums = g.new_zeros(len(used), width).index_add_(0, position, g.reshape(-1, width))
        table = g.new_zeros(self.shape).index_add_(0, used % n_rows, sums.square())
        return self._without_padding(table)

    @staticmethod
    def _arange(a: Tensor) -> Tensor:
        return torch.arange(len(a), device=a.device).unsqueeze(1)

    def _without_padding(self, table: Tensor) -> Tensor:
        if self.padding_idx is not None:
            table[..., self.padding_idx, :] = 0
        return table


Match: TypeAlias = Iterator[tuple[Tensor, Tensor, Rule]]
"""Parameters that an operation may use: the tensor, the other input, the rule."""

_MATCHERS: dict[Any, Callable[..., Match]] = {}


def _matches(*functions: Any) -> Callable[[Callable[..., Match]], Callable[..., Match]]:
    def register(matcher: Callable[..., Match]) -> Callable[..., Match]:
        _MATCHERS.update(dict.fromkeys(functions, matcher))
        return matcher

    return register


def match(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Match:
    """Find the rules of an operation; yield nothing where there are none."""
    matcher = _MATCHERS.get(function)
    try:
        yield from matcher(*args, **kwargs) if matcher is not None else ()
    except TypeError:  # called with arguments that the rule does not know
        return


@_matches(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Match:
    yield weight, input, OuterProduct(weight.shape)
    if bias is not None:
        yield bias, input, Broadcast(bias.shape)


@_matches(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Match:
    yield mat2, mat1, OuterProduct(mat2.shape, transposed=True)
    yield input, mat1, Broadcast(input.shape)


@_matches(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor) -> Match:
    if other.dim() == 2 and input.dim() >= 2:
        yield other, input, OuterProduct(other.shape, transposed=True)


@_matches(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(input: Any, other: Any) -> Match:
    for parameter, rest in ((input, other), (other, input)):
        if isinstance(parameter, Tensor) and isinstance(rest, Tensor):
            yield parameter, rest, Broadcast(parameter.shape)


@_matches(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Match:
    if max_norm is None and not scale_grad_by_freq:
        yield weight, input, Rows(weight.shape, padding_idx=padding_idx)
