"""Several Fisher informations side by side."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector, unravel
from ewc_lib.fisher.structures.base import Fisher, Join
from ewc_lib.fisher.structures.dense import Dense
from ewc_lib.fisher.structures.states import under

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Fisher):
    r"""One block for each group of parameters; what lies between groups is taken as zero.

    .. math:: F \approx \begin{pmatrix} F_1 & & \\ & \ddots & \\ & & F_B \end{pmatrix}

    A block is any Fisher information of its own parameters: dense, diagonal, Kronecker. Every
    operation is done block by block, so what a block refuses (the sum of two Kronecker
    products) is refused here.

    Attributes
    ----------
    blocks
        Of the same observations and kind, each parameter in one of them. :attr:`paths` gives
        the order of the parameters.

    Raises
    ------
    ValueError
        If a parameter is in no block or in two, or if the blocks are of different kinds or
        numbers of observations.

    Examples
    --------
    >>> import torch
    >>> from ewc_lib.fisher import Diagonal
    >>> a, b = (Diagonal(10, "exact", {n: "rule"}, {n: torch.ones(2)}) for n in "ab")
    >>> F = BlockDiagonal(10, "exact", a.paths | b.paths, (a, 3 * b))
    >>> F.diagonal()
    {'a': tensor([1., 1.]), 'b': tensor([3., 3.])}
    """

    blocks: tuple[Fisher, ...]

    def __post_init__(self) -> None:
        names = [name for block in self.blocks for name in block.shapes]
        if sorted(names) != sorted(self.paths):
            raise ValueError(
                f"each of the parameters {list(self.paths)} must be in one block, got {names}"
            )
        for block in self.blocks:
            if (block.kind, block.n_samples) != (self.kind, self.n_samples):
                raise ValueError(
                    f"the block of {list(block.shapes)} is of {block.n_samples} observations and "
                    f"kind {block.kind!r} instead of {self.n_samples} and {self.kind!r}"
                )

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self._merge(lambda block: block.shapes)

    def _form(self) -> str:
        numbers = Counter(block._form() for block in self.blocks)
        return f"{super()._form()}[{', '.join(f'{n} {form}' for form, n in numbers.items())}]"

    @property
    def keeps(self) -> dict[str, str]:
        found = self._merge(lambda block: block.keeps)
        return {name: "block" if kept == "dense" else kept for name, kept in found.items()}

    def diagonal(self) -> Vector:
        return self._merge(lambda block: block.diagonal())

    def to_dense(self) -> Float[Tensor, "P P"]:
        size = sum(shape.numel() for shape in self.shapes.values())
        places = unravel(torch.arange(size), self.shapes)
        parts = [block.to_dense() for block in self.blocks]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        matrix = torch.zeros(size, size, dtype=dtype, device=parts[0].device)
        for block, part in zip(self.blocks, parts, strict=True):
            place = torch.cat([places[name].flatten() for name in block.shapes])
            matrix[place[:, None], place] = part.to(dtype)
        return matrix

    def _merge(self, found: Callable[[Fisher], dict[str, T]]) -> dict[str, T]:
        """Ask every block, and put what it finds for its parameters in the common order."""
        merged = {name: value for block in self.blocks for name, value in found(block).items()}
        return {name: merged[name] for name in self.paths}

    def _product(self, v: Vector) -> Vector:
        return self._merge(lambda block: block._product(_part(v, block)))

    def _solve(self, v: Vector, damping: float) -> Vector:
        return self._merge(lambda block: block.solve(_part(v, block), damping))

    def _logdet(self, damping: float) -> Float[Tensor, ""]:
        return torch.stack([block.logdet(damping) for block in self.blocks]).sum()

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, blocks=tuple(block._map(change) for block in self.blocks))

    def _times(self, factor: float) -> Self:
        return replace(self, blocks=tuple(factor * block for block in self.blocks))

    def _plus(self, other: Self) -> Self:
        return self._joined(other, operator.add)

    def _pooled(self, other: Self, weight: float) -> Self:
        return self._joined(other, lambda block, its: block.pool(its))

    def _joined(self, other: Self, join: Callable[[Fisher, Fisher], Fisher]) -> Self:
        blocks = tuple(map(join, self.blocks, other.blocks))
        return replace(self, n_samples=blocks[0].n_samples, blocks=blocks)

    def _renamed(self, names: Mapping[str, str]) -> Self:
        paths = {names[name]: path for name, path in self.paths.items()}
        return replace(self, paths=paths, blocks=tuple(b._renamed(names) for b in self.blocks))

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        """Let blocks grow; a parameter that is in none of them has no place here."""
        blocks = tuple(b._embedded({n: shapes[n] for n in b.shapes}) for b in self.blocks)
        return replace(self, blocks=blocks)

    def _congruent(self, scales: Mapping[str, float]) -> Self:
        parts = [({n: scales[n] for n in b.shapes if n in scales}, b) for b in self.blocks]
        blocks = tuple(block._congruent(kept) for kept, block in parts if kept)
        paths = {name: path for name, path in self.paths.items() if name in scales}
        return replace(self, paths=paths, blocks=blocks)

    def _united(
        self, other: Self, shapes: dict[str, torch.Size], join: Join = operator.add
    ) -> Self:
        """Join the blocks that share parameters, where their groups differ as one block."""
        self._check_kind(other)
        if [b.shapes for b in self.blocks] == [b.shapes for b in other.blocks]:
            found: Self = join(self, other)
            return found
        n = self.n_samples + other.n_samples
        parts = [_united(*sides, shapes, join) for sides in _sharing(self.blocks, other.blocks)]
        blocks = tuple(replace(block, n_samples=n) for block in parts)
        united = replace(self, n_samples=n, paths=self._paths_of(shapes), blocks=blocks)
        return self._over_both(united, other)

    def _check_like(self, other: Self) -> None:
        super()._check_like(other)
        ours, theirs = ([list(b.shapes) for b in one.blocks] for one in (self, other))
        if ours != theirs:
            raise ValueError(f"cannot add blocks of {theirs} to blocks of {ours}")

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"block.{i}.{key}": tensor
            for i, block in enumerate(self.blocks)
            for key, tensor in block.state_dict().items()
        }

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        blocks: list[Fisher] = []
        while own := under(f"block.{len(blocks)}.", state):
            blocks.append(Fisher.from_state_dict(own))
        return cls(n_samples, kind, paths, tuple(blocks))


def _part(v: Vector, block: Fisher) -> Vector:
    return {name: v[name] for name in block.shapes}


def _sharing(
    ours: Iterable[Fisher], theirs: Iterable[Fisher]
) -> list[tuple[list[Fisher], list[Fisher]]]:
    """Put those together, of two sides, that have parameters in common, also through others."""
    groups: list[tuple[list[Fisher], list[Fisher]]] = [([block], []) for block in ours]
    for block in theirs:
        touched = [
            g for g in groups if any(b.shapes.keys() & block.shapes.keys() for b in g[0] + g[1])
        ]
        left = [own for g in touched for own in g[0]]
        right = [own for g in touched for own in g[1]]
        groups = [g for g in groups if g not in touched] + [(left, [*right, block])]
    return groups


def _united(
    ours: list[Fisher], theirs: list[Fisher], shapes: dict[str, torch.Size], join: Join
) -> Fisher:
    """Join the blocks of two sides to a single one."""
    if not (ours and theirs):
        return (ours + theirs)[0]
    a, b = _whole(ours), _whole(theirs)
    if type(a) is not type(b):
        a, b = _dense(a), _dense(b)
    own = {name: shape for name, shape in shapes.items() if name in {**a.shapes, **b.shapes}}
    if a.shapes.keys() == b.shapes.keys():
        own = a.shapes  # in the order that a block has
    return a._united(b, own, join)


def _whole(blocks: list[Fisher]) -> Fisher:
    """Return one block of several."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    paths = {name: path for block in blocks for name, path in block.paths.items()}
    return _dense(BlockDiagonal(first.n_samples, first.kind, paths, tuple(blocks)))


def _dense(block: Fisher) -> Fisher:
    """Return the whole matrix of a block."""
    about = block.n_samples, block.kind, block.paths
    return Dense(*about, block.to_dense(), block.shapes, tolerance=block.tolerance)
