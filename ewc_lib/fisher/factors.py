r"""Sums of Kronecker factors, and of squares in their eigenvectors.

The gradient of a weight matrix is :math:`G_n = \sum_t g_{nt} a_{nt}^\top` over the positions
:math:`t` at which the matrix is used: those of a sequence, of an image, or of several calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib.fisher.passes import Run
from ewc_lib.fisher.pulled import Pulled, Reading
from ewc_lib.fisher.rules import (
    Broadcast,
    Convolution,
    OuterProduct,
    Rule,
    add_squared_products,
)
from ewc_lib.fisher.structures import BlockDiagonal, EigenKronecker, Fisher, Kronecker
from ewc_lib.fisher.sums import BlockSum, DiagonalSum, Sum

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

    def input_rows(self, readings: list[Reading]) -> Float[Tensor, "N T I"]:
        """Return the inputs at all positions, with a constant 1 for the bias."""
        rows = torch.cat([_matrix_rule(r).input_rows(r.input) for r in readings], 1)
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2) if self.bias else rows

    @staticmethod
    def output_rows(pulled: Pulled) -> Float[Tensor, "N T O"]:
        """Return the gradients of the outputs at all positions."""
        pairs = zip(pulled.readings, pulled.arrived, strict=True)
        return torch.cat([_matrix_rule(r).output_rows(g) for r, g in pairs], 1)


def _matrix_rule(reading: Reading) -> OuterProduct | Convolution:
    assert _is_matrix(reading.rule)
    return reading.rule  # type: ignore[return-value]


def _is_matrix(rule: Rule) -> bool:
    return isinstance(rule, OuterProduct) or (type(rule) is Convolution and rule.groups == 1)


def layers(run: Run) -> Iterator[Layer]:
    """Find the parameters of a batch that are matrices wherever they are used."""
    edges = {
        name: [reading.use.edge for reading in readings.values()]
        for name, readings in run.readings.items()
    }
    shifts = [
        name
        for name, readings in run.readings.items()
        if all(type(r.rule) is Broadcast and r.source.dim() == 1 for r in readings.values())
    ]
    for name, readings in run.readings.items():
        rules = [reading.rule for reading in readings.values()]
        own = all(reading.source is run.generic.parameters[name] for reading in readings.values())
        sides = {isinstance(rule, OuterProduct) and rule.transposed for rule in rules}
        if own and len(sides) == 1 and all(map(_is_matrix, rules)):
            biases = [bias for bias in shifts if edges[bias] == edges[name]]
            yield Layer(name, biases[0] if biases else None, sides.pop())


class KroneckerSum(Sum):
    r"""Two factors for each weight matrix and its bias; whole blocks of vectors; else diagonals.

    With :math:`T` positions, ``expand`` (Eschenhagen et al. 2023) takes

    .. math:: A = \frac1N \sum_n \frac1T \sum_t a_{nt} a_{nt}^\top, \qquad
              B = \frac1N \sum_n \sum_k \sum_t g_{nkt} g_{nkt}^\top ,

    and ``reduce`` first averages the inputs and sums the gradients over positions. Both are the
    factors of Martens and Grosse (2015) where there is one position.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
        reduce: bool = False,
    ) -> None:
        super().__init__(parameters, dtype, device)
        self.reduce = reduce
        self._options = dtype, device
        self._parameters = parameters
        self.layers: list[Layer] = []

    def add(self, run: Run, columns: Iterator[Tensor]) -> None:
        if self.n == 0:
            self._start(list(layers(run)))
        for layer in self.layers:
            if layer.weight in run.by_generic:
                raise ValueError(
                    f"parameter {layer.weight!r} is used as a matrix in one batch and in another "
                    "way in the next: it has no Kronecker factors; choose structure='diagonal'"
                )
            if layer.weight in run.readings:
                rows = layer.input_rows(list(run.readings[layer.weight].values()))
                rows = rows.mean(1) if self.reduce else rows.flatten(0, 1) / rows.shape[1] ** 0.5
                self._add(self.inputs[layer.weight], rows)
        super().add(run, columns)

    def _start(self, found: list[Layer]) -> None:
        """Make room for the factors, once a batch has shown which parameters have some."""
        self.layers = found
        self.inputs, self.outputs = {}, {}
        for layer in found:
            shape = self.shapes[layer.weight]
            o = shape[1 if layer.transposed else 0]
            i = shape.numel() // o + (layer.bias is not None)
            self.inputs[layer.weight] = self.zeros(layer.names, i, i)
            self.outputs[layer.weight] = self.zeros(layer.names, o, o)
        of_layers = {name for layer in found for name in layer.names}
        rest = {name: p for name, p in self._parameters.items() if name not in of_layers}
        vectors = {name: p for name, p in rest.items() if p.dim() < 2 and p.numel() <= MAX_VECTOR}
        others = {name: p for name, p in rest.items() if name not in vectors}
        self.vectors = BlockSum(vectors, *self._options, groups=[[name] for name in vectors])
        self.others = DiagonalSum(others, *self._options)

    @staticmethod
    def _add(total: Tensor, rows: Float[Tensor, "R _"]) -> None:
        rows = rows.to(total)
        total.addmm_(rows.mT, rows)

    def add_generic(self, run: Run, block: list[Tensor]) -> None:
        self.vectors.add_generic(run, block)
        self.others.add_generic(run, block)

    def add_column(self, found: dict[str, Pulled], k: int, n: int) -> None:
        for layer in self.layers:
            if layer.weight in found:
                rows = layer.output_rows(found[layer.weight])
                rows = rows.sum(1) if self.reduce else rows.flatten(0, 1)
                self._add(self.outputs[layer.weight], rows)
        for part in (self.vectors, self.others):
            part.add_column({n: p for n, p in found.items() if n in part.shapes}, k, n)

    def end_block(self) -> None:
        self.others.end_block()

    def mean(self, kind: str, paths: dict[str, str]) -> BlockDiagonal:
        blocks = [
            Kronecker(
                self.n,
                kind,
                {name: paths[name] for name in layer.names},
                self.outputs[layer.weight] / self.n,
                self.inputs[layer.weight] / self.n,
                {name: self.shapes[name] for name in layer.names},
                layer.transposed,
            )
            for layer in self.layers
        ]
        return BlockDiagonal(self.n, kind, paths, (*blocks, *self.rest(kind, paths)))

    def rest(self, kind: str, paths: dict[str, str]) -> list[Fisher]:
        """Return the blocks of all parameters that are no matrices."""
        self.vectors.n = self.others.n = self.n
        diagonal = [self.others.mean(kind, paths)] if self.others.shapes else []
        return [*self.vectors.blocks(kind, paths), *diagonal]


