"""Sums over observations of the outer products of their gradients, one class a structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from ewc_lib.fisher.capture import gradients, squares, sum_dtype
from ewc_lib.fisher.passes import Passes
from ewc_lib.fisher.structures import Dense, Diagonal, Fisher, Vector

COLUMNS_AT_ONCE = 16
"""Output columns that the generic path takes with one forward pass."""


class Sum(ABC):
    """The sum over observations of one structure."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        self.n = 0
        self.dtypes = {name: dtype or sum_dtype(p) for name, p in parameters.items()}

    def add(self, passes: Passes, found: Iterator[Tensor], n: int) -> None:
        """Add all columns of one batch."""
        self.n += n
        with torch.no_grad():
            while block := list(islice(found, COLUMNS_AT_ONCE)):
                self.add_block(passes, block)

    @abstractmethod
    def add_block(self, passes: Passes, block: list[Tensor]) -> None:
        """Add some columns of one batch."""

    @abstractmethod
    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        """Divide by the number of observations."""


class DiagonalSum(Sum):
    """Sums of squares, one tensor a parameter."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        super().__init__(parameters, dtype)
        self.sums = {
            name: torch.zeros_like(p, dtype=self.dtypes[name], requires_grad=False)
            for name, p in parameters.items()
        }

    def add_block(self, passes: Passes, block: list[Tensor]) -> None:
        for column in block:
            for name, uses in passes.pull(column).items():
                self.sums[name] += squares([use.to(self.dtypes[name]) for use in uses])
        if passes.by_generic:
            for _, found in passes.generic_gradients(torch.stack(block)):
                for name, g in found.items():
                    self.sums[name] += g.to(self.dtypes[name]).square().sum((0, 1))

    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        values = {name: total / self.n for name, total in self.sums.items()}
        return Diagonal(self.n, kind, paths, values)


class DenseSum(Sum):
    """One sum of outer products over all parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        super().__init__(parameters, dtype)
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.dtype = max(self.dtypes.values(), key=lambda d: d.itemsize)
        device = next(iter(parameters.values())).device
        size = sum(shape.numel() for shape in self.shapes.values())
        self.sum = torch.zeros(size, size, dtype=self.dtype, device=device)

    def add_block(self, passes: Passes, block: list[Tensor]) -> None:
        generic: dict[str, list[Tensor]] = defaultdict(list)
        if passes.by_generic:
            for _, found in passes.generic_gradients(torch.stack(block)):
                for name, g in found.items():
                    generic[name].append(g.to(self.dtype))
        for k, column in enumerate(block):
            rows = {
                name: gradients([use.to(self.dtype) for use in uses])
                for name, uses in passes.pull(column).items()
            }
            rows |= {name: torch.cat([g[k] for g in parts]) for name, parts in generic.items()}
            matrix = self._matrix(rows, len(column))
            self.sum += matrix.mT @ matrix

    def _matrix(self, rows: Vector, n: int) -> Tensor:
        """Gradients of one column, ``[n, P]``; zero for unused parameters."""
        pieces = [
            rows[name].reshape(n, -1) if name in rows else self.sum.new_zeros(n, shape.numel())
            for name, shape in self.shapes.items()
        ]
        return torch.cat(pieces, 1)

    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        return Dense(self.n, kind, paths, self.sum / self.n, self.shapes)


SUMS: dict[str, type[Sum]] = {"diagonal": DiagonalSum, "dense": DenseSum}
