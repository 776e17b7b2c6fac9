r"""Sums of Kronecker factors, and of squares in their eigenvectors.

The gradient of a weight matrix is :math:`G_n = \sum_t g_{nt} a_{nt}^\top` over the positions
:math:`t` at which the matrix is used: those of a sequence, of an image, or of several calls. A
grouped convolution is one matrix for each group of channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector, check_real
from ewc_lib.fisher.structures import BlockDiagonal, EigenKronecker, Fisher, Kronecker
from ewc_lib.fisher.structures.kronecker import matrix_size
from ewc_lib.fisher.sums.base import DIAGONAL_ONLY, ParameterSpace, Sum
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.fisher.sums.rows import DenseSum
from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.forward_pass import Columns
from ewc_lib.score.gradients import ParameterGradients, UseInBatch
from ewc_lib.score.rules import Broadcast, Products, Rule, add_squared_products
from ewc_lib.score.squares import SquareSums

MAX_VECTOR = 4096
"""Vectors up to this size keep their whole block."""


@dataclass(frozen=True)
class Layer:
    """A weight matrix, or one for each group, and the bias that the same operations add."""

    weight: str
    bias: str | None
    transposed: bool
    groups: int

    @property
    def names(self) -> list[str]:
        """The weight, and the bias if there is one."""
        return [self.weight, *([self.bias] if self.bias else [])]

    @property
    def axes(self) -> tuple[int, ...]:
        """The sizes of the axes in front of the matrices: the number of groups, if several."""
        return (self.groups,) if self.groups > 1 else ()

    def input_rows(
        self, uses: Iterable[UseInBatch], part: slice = slice(None)
    ) -> Float[Tensor, "N groups T I"]:
        """Return the inputs at all positions, with a constant 1 for the bias."""
        rows = torch.cat([_products(use.rule).input_rows(use.input[part]) for use in uses], 2)
        return F.pad(rows, (0, 1), value=1.0) if self.bias else rows

    @staticmethod
    def output_rows(gradients: ParameterGradients) -> Float[Tensor, "N groups T O"]:
        """Return the gradients of the outputs at all positions."""
        pairs = zip(gradients.uses, gradients.output_gradients, strict=True)
        return torch.cat([_products(use.rule).output_rows(use.input, g[0]) for use, g in pairs], 2)


def _products(rule: Rule) -> Products:
    assert isinstance(rule, Products)
    return rule


def layers(batch: BatchScores) -> Iterator[Layer]:
    """Find the parameters of a batch that are matrices wherever they are used."""
    parameters = batch.vmap_gradients.parameters
    direct = {
        name: list(uses.values())
        for name, uses in batch.uses.items()
        if all(use.source is parameters[name] for use in uses.values())
    }
    shifts = {
        name: [use.use.edge for use in uses]
        for name, uses in direct.items()
        if all(type(use.rule) is Broadcast for use in uses)
    }
    for name, uses in direct.items():
        rules = [use.rule for use in uses if isinstance(use.rule, Products)]
        forms = {(rule.transposed, rule.groups) for rule in rules}
        if len(rules) == len(uses) and len(forms) == 1:
            transposed, groups = forms.pop()
            outputs, _ = matrix_size(rules[0].shape, groups, transposed)
            edges = [use.use.edge for use in uses]
            biases = [
                bias
                for bias, its in shifts.items()
                if its == edges and parameters[bias].shape == (groups * outputs,)
            ]
            shared = biases and all(rule.covers_output for rule in rules)
            yield Layer(name, biases[0] if shared else None, transposed, groups)


class KroneckerSum(Sum):
    r"""Two factors for each weight matrix and its bias; whole blocks of vectors; else diagonals.

    A matrix is the weight of a linear map, of a convolution or of a transposed convolution, or
    what a grouped convolution has for each group. With :math:`T` positions, ``expand``
    (Eschenhagen et al. 2023) takes

    .. math:: A = \frac1N \sum_n \frac1T \sum_t a_{nt} a_{nt}^\top, \qquad
              B = \frac1N \sum_n \sum_k \sum_t g_{nkt} g_{nkt}^\top ,

    and ``reduce`` first averages the inputs and sums the gradients over positions. Both are the
    factors of Martens and Grosse (2015) where there is one position. :math:`A` is the mean over
    the observations of the batches that use the matrix.

    The positions of a convolution are those of its output, and :math:`a_{nt}` is the window of
    inputs there. Those of a transposed convolution are those of its input, and :math:`g_{nt}` is
    the window of output gradients there. Its bias is added once to each output, not once in
    each window, so it keeps its own whole block, unless windows are single positions.
    """

    def __init__(self, space: ParameterSpace, reduce: bool = False) -> None:
        super().__init__(space)
        check_real(space.parameters, DIAGONAL_ONLY)
        self.reduce = reduce
        self.layers: list[Layer] = []
        self.inputs: Vector = {}
        self.outputs: Vector = {}
        self._n_of: Counter[str] = Counter()
        self._others: dict[str, Sum] = {}

    def add(self, batch: BatchScores, columns: Iterator[Columns]) -> None:
        self._place(batch)
        for layer, uses in self.uses(batch):
            self._n_of[layer.weight] += len(batch)
            row_bytes = sum(r.input[0].numel() * r.input.itemsize for r in uses)
            for part in memory.pieces(
                len(batch), row_bytes, memory.budget(batch.output.device).rows
            ):
                rows = layer.input_rows(uses, part)
                if self.reduce:
                    self._add(self.inputs[layer.weight], rows.mean(2, keepdim=True))
                else:
                    self._add(self.inputs[layer.weight], rows, 1 / rows.shape[2])
        super().add(batch, columns)

    def _place(self, batch: BatchScores) -> None:
        """Give room to every parameter that is used for the first time."""
        known = {*self._others}.union(*(layer.names for layer in self.layers))
        for layer in layers(batch):
            if known.isdisjoint(layer.names):
                shape, axes = self.space.shapes[layer.weight], layer.axes
                o, i = matrix_size(shape, layer.groups, layer.transposed)
                i += layer.bias is not None
                self.inputs[layer.weight] = self.space.zeros(layer.names, *axes, i, i)
                self.outputs[layer.weight] = self.space.zeros(layer.names, *axes, o, o)
                self.layers.append(layer)
                known.update(layer.names)
        for name in {*batch.uses, *batch.by_vmap} - known:
            self._others[name] = self._alone(name)

    def _alone(self, name: str) -> Sum:
        """Return the sum of a parameter that is no matrix."""
        parameter = self.space.parameters[name]
        whole = parameter.dim() < 2 and parameter.numel() <= MAX_VECTOR
        return (DenseSum if whole else DiagonalSum)(self.space.only(name))

    def uses(self, batch: BatchScores) -> Iterator[tuple[Layer, list[UseInBatch]]]:
        """Yield the layers that a batch uses, and how; they are the same in all batches."""
        found = {layer.weight: layer for layer in layers(batch)}
        used = {*batch.uses, *batch.by_vmap}
        for layer in self.layers:
            if used.isdisjoint(layer.names):
                continue
            if found.get(layer.weight) != layer:
                raise ValueError(
                    f"parameter {layer.weight!r} is used as a matrix in one batch and in another "
                    "way in the next: it has no Kronecker factors; choose structure='diagonal'"
                )
            yield layer, list(batch.uses[layer.weight].values())

    @staticmethod
    def _add(total: Tensor, rows: Float[Tensor, "N groups T _"], weight: float = 1.0) -> None:
        rows = rows.to(total).transpose(0, 1).flatten(1, 2)
        _by_group(total).baddbmm_(rows.mT, rows, alpha=weight)

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for part, found in parts:
            for name in found.keys() & self._others.keys():
                self._others[name].add_by_vmap([(part, found)])

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for layer in self.layers:
            if layer.weight in found:
                rows = layer.output_rows(found[layer.weight])
                rows = rows.sum(2, keepdim=True) if self.reduce else rows
                self._add(self.outputs[layer.weight], rows)
        for name, other in self._others.items():
            other.add_column({name: found[name]} if name in found else {}, k, n)

    def end_block(self) -> None:
        for other in self._others.values():
            other.end_block()

    def mean(self, kind: str, paths: dict[str, str]) -> BlockDiagonal:
        blocks = [
            Kronecker(
                self.n,
                kind,
                {name: paths[name] for name in layer.names},
                self.outputs[layer.weight] / self.n,
                self.inputs[layer.weight] / self._n_of[layer.weight],
                {name: self.space.shapes[name] for name in layer.names},
                layer.transposed,
            )
            for layer in self.layers
        ]
        return BlockDiagonal(self.n, kind, paths, (*blocks, *self.others(kind, paths)))

    def others(self, kind: str, paths: dict[str, str]) -> Iterator[Fisher]:
        """Yield the block of each parameter that is no matrix; unused ones have no information."""
        of_layers = {name for layer in self.layers for name in layer.names}
        for name in self.space.parameters:
            if name not in of_layers:
                other = self._others.get(name) or self._alone(name)
                other.n = self.n
                yield other.mean(kind, {name: paths[name]})


class EigenKroneckerSum(Sum):
    """Squares in the eigenvectors of Kronecker factors, which a first pass has found."""

    def __init__(self, space: ParameterSpace, first: KroneckerSum) -> None:
        super().__init__(space)
        self.first = first
        self._bases = {
            name: (_basis(first.outputs[name]), _basis(a)) for name, a in first.inputs.items()
        }
        self.moments = {
            name: self.space.zeros([name], *outputs.shape[:-1], inputs.shape[-1])
            for name, (outputs, inputs) in self._bases.items()
        }
        self._inputs: dict[str, Tensor] = {}

    def add(self, batch: BatchScores, columns: Iterator[Columns]) -> None:
        self._inputs = {}
        for layer, uses in self.first.uses(batch):
            basis = self._bases[layer.weight][1]
            self._inputs[layer.weight] = _rotated(layer.input_rows(uses), basis)
        super().add(batch, columns)

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        """Nothing to do: what has no factors was summed in the first pass."""

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for name in found.keys() & self._inputs.keys():
            rows = _rotated(Layer.output_rows(found[name]), self._bases[name][0])
            moments, squares = self.moments[name], SquareSums(memory.budget(rows.device))
            add_squared_products(_by_group(moments), rows[None], self._inputs[name], squares)
            squares.finish()

    def mean(self, kind: str, paths: dict[str, str]) -> BlockDiagonal:
        if self.n != self.first.n:
            raise ValueError(
                f"the data held {self.first.n} observations in the first pass and {self.n} in "
                "the second; structure='eigenkronecker' reads them twice"
            )
        blocks = [
            EigenKronecker(
                self.n,
                kind,
                {name: paths[name] for name in layer.names},
                self.moments[layer.weight] / self.n,
                *self._bases[layer.weight],
                {name: self.space.shapes[name] for name in layer.names},
                layer.transposed,
            )
            for layer in self.first.layers
        ]
        return BlockDiagonal(self.n, kind, paths, (*blocks, *self.first.others(kind, paths)))


def _by_group(matrices: Float[Tensor, "*groups O I"]) -> Float[Tensor, "groups O I"]:
    return matrices.view(-1, *matrices.shape[-2:])


def _rotated(
    rows: Float[Tensor, "N groups T I"], basis: Float[Tensor, "*groups I I"]
) -> Float[Tensor, "N groups T I"]:
    """Return the coordinates of rows in a basis, that of each group."""
    return torch.einsum("ngti,gij->ngtj", rows.to(basis), _by_group(basis))


def _basis(factor: Float[Tensor, "*groups O O"]) -> Float[Tensor, "*groups O O"]:
    vectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    return vectors.contiguous()
