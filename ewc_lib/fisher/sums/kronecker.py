r"""Sums of Kronecker factors, and of squares in their eigenvectors.

The gradient of a weight matrix is :math:`G_n = \sum_t g_{nt} a_{nt}^\top` over the positions
:math:`t` at which the matrix is used: those of a sequence, of an image, or of several calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures import BlockDiagonal, EigenKronecker, Fisher, Kronecker
from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.fisher.sums.rows import DenseSum
from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.gradients import ParameterGradients, UseInBatch
from ewc_lib.score.rules import (
    Broadcast,
    Convolution,
    OuterProduct,
    Rule,
    add_squared_products,
)

MAX_VECTOR = 4096
"""Vectors up to this size keep their whole block."""


@dataclass(frozen=True)
class Layer:
    """A weight matrix, and the bias that the same operations add."""

    weight: str
    bias: str | None
    transposed: bool

    @property
    def names(self) -> list[str]:
        """The weight, and the bias if there is one."""
        return [self.weight, *([self.bias] if self.bias else [])]

    def input_rows(
        self, uses: Iterable[UseInBatch], part: slice = slice(None)
    ) -> Float[Tensor, "N T I"]:
        """Return the inputs at all positions, with a constant 1 for the bias."""
        rows = torch.cat([_matrix_rule(r).input_rows(r.input[part]) for r in uses], 1)
        return F.pad(rows, (0, 1), value=1.0) if self.bias else rows

    @staticmethod
    def output_rows(gradients: ParameterGradients) -> Float[Tensor, "N T O"]:
        """Return the gradients of the outputs at all positions."""
        pairs = zip(gradients.uses, gradients.output_gradients, strict=True)
        return torch.cat([_matrix_rule(r).output_rows(g) for r, g in pairs], 1)


def _matrix_rule(use: UseInBatch) -> OuterProduct | Convolution:
    assert _is_matrix(use.rule)
    return use.rule  # type: ignore[return-value]


def _is_matrix(rule: Rule) -> bool:
    return isinstance(rule, OuterProduct) or (type(rule) is Convolution and rule.groups == 1)


def layers(batch: BatchScores) -> Iterator[Layer]:
    """Find the parameters of a batch that are matrices wherever they are used."""
    direct = {
        name: list(uses.values())
        for name, uses in batch.uses.items()
        if all(use.source is batch.vmap_gradients.parameters[name] for use in uses.values())
    }
    shifts = {
        name: [use.use.edge for use in uses]
        for name, uses in direct.items()
        if all(type(use.rule) is Broadcast for use in uses)
    }
    for name, uses in direct.items():
        sides = {getattr(use.rule, "transposed", False) for use in uses}
        if len(sides) == 1 and all(_is_matrix(use.rule) for use in uses):
            transposed, edges = sides.pop(), [use.use.edge for use in uses]
            outputs = uses[0].rule.shape[1 if transposed else 0]
            biases = [
                bias
                for bias, its in shifts.items()
                if its == edges and batch.vmap_gradients.parameters[bias].shape == (outputs,)
            ]
            yield Layer(name, biases[0] if biases else None, transposed)


class KroneckerSum(Sum):
    r"""Two factors for each weight matrix and its bias; whole blocks of vectors; else diagonals.

    With :math:`T` positions, ``expand`` (Eschenhagen et al. 2023) takes

    .. math:: A = \frac1N \sum_n \frac1T \sum_t a_{nt} a_{nt}^\top, \qquad
              B = \frac1N \sum_n \sum_k \sum_t g_{nkt} g_{nkt}^\top ,

    and ``reduce`` first averages the inputs and sums the gradients over positions. Both are the
    factors of Martens and Grosse (2015) where there is one position. :math:`A` is the mean over
    the observations of the batches that use the matrix.
    """

    def __init__(self, space: ParameterSpace, reduce: bool = False) -> None:
        super().__init__(space)
        self.reduce = reduce
        self.layers: list[Layer] = []
        self.inputs: Vector = {}
        self.outputs: Vector = {}
        self._n_of: Counter[str] = Counter()
        self._others: dict[str, Sum] = {}

    def add(self, batch: BatchScores, columns: Iterator[Tensor]) -> None:
        self._place(batch)
        for layer, uses in self.uses(batch):
            self._n_of[layer.weight] += len(batch)
            row_bytes = sum(r.input[0].numel() * r.input.itemsize for r in uses)
            for part in memory.pieces(len(batch), row_bytes, memory.ROWS_BYTES):
                rows = layer.input_rows(uses, part)
                if self.reduce:
                    self._add(self.inputs[layer.weight], rows.mean(1))
                else:
                    self._add(self.inputs[layer.weight], rows.flatten(0, 1), 1 / rows.shape[1])
        super().add(batch, columns)

    def _place(self, batch: BatchScores) -> None:
        """Give room to every parameter that is used for the first time."""
        known = {*self._others}.union(*(layer.names for layer in self.layers))
        for layer in layers(batch):
            if known.isdisjoint(layer.names):
                shape = self.space.shapes[layer.weight]
                o = shape[1 if layer.transposed else 0]
                i = shape.numel() // o + (layer.bias is not None)
                self.inputs[layer.weight] = self.space.zeros(layer.names, i, i)
                self.outputs[layer.weight] = self.space.zeros(layer.names, o, o)
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
    def _add(total: Tensor, rows: Float[Tensor, "R _"], weight: float = 1.0) -> None:
        rows = rows.to(total)
        total.addmm_(rows.mT, rows, alpha=weight)

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for part, found in parts:
            for name in found.keys() & self._others.keys():
                self._others[name].add_by_vmap([(part, found)])

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for layer in self.layers:
            if layer.weight in found:
                rows = layer.output_rows(found[layer.weight])
                rows = rows.sum(1) if self.reduce else rows.flatten(0, 1)
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
            name: self.space.zeros([name], len(outputs), len(inputs))
            for name, (outputs, inputs) in self._bases.items()
        }
        self._inputs: dict[str, Tensor] = {}

    def add(self, batch: BatchScores, columns: Iterator[Tensor]) -> None:
        self._inputs = {}
        for layer, uses in self.first.uses(batch):
            basis = self._bases[layer.weight][1]
            self._inputs[layer.weight] = layer.input_rows(uses).to(basis) @ basis
        super().add(batch, columns)

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        """Nothing to do: what has no factors was summed in the first pass."""

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for name in found.keys() & self._inputs.keys():
            basis = self._bases[name][0]
            rows = Layer.output_rows(found[name]).to(basis) @ basis
            add_squared_products(self.moments[name], rows, self._inputs[name])

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


def _basis(factor: Float[Tensor, "O O"]) -> Float[Tensor, "O O"]:
    vectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    return vectors.contiguous()
