r"""How the gradient of one parameter, observation by observation, follows from one operation.

An operation that uses a parameter is known by its other input ``a`` and by the gradient ``g``
that arrives at its output. Both are cut into what the operation would have seen with each
observation alone, so they have one observation per row. A rule turns the two into the gradient
of the parameter for each observation, into their sum, or into the sum of their squares, the last
without holding all of them where that can be avoided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score import memory


@dataclass(frozen=True)
class Rule(ABC):
    """The gradient of a parameter of a given shape through one operation."""

    shape: torch.Size
    multiplies: ClassVar[bool] = True
    """Whether an input of zeros makes the gradient zero."""

    def prepare(self, a: Tensor, room: int) -> Tensor:
        """Bring the input into the form of the other methods, with ``room`` bytes to copy it."""
        return a

    @abstractmethod
    def gradients(self, a: Tensor, g: Tensor) -> Float[Tensor, "N ..."]:
        """Gradient for each observation, ``[N, *shape]``."""

    def add_total(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        """Add the gradients of all observations to ``out``, ``[*shape]``."""
        out += self.gradients(a, g).sum(0)

    def squares_factorise(self, a: Tensor, g: Tensor) -> bool:
        """Whether each entry of a gradient is one product of an entry of ``a`` and one of ``g``.

        Then its square is a product of squares, and the squares of several output gradients can
        be added up first.
        """
        return False

    def add_squares(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        """Add the squares of the gradients of all observations to ``out``."""
        row_bytes = self.shape.numel() * out.element_size()
        for part in memory.pieces(len(g), row_bytes, memory.SQUARES_BYTES):
            add_rows(out, self.gradients(a[part], g[part]).square())


def add_rows(out: Tensor, rows: Float[Tensor, "N ..."]) -> None:
    """Add all rows to ``out`` in one sweep, as a product with ones."""
    out.view(-1).addmv_(rows.reshape(len(rows), -1).mT, rows.new_ones(len(rows)))


@dataclass(frozen=True)
class Products(Rule):
    r"""A sum of products over positions: :math:`G_n = \sum_t l_{nt} r_{nt}^\top`.

    For each group of channels the parameter is a matrix with one row for each output and one
    column for each input, or transposed.
    """

    groups = 1
    transposed = False

    @abstractmethod
    def input_rows(self, a: Tensor) -> Float[Tensor, "N groups T I"]:
        """Return the inputs of the matrix at all positions."""

    @abstractmethod
    def output_rows(self, a: Tensor, g: Tensor) -> Float[Tensor, "N groups T O"]:
        """Return the gradients of the outputs of the matrix at all positions."""

    @property
    def covers_output(self) -> bool:
        """Whether each entry of the output comes from the matrix at one position."""
        return True

    def sides(
        self, a: Tensor, g: Tensor
    ) -> tuple[Float[Tensor, "N groups T L"], Float[Tensor, "N groups T R"]]:
        """Return the factors of the rows and of the columns, for each group of channels."""
        inputs, outputs = self.input_rows(a), self.output_rows(a, g)
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        left, right = self.sides(a, g)
        return (left.mT @ right).reshape(len(g), *self.shape)

    def add_total(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        left, right = (side.transpose(0, 1).flatten(1, 2) for side in self.sides(a, g))
        out.view(len(left), left.shape[2], -1).baddbmm_(left.mT, right)

    def squares_factorise(self, a: Tensor, g: Tensor) -> bool:
        return self.sides(a[:1], g[:1])[0].shape[2] == 1

    def add_squares(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        left, right = self.sides(a, g)
        add_squared_products(out.view(left.shape[1], left.shape[3], -1), left, right)

    def join(self, uses: Sequence[tuple[Tensor, Tensor]]) -> tuple[Rule, Tensor, Tensor]:
        """Return one rule, input and gradient with the positions of several uses by this one."""
        left, right = (
            torch.cat(sides, 2) for sides in zip(*(self.sides(a, g) for a, g in uses), strict=True)
        )
        return Factors(self.shape), right, left


@dataclass(frozen=True)
class Factors(Products):
    """Factors that are rows already: those of the columns are the input."""

    def input_rows(self, a: Tensor) -> Tensor:
        return a

    def output_rows(self, a: Tensor, g: Tensor) -> Tensor:
        return g


def add_squared_products(
    out: Float[Tensor, "groups L R"],
    left: Float[Tensor, "N groups T L"],
    right: Float[Tensor, "N groups T R"],
) -> None:
    r"""Add :math:`\sum_n (\sum_t l_{nt} r_{nt}^\top)^2` to ``out``, entry by entry."""
    if left.shape[2] == 1:  # the square of a product is a product of squares
        squares = (side.squeeze(2).transpose(0, 1).square() for side in (left, right))
        out.baddbmm_(next(squares).mT, next(squares))
    elif len(out) == 1:
        _add_squared_products_of_one(out[0], left[:, 0], right[:, 0])
    else:
        row_bytes = out.numel() * out.element_size()
        for part in memory.pieces(len(left), row_bytes, memory.SQUARES_BYTES):
            add_rows(out, (left[part].mT @ right[part]).square_())


def _add_squared_products_of_one(
    out: Float[Tensor, "L R"], left: Float[Tensor, "N T L"], right: Float[Tensor, "N T R"]
) -> None:
    """Do that for one group, in pieces of the matrix and of the observations."""
    row_bytes = right.shape[2] * out.element_size()
    for rows in memory.pieces(out.shape[0], row_bytes, memory.SQUARES_BYTES):
        height = len(out[rows])
        parts = list(memory.pieces(len(left), height * row_bytes, memory.SQUARES_BYTES))
        buffer = out.new_empty(len(left[parts[0]]), *out[rows].shape)
        for part in parts:
            piece = buffer[: len(left[part])]
            torch.bmm(left[part, :, rows].mT, right[part], out=piece)
            add_rows(out[rows], piece.square_())


@dataclass(frozen=True)
class OuterProduct(Products):
    """A matrix in a linear map: ``y = a Wᵀ``, or ``y = a W`` if transposed.

    Attributes
    ----------
    transposed
        The matrix has one row for each input instead of each output.
    from_left
        The matrix stands left of its input, whose columns it maps.
    """

    transposed: bool = False
    from_left: bool = False

    def input_rows(self, a: Tensor) -> Float[Tensor, "N 1 T I"]:
        a = a.mT if self.from_left else a
        return a.reshape(len(a), 1, -1, a.shape[-1])

    def output_rows(self, a: Tensor, g: Tensor) -> Float[Tensor, "N 1 T O"]:
        return self.input_rows(g)


@dataclass(frozen=True)
class Convolution(Products):
    """A kernel that slides over its input: a matrix on each window of it.

    Attributes
    ----------
    stride, dilation
        One number for each dimension of space.
    padding
        Zeros before and after, for each dimension of space.
    groups
        Number of separate parts of the channels.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def prepare(self, a: Tensor, room: int) -> Tensor:
        """Cut the windows, and copy them if there is room: as a view they overlap."""
        windows = self._windows(a)
        fits = windows.numel() * windows.element_size() <= room
        return windows.contiguous() if fits else windows

    def input_rows(self, a: Tensor) -> Float[Tensor, "N groups T I"]:
        """Return the windows that :meth:`prepare` has cut."""
        return self._window_rows(a)

    def output_rows(self, a: Tensor, g: Tensor) -> Float[Tensor, "N groups T O"]:
        return self._channel_rows(g)

    def _windows(self, image: Float[Tensor, "N P C ..."]) -> Float[Tensor, "N P C ..."]:
        """Return a view ``[N, P, C, *kernel, *positions]`` on the padded image."""
        image = F.pad(image, [size for pair in reversed(self.padding) for size in pair])
        kernel, outer, inner = self.shape[2:], image.stride()[:3], image.stride()[3:]
        positions = [
            (size - d * (k - 1) - 1) // step + 1
            for size, k, step, d in zip(
                image.shape[3:], kernel, self.stride, self.dilation, strict=True
            )
        ]
        within = [s * d for s, d in zip(inner, self.dilation, strict=True)]
        between = [s * step for s, step in zip(inner, self.stride, strict=True)]
        size = (*image.shape[:3], *kernel, *positions)
        return image.as_strided(size, (*outer, *within, *between))

    def _window_rows(self, windows: Tensor) -> Float[Tensor, "N groups T I"]:
        n, last = len(windows), 2 + len(self.shape[2:])
        by_channel = windows.movedim(1, last).flatten(last)
        return by_channel.reshape(n, self.groups, -1, by_channel.shape[-1]).mT

    def _channel_rows(self, image: Tensor) -> Float[Tensor, "N groups T O"]:
        by_channel = image.movedim(1, 2).flatten(2)
        return by_channel.reshape(len(image), self.groups, -1, by_channel.shape[2]).mT


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """The transpose of a convolution: a matrix from each input position to a window of outputs.

    Its outputs are those of the window, so each channel has as many as the kernel has entries.
    """

    transposed = True

    def prepare(self, a: Tensor, room: int) -> Tensor:
        return a

    def input_rows(self, a: Tensor) -> Float[Tensor, "N groups T I"]:
        return self._channel_rows(a)

    def output_rows(self, a: Tensor, g: Tensor) -> Float[Tensor, "N groups T O"]:
        windows = self._windows(g)
        for axis, size in enumerate(a.shape[3:], windows.dim() - len(a.shape[3:])):
            windows = windows.narrow(axis, 0, size)
        return self._window_rows(windows)

    @property
    def covers_output(self) -> bool:
        """Windows overlap, or leave gaps, unless they are single positions side by side."""
        sizes = {*self.shape[2:], *self.stride, *self.dilation}
        return sizes == {1} and not any(map(any, self.padding))


