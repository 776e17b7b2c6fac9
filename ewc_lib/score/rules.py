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
from string import ascii_letters
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score import memory
from ewc_lib.score.squares import SquareSums


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

    def add_squares(
        self, out: Tensor, a: Tensor, g: Float[Tensor, "K N ..."], squares: SquareSums
    ) -> None:
        """Add the squares of the gradients along all columns and of all observations to ``out``."""
        row_bytes = len(g) * self.shape.numel() * out.element_size()
        for part in squares.budget.pieces_of_squares(len(a), row_bytes):
            squares.add(out, self._of_columns(a[part], g[:, part]))

    def _of_columns(self, a: Tensor, g: Float[Tensor, "K N ..."]) -> Float[Tensor, "K N ..."]:
        """Return the gradients along several output columns."""
        return _stacked([self.gradients(a, column) for column in g])


def _stacked(columns: list[Tensor]) -> Float[Tensor, "K ..."]:
    return torch.stack(columns) if len(columns) > 1 else columns[0].unsqueeze(0)


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

    def add_squares(
        self, out: Tensor, a: Tensor, g: Float[Tensor, "K N ..."], squares: SquareSums
    ) -> None:
        copied = 0 if a.is_contiguous() else a[0].numel() * a.element_size()
        for part in squares.budget.pieces_of_windows(len(a), copied):
            self._add_squares(out, a[part], g[:, part], squares)

    def _add_squares(
        self, out: Tensor, a: Tensor, g: Float[Tensor, "K N ..."], squares: SquareSums
    ) -> None:
        inputs, outputs = self.input_rows(a), self._output_rows_of_columns(a, g)
        if not self.transposed:
            matrix = out.view(inputs.shape[1], -1, inputs.shape[3])
            add_squared_products(matrix, outputs, inputs, squares)
        elif len(g) == 1:
            matrix = out.view(inputs.shape[1], inputs.shape[3], -1)
            add_squared_products(matrix, inputs.unsqueeze(0), outputs[0], squares)
        else:
            matrix = out.new_zeros(inputs.shape[1], outputs.shape[4], inputs.shape[3])
            add_squared_products(matrix, outputs, inputs, squares)
            squares.finish()
            out += matrix.mT.reshape(out.shape)

    def _output_rows_of_columns(
        self, a: Tensor, g: Float[Tensor, "K N ..."]
    ) -> Float[Tensor, "K N groups T O"]:
        rows = self.output_rows(a, g[0] if len(g) == 1 else g.flatten(0, 1))
        found: Tensor = rows.unflatten(0, (len(g), -1))
        return found

    def join(
        self, uses: Sequence[tuple[Tensor, Float[Tensor, "K N ..."]]]
    ) -> tuple[Rule, Tensor, Float[Tensor, "K N groups T O"]]:
        """Return one rule, input and gradient with the positions of several uses by this one."""
        inputs = torch.cat([self.input_rows(a) for a, _ in uses], 2)
        outputs = torch.cat([self._output_rows_of_columns(a, g) for a, g in uses], 3)
        return Factors(self.shape, self.transposed), inputs, outputs


@dataclass(frozen=True)
class Factors(Products):
    """Factors that are rows already.

    Attributes
    ----------
    transposed
        The matrix has one row for each input instead of each output.
    """

    transposed: bool = False

    def input_rows(self, a: Tensor) -> Tensor:
        return a

    def output_rows(self, a: Tensor, g: Tensor) -> Tensor:
        return g


def add_squared_products(
    out: Float[Tensor, "groups L R"],
    left: Float[Tensor, "K N groups T L"],
    right: Float[Tensor, "N groups T R"],
    squares: SquareSums,
) -> None:
    r"""Add :math:`\sum_k \sum_n (\sum_t l_{knt} r_{nt}^\top)^2` to ``out``, entry by entry."""
    if left.shape[3] == 1:  # the square of a product is a product of squares
        of_left = left.square().sum(0) if len(left) > 1 else left[0].square()
        both = (side.squeeze(2).transpose(0, 1) for side in (of_left, right.square()))
        out.baddbmm_(next(both).mT, next(both))
        return
    row_bytes = len(left) * out.numel() * out.element_size()
    if squares.budget.by_reduction:
        for part in squares.budget.pieces_of_squares(len(right), row_bytes):
            squares.add(out, _products_of_columns(left[:, part], right[part]))
        return
    for column in left:
        if len(out) == 1:
            _add_squared_products_of_one(out[0], column[:, 0], right[:, 0], squares)
            continue
        for part in squares.budget.pieces_of_squares(len(right), row_bytes):
            squares.add(out, column[part].mT @ right[part], reusable=True)


