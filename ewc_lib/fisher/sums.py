"""Sums over observations of the outer products of their gradients, one class a structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib.fisher.passes import Run
from ewc_lib.fisher.pulled import Pulled, sum_dtype
from ewc_lib.fisher.structures import BlockDiagonal, Dense, Diagonal, Fisher, LowRank, Vector

COLUMNS_AT_ONCE = 16
"""Output columns that the generic path takes with one forward pass."""

ROWS_BYTES = 2**25
"""Rows of observations are written out in pieces of this size."""

MAX_BYTES = 2**34
"""Larger matrices are refused: nobody means to ask for them."""


class Sum(ABC):
    """The sum over observations of one structure.

    Parameters
    ----------
    parameters
        The parameters, by name.
    dtype
        Precision of the sums; by default at least float32, else that of the parameters.
    device
        Where the sums are kept; by default with the parameters.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        self.n = 0
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.dtypes = {name: dtype or sum_dtype(p) for name, p in parameters.items()}
        self.devices = {name: device or p.device for name, p in parameters.items()}

    def add(self, run: Run, columns: Iterator[Tensor]) -> None:
        """Add all columns of one batch."""
        self.n += len(run)
        with torch.no_grad():
            while block := list(islice(columns, COLUMNS_AT_ONCE)):
                self.add_generic(run.generic_gradients(block))
                for k, column in enumerate(block):
                    self.add_column(run.pull(column), k, len(column))
                self.end_block()

    @abstractmethod
    def add_generic(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        """Take the gradients ``[K, n, *shape]`` of a block on the generic path, part by part."""

    @abstractmethod
    def add_column(self, found: dict[str, Pulled], k: int, n: int) -> None:
        """Add column number ``k`` of the block, of ``n`` observations."""

    def end_block(self) -> None:  # noqa: B027  (most have nothing to finish)
        """Finish what the columns of a block have in common."""

    @abstractmethod
    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        """Divide by the number of observations."""

    def zeros(self, names: Iterable[str], *size: int) -> Tensor:
        """Return a sum to start with, for the given parameters."""
        names = list(names)
        dtype = max((self.dtypes[name] for name in names), key=lambda d: d.itemsize)
        if (needed := torch.Size(size).numel() * dtype.itemsize) > MAX_BYTES:
            raise ValueError(
                f"a matrix of {' × '.join(map(str, size))} for {', '.join(map(repr, names[:3]))}"
                f"{' ...' if len(names) > 3 else ''} takes {needed / 2**30:.0f} GiB; choose "
                "fewer parameters, a smaller structure, or MatrixFree"
            )
        return torch.zeros(size, dtype=dtype, device=self.devices[names[0]])


class DiagonalSum(Sum):
    """Sums of squares, one tensor a parameter."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__(parameters, dtype, device)
        self.sums = {
            name: torch.zeros(shape, dtype=self.dtypes[name], device=self.devices[name])
            for name, shape in self.shapes.items()
        }
        self._terms: dict[str, tuple[Pulled, Tensor]] = {}

    def add_generic(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for _, found in parts:
            for name in found.keys() & self.sums.keys():
                squares = found[name].to(self.dtypes[name]).square().sum((0, 1))
                self.sums[name] += squares.to(self.devices[name])

    def add_column(self, found: dict[str, Pulled], k: int, n: int) -> None:
        for name, pulled in found.items():
            if not pulled.one_term:
                self._add(name, pulled.add_squares, pulled.arrived[0])
            elif name in self._terms:
                self._terms[name][1].addcmul_(pulled.arrived[0], pulled.arrived[0])
            else:
                self._terms[name] = pulled, pulled.arrived[0].square()

    def end_block(self) -> None:
        for name, (pulled, squared) in self._terms.items():
            self._add(name, partial(pulled.add_squares_of_terms, squared=squared), squared)
        self._terms = {}

    def _add(self, name: str, add: Callable[[Tensor], None], like: Tensor) -> None:
        """Add to the sum in place if it is like the gradients, else to a part that then joins."""
        total = self.sums[name]
        if (total.device, total.dtype) == (like.device, like.dtype):
            add(total)
        else:
            part = like.new_zeros(total.shape)
            add(part)
            total += part.to(total)

    def mean(self, kind: str, paths: dict[str, str]) -> Diagonal:
        values = {name: total / self.n for name, total in self.sums.items()}
        return Diagonal(self.n, kind, {name: paths[name] for name in values}, values)


class RowSum(Sum):
    """What needs the gradient of every observation in all parameters, one row each."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__(parameters, dtype, device)
        self._generic: dict[str, list[Tensor]] = defaultdict(list)
        self._row_bytes = sum(
            shape.numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    def add_generic(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for _, found in parts:
            for name in found.keys() & self.shapes.keys():
                self._generic[name].append(found[name])

    def add_column(self, found: dict[str, Pulled], k: int, n: int) -> None:
        generic = {name: torch.cat([g[k] for g in gs]) for name, gs in self._generic.items()}
        for part in pieces(n, self._row_bytes):
            rows = {name: pulled.gradients(part) for name, pulled in found.items()}
            rows |= {name: gradients[part] for name, gradients in generic.items()}
            self.add_rows(rows, part.stop - part.start)

    def end_block(self) -> None:
        self._generic.clear()

    @abstractmethod
    def add_rows(self, rows: Vector, n: int) -> None:
        """Take some gradients of one column, ``[n, *shape]`` for every parameter it reaches."""

    def matrix(self, rows: Vector, names: list[str], n: int, like: Tensor) -> Float[Tensor, "n P"]:
        """Write the gradients of some parameters in one matrix; zero where there are none."""
        found = [
            rows[name].reshape(n, -1).to(like)
            if name in rows
            else like.new_zeros(n, self.shapes[name].numel())
            for name in names
        ]
        return torch.cat(found, 1)


def pieces(n: int, row_bytes: int) -> Iterator[slice]:
    """Cut ``n`` rows into pieces of bounded size."""
    step = max(1, ROWS_BYTES // max(1, row_bytes))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


class BlockSum(RowSum):
    """Sums of outer products over groups of parameters, one matrix a group."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
        groups: list[list[str]],
    ) -> None:
        super().__init__(parameters, dtype, device)
        sizes = [sum(self.shapes[name].numel() for name in group) for group in groups]
        self.groups = [
            (group, self.zeros(group, size, size))
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
                {name: self.shapes[name] for name in names},
            )
            for names, total in self.groups
        ]

    def mean(self, kind: str, paths: dict[str, str]) -> BlockDiagonal:
        return BlockDiagonal(self.n, kind, paths, tuple(self.blocks(kind, paths)))


class DenseSum(BlockSum):
    """One sum of outer products over all parameters."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__(parameters, dtype, device, [list(parameters)])

    def mean(self, kind: str, paths: dict[str, str]) -> Dense:  # type: ignore[override]
        return self.blocks(kind, paths)[0]


class LowRankSum(RowSum):
    """All gradients, and in the end the largest eigenvalues of their Gram matrix."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype | None,
        device: torch.device | None,
        rank: int,
    ) -> None:
        super().__init__(parameters, dtype, device)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank = rank
        self.names = list(parameters)
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self.rows: list[Float[Tensor, "n P"]] = [self.zeros(self.names, 0, self.size)]
        self.count = 0

    def add_rows(self, rows: Vector, n: int) -> None:
        nothing = self.rows[0]
        self.count += n
        if self.count * self.size * nothing.itemsize > MAX_BYTES:
            raise ValueError(
                f"{self.count} gradients of {self.size} numbers take more than "
                f"{MAX_BYTES / 2**30:.0f} GiB; use n_samples, kind='sketch', or MatrixFree"
            )
        self.rows.append(self.matrix(rows, self.names, n, nothing))

    def mean(self, kind: str, paths: dict[str, str]) -> LowRank:
        rows = torch.cat(self.rows)
        live = rows.any(0)  # the others must have exactly no information
        rows = rows[:, live]
        few = len(rows) < rows.shape[1]
        values, vectors = torch.linalg.eigh(rows @ rows.mT if few else rows.mT @ rows)
        values, vectors = values.flip(0)[: self.rank], vectors.flip(1)[:, : self.rank]
        kept = values > torch.finfo(values.dtype).eps * values[:1]
        values, vectors = values[kept], vectors[:, kept]
        if few:  # what is left of large eigenvectors in small ones must go: they are orthogonal
            vectors = torch.linalg.qr(rows.mT @ vectors).Q
        directions = vectors.new_zeros(self.size, len(values))
        directions[live] = vectors
        return LowRank(self.n, kind, paths, directions, values / self.n, self.shapes)