@dataclass(frozen=True)
class Broadcast(Rule):
    r"""A parameter that is added, as a bias is: ``y = x + b``, broadcast over positions.

    Attributes
    ----------
    trailing
        Axes that follow those of the parameter, as the positions of an image follow a channel.
    """

    trailing: int = 0
    multiplies: ClassVar[bool] = False

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        padded = (1,) * (g.dim() - 1 - self._width) + self._aligned
        axes = [axis for axis in range(1, g.dim()) if padded[axis - 1] == 1 < g.shape[axis]]
        return (g.sum(axes) if axes else g).reshape(len(g), *self.shape)

    def squares_factorise(self, a: Tensor, g: Tensor) -> bool:
        return g[0].numel() == self.shape.numel()

    @property
    def _aligned(self) -> tuple[int, ...]:
        return (*self.shape, *[1] * self.trailing)

    @property
    def _width(self) -> int:
        return len(self._aligned)


@dataclass(frozen=True)
class Scale(Broadcast):
    """A parameter that multiplies: ``y = a b``, broadcast over positions."""

    multiplies: ClassVar[bool] = True

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        return super().gradients(a, a * g)


@dataclass(frozen=True)
class Einsum(Rule):
    """One of the two operands of a sum over products in Einstein's notation.

    Attributes
    ----------
    equation
        Of the other operand, the output and the parameter, for one observation after the other.
    """

    equation: str

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        return torch.einsum(self.equation, a, g)