def _products_of_columns(
    left: Float[Tensor, "K N groups T L"], right: Float[Tensor, "N groups T R"]
) -> Float[Tensor, "N K groups L R"]:
    """Return all products of one observation by one matrix, the columns below each other."""
    if len(left) == 1:
        return (left[0].mT @ right).unsqueeze(1)
    below = left.permute(1, 2, 0, 4, 3).flatten(2, 3)
    found: Tensor = (below @ right).unflatten(2, (len(left), -1)).movedim(2, 1)
    return found


def _add_squared_products_of_one(
    out: Float[Tensor, "L R"],
    left: Float[Tensor, "N T L"],
    right: Float[Tensor, "N T R"],
    squares: SquareSums,
) -> None:
    """Do that for one group, in pieces of the matrix and of the observations."""
    row_bytes, most = right.shape[2] * out.element_size(), squares.budget.squares
    for rows in memory.pieces(out.shape[0], row_bytes, most):
        height = len(out[rows])
        parts = memory.pieces(len(left), height * row_bytes, most)
        for part in parts:
            piece = squares.scratch(out, len(left[part]), *out[rows].shape)
            torch.bmm(left[part, :, rows].mT, right[part], out=piece)
            squares.add(out[rows], piece, reusable=True)


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
        return self._sums(self._terms(a, g))

    def add_total(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        out += self._sums(self._terms(a, g).unsqueeze(0)).squeeze(0)

    def _of_columns(self, a: Tensor, g: Float[Tensor, "K N ..."]) -> Float[Tensor, "K N ..."]:
        found: Tensor = self._sums(self._terms(a, g).flatten(0, 1)).unflatten(0, g.shape[:2])
        return found

    def _sums(self, terms: Tensor) -> Tensor:
        """Add over positions."""
        padded = (1,) * (terms.dim() - 1 - self._width) + self._aligned
        axes = [i for i in range(1, terms.dim()) if padded[i - 1] == 1 < terms.shape[i]]
        return (terms.sum(axes) if axes else terms).reshape(len(terms), *self.shape)

    def _terms(self, a: Tensor, g: Tensor) -> Tensor:
        """Return what is added over positions."""
        return g

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

    def _terms(self, a: Tensor, g: Tensor) -> Tensor:
        return a * g


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

    def _of_columns(self, a: Tensor, g: Float[Tensor, "K N ..."]) -> Float[Tensor, "K N ..."]:
        own, rest = self.equation.split(",")
        output, parameter = rest.split("->")
        free = next(letter for letter in ascii_letters if letter not in self.equation)
        return torch.einsum(f"{own},{free}{output}->{free}{parameter}", a, g)


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
        of_each = self._of_each(a, g)
        table = g.new_zeros(len(a) * self.shape[0], *of_each.shape[1:])
        return table.index_add_(0, self._keys(a), of_each).reshape(len(a), *self.shape)

    def add_total(self, out: Tensor, a: Tensor, g: Tensor) -> None:
        out.view(self.shape[0], -1).index_add_(0, a.reshape(-1), self._of_each(a, g))

    def add_squares(
        self, out: Tensor, a: Tensor, g: Float[Tensor, "K N ..."], squares: SquareSums
    ) -> None:
        """Sum only the rows that each observation used, then square them."""
        n_rows = self.shape[0]
        key = self._keys(a)
        ordered = key.sort().values
        first = torch.searchsorted(ordered, key)  # equal keys share a place, others stay empty
        of_each = _stacked([self._of_each(a, column) for column in g])
        sums = torch.zeros_like(of_each).index_add_(1, first, of_each).square_()
        squared = sums.sum(0) if len(g) > 1 else sums[0]
        out.view(n_rows, -1).index_add_(0, ordered % n_rows, squared)

    def _keys(self, a: Tensor) -> Tensor:
        """Give the rows of each observation numbers of their own."""
        n_rows = self.shape[0]
        offsets = torch.arange(0, len(a) * n_rows, n_rows, device=a.device)
        return (a.reshape(len(a), -1) + offsets.unsqueeze(1)).reshape(-1)

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
