"""Only the diagonal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._foreach import each
from ewc_lib._parameters import Vector, ravel
from ewc_lib._sharded import total
from ewc_lib.fisher.structures.base import Fisher, Join
from ewc_lib.fisher.structures.vectors import divide, padded


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Fisher):
    """Only the diagonal; everything off it is taken as zero.

    Attributes
    ----------
    values
        One tensor for each parameter, of its shape.
    """

    values: Vector

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.values.items()}

    def diagonal(self) -> Vector:
        return dict(self.values)

    def to_dense(self) -> Float[Tensor, "P P"]:
        return ravel(self.values)[0].diag()

    def _product(self, v: Vector) -> Vector:
        return each("mul", self.values, v)

    def _solve(self, v: Vector, damping: float) -> Vector:
        return {name: divide(v[name], value + damping) for name, value in self.values.items()}

    def _logdet(self, damping: float) -> Float[Tensor, ""]:
        return total([(d + damping).log().sum() for d in self.values.values()])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, values={name: change(d) for name, d in self.values.items()})

    def _times(self, factor: float) -> Self:
        return self._map(lambda d: factor * d)

    def _plus(self, other: Self) -> Self:
        return replace(self, values={k: d + other.values[k] for k, d in self.values.items()})

    def _renamed(self, names: Mapping[str, str]) -> Self:
        values = {names[name]: value for name, value in self.values.items()}
        return replace(
            self, paths={names[n]: path for n, path in self.paths.items()}, values=values
        )

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        values = {
            name: padded(self.values[name], shape)
            if name in self.values
            else nothing.new_zeros(shape)
            for name, shape in shapes.items()
        }
        return replace(self, paths=self._paths_of(shapes), values=values)

    def _congruent(self, scales: Mapping[str, float]) -> Self:
        values = {name: d * scales[name] ** 2 for name, d in self.values.items() if name in scales}
        return replace(self, paths=self._paths_of(values), values=values)

    def _united(
        self, other: Self, shapes: dict[str, torch.Size], join: Join = operator.add
    ) -> Self:
        """Join what both hold; the others stay where they are, in their own precision."""
        like = {**self.values, **other.values}
        ours, theirs = (
            replace(
                one,
                paths=one._paths_of(shapes),
                values={n: one.values.get(n, torch.zeros_like(like[n])) for n in shapes},
            )
            for one in (self, other)
        )
        found: Self = join(ours, theirs)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {f"diagonal.{name}": d for name, d in self.values.items()}

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        values = {name: state[f"diagonal.{name}"].clone() for name in paths}
        return cls(n_samples, kind, paths, values)