@dataclass(frozen=True)
class Rows(Rule):
    """A table of which the rows ``a`` are looked up: an embedding, or a matrix for each row.

    Attributes
    ----------
    padding_idx
        A row that gets no gradient.
    bag
        What becomes of the rows of one bag: ``"sum"``, ``"mean"``, or None if they stay apart.
    """

    padding_idx: int | None = None
    bag: str | None = None
    multiplies: ClassVar[bool] = False

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        n, n_rows = len(a), self.shape[0]
        index = (a.reshape(n, -1) + n_rows * self._arange(a)).reshape(-1)
        of_each = self._of_each(a, g)
        table = g.new_zeros(n * n_rows, *of_each.shape[1:]).index_add_(0, index, of_each)
        return table.reshape(n, *self.shape)

    def add_total(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        out.view(self.shape[0], -1).index_add_(0, a.reshape(-1), self._of_each(a, g))

    def add_squares(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        """Sum only the rows that each observation used, then square them."""
        n_rows = self.shape[0]
        key = (a.reshape(len(a), -1) + n_rows * self._arange(a)).reshape(-1)
        used, position = key.unique(return_inverse=True)
        of_each = self._of_each(a, g)
        sums = g.new_zeros(len(used), *of_each.shape[1:]).index_add_(0, position, of_each)
        out.view(self.shape[0], -1).index_add_(0, used % n_rows, sums.square_())

    @staticmethod
    def _arange(a: Tensor) -> Tensor:
        return torch.arange(len(a), device=a.device).unsqueeze(1)

    def _of_each(self, a: Tensor, g: Tensor) -> Float[Tensor, "rows width"]:
        """Gradient of every row that was looked up."""
        if self.bag is not None:
            g = g.unsqueeze(-2).expand(*a.shape, g.shape[-1])
        if self.bag == "mean":
            counted = a != (-1 if self.padding_idx is None else self.padding_idx)
            g = g / counted.sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1)
        if self.padding_idx is not None:
            g = g * (a != self.padding_idx).unsqueeze(-1)
        return g.reshape(-1, self.shape[1:].numel())
