"""The whole matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures.spectral import Spectral, without_rounding
from ewc_lib.fisher.structures.vectors import entries, positions


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Spectral):
    """The whole matrix: exact, and only for small models.

    Attributes
    ----------
    matrix
        ``[P, P]``, parameters in the order of ``parameter_shapes``.
    parameter_shapes
        Shapes of the parameters, by name.
    """

    matrix: Float[Tensor, "P P"]
    parameter_shapes: dict[str, torch.Size]

    _TENSORS = ("matrix",)

    def diagonal(self) -> Vector:
        return self._unpack(self.matrix.diagonal())

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self.matrix

    @cached_property
    def _eigen(self) -> tuple[Float[Tensor, " P"], Float[Tensor, "P P"]]:
        return tuple(torch.linalg.eigh(self.matrix))

    @property
    def _spectrum(self) -> Float[Tensor, " P"]:
        return without_rounding(self._eigen[0])

    def _to_basis(self, x: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        return self._eigen[1].mT @ x

    def _from_basis(self, coordinates: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        return self._eigen[1] @ coordinates

    def _product(self, v: Vector) -> Vector:
        return self._unpack(self.matrix @ self._packed(v))

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        if list(shapes.items()) == list(self.shapes.items()):
            return self
        size = sum(shape.numel() for shape in shapes.values())
        place = positions(self.shapes, shapes).to(self.device)
        matrix = self.matrix.new_zeros(size, size)
        matrix[place[:, None], place] = self.matrix
        return self._over(shapes, matrix=matrix)

    def _congruent(self, scales: Mapping[str, float]) -> Self:
        shapes = {name: shape for name, shape in self.shapes.items() if name in scales}
        place = positions(shapes, self.shapes).to(self.device)
        factor = entries(scales, shapes).to(self.matrix)
        matrix = factor[:, None] * self.matrix[place[:, None], place] * factor
        return self._over(shapes, matrix=matrix)

    def _times(self, factor: float) -> Self:
        return replace(self, matrix=factor * self.matrix)

    def _plus(self, other: Self) -> Self:
        return replace(self, matrix=self.matrix + other.matrix)
