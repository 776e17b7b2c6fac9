"""Sums that need the gradient of every observation in all parameters, one row each."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._checking import check_finite_sums
from ewc_lib._parameters import Vector, unravel
from ewc_lib.fisher.structures import BlockDiagonal, Dense, LowRank
from ewc_lib.fisher.sums import base
from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.score import memory
from ewc_lib.score.gradients import ParameterGradients


class RowSum(Sum):
    """What needs the gradient of every observation in all parameters, one row each."""

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._by_vmap: dict[str, list[Tensor]] = defaultdict(list)
        self._row_bytes = sum(
            shape.numel() * space.dtype_of(name).itemsize for name, shape in space.shapes.items()
        )
        device = next(iter(space.parameters.values())).device
        self._room = memory.budget(device).rows

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for _, found in parts:
            for name in found.keys() & self.space.shapes.keys():
                self._by_vmap[name].append(found[name])

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        by_vmap = {name: torch.cat([g[k] for g in gs]) for name, gs in self._by_vmap.items()}
        for part in memory.pieces(n, self._row_bytes, self._room):
            rows = {name: gradients.gradients(part) for name, gradients in found.items()}
            rows |= {name: gradients[part] for name, gradients in by_vmap.items()}
            self.add_rows(rows, part.stop - part.start)

    def end_block(self) -> None:
        self._by_vmap.clear()

    @abstractmethod
    def add_rows(self, rows: Vector, n: int) -> None:
        """Take some gradients of one column, ``[n, *shape]`` for every parameter it reaches."""

    def matrix(self, rows: Vector, names: list[str], n: int, like: Tensor) -> Float[Tensor, "n P"]:
        """Write the gradients of some parameters in one matrix; zero where there are none."""
        found = [
            rows[name].reshape(n, -1).to(like)
            if name in rows
            else like.new_zeros(n, self.space.shapes[name].numel())
            for name in names
        ]
        return torch.cat(found, 1)


class BlockSum(RowSum):
    """Sums of outer products over groups of parameters, one matrix a group."""

    def __init__(self, space: ParameterSpace, groups: list[list[str]]) -> None:
        super().__init__(space)
        sizes = [sum(self.space.shapes[name].numel() for name in group) for group in groups]
        self.groups = [
            (group, self.space.zeros(group, size, size))
            for group, size in zip(groups, sizes, strict=True)
        ]

    def add_rows(self, rows: Vector, n: int) -> None:
        for names, total in self.groups:
            if not rows.keys().isdisjoint(names):
                matrix = self.matrix(rows, names, n, total)
                total.addmm_(matrix.mT, matrix)

    def blocks(self, kind: str, paths: dict[str, str]) -> list[Dense]:
        """Return one matrix a group."""
        return [
            Dense(
                self.n,
                kind,
                {name: paths[name] for name in names},
                total / self.n,
                {name: self.space.shapes[name] for name in names},
            )
            for names, total in self.groups
        ]

    def mean(self, kind: str, paths: dict[str, str]) -> BlockDiagonal:
        return BlockDiagonal(self.n, kind, paths, tuple(self.blocks(kind, paths)))


class DenseSum(BlockSum):
    """One sum of outer products over all parameters."""

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space, [list(space.parameters)])

    def mean(self, kind: str, paths: dict[str, str]) -> Dense:  # type: ignore[override]
        return self.blocks(kind, paths)[0]


class LowRankSum(RowSum):
    """All gradients, and in the end the largest eigenvalues of their Gram matrix."""

    def __init__(self, space: ParameterSpace, rank: int) -> None:
        super().__init__(space)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank = rank
        self.names = list(space.parameters)
        self.size = sum(shape.numel() for shape in self.space.shapes.values())
        self.rows: list[Float[Tensor, "n P"]] = [self.space.zeros(self.names, 0, self.size)]
        self.count = 0

    def add_rows(self, rows: Vector, n: int) -> None:
        nothing = self.rows[0]
        self.count += n
        if self.count * self.size * nothing.itemsize > base.MAX_BYTES:
            raise ValueError(
                f"{self.count} gradients of {self.size} numbers take more than "
                f"{base.MAX_BYTES / 2**30:.0f} GiB; use n_samples, kind='sketch', or MatrixFree"
            )
        self.rows.append(self.matrix(rows, self.names, n, nothing))

    def mean(self, kind: str, paths: dict[str, str]) -> LowRank:
        rows = torch.cat(self.rows)
        live = rows.any(0)  # the others must have exactly no information
        rows = rows[:, live]
        few = len(rows) < rows.shape[1]
        gram = rows @ rows.mT if few else rows.mT @ rows
        if not gram.is_meta and not gram.isfinite().all():
            check_finite_sums(unravel(torch.cat(self.rows).square().sum(0), self.space.shapes))
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[: self.rank], vectors.flip(1)[:, : self.rank]
        kept = values > torch.finfo(values.dtype).eps * values[:1]
        values, vectors = values[kept], vectors[:, kept]
        if few:  # what is left of large eigenvectors in small ones must go: they are orthogonal
            vectors = torch.linalg.qr(rows.mT @ vectors).Q
        directions = vectors.new_zeros(self.size, len(values))
        directions[live] = vectors
        return LowRank(self.n, kind, paths, directions, values / self.n, self.space.shapes)