class EigenKroneckerSum(Sum):
    """Squares in the eigenvectors of Kronecker factors, which a first pass has found."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
        first: KroneckerSum,
    ) -> None:
        super().__init__(parameters, dtype, device)
        self.first = first
        self._bases = {
            name: (_basis(first.outputs[name]), _basis(a)) for name, a in first.inputs.items()
        }
        self.moments = {
            name: self.zeros([name], len(outputs), len(inputs))
            for name, (outputs, inputs) in self._bases.items()
        }
        self._inputs: dict[str, Tensor] = {}

    def add(self, run: Run, columns: Iterator[Tensor]) -> None:
        self._inputs = {}
        for layer in self.first.layers:
            if readings := run.readings.get(layer.weight):
                basis = self._bases[layer.weight][1]
                self._inputs[layer.weight] = (
                    layer.input_rows(list(readings.values())).to(basis) @ basis
                )
        super().add(run, columns)

    def add_generic(self, run: Run, block: list[Tensor]) -> None:
        """Nothing to do: what has no factors was summed in the first pass."""

    def add_column(self, found: dict[str, Pulled], k: int, n: int) -> None:
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
                {name: self.shapes[name] for name in layer.names},
                layer.transposed,
            )
            for layer in self.first.layers
        ]
        return BlockDiagonal(self.n, kind, paths, (*blocks, *self.first.rest(kind, paths)))


def _basis(factor: Float[Tensor, "O O"]) -> Float[Tensor, "O O"]:
    vectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    return vectors.contiguous()
