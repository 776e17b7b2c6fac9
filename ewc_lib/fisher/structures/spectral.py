r"""One matrix over some parameters, with its eigenvalues.

.. math:: F = U \, \mathrm{diag}(\lambda) \, U^\top

What the structures of this kind share: they turn named tensors into one array and back, and
solve and take determinants in the basis of the eigenvectors :math:`U`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector, ravel, unravel
from ewc_lib.fisher.structures.base import Fisher
from ewc_lib.fisher.structures.vectors import divide


class Spectral(Fisher):
    """One matrix over some parameters that knows its eigenvalues and eigenvectors."""

    parameter_shapes: dict[str, torch.Size]
    _TENSORS: ClassVar[tuple[str, ...]]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.parameter_shapes

    @property
    @abstractmethod
    def _spectrum(self) -> Tensor:
        """Eigenvalues, those of the size of a rounding error set to zero."""

    @abstractmethod
    def _to_basis(self, x: Tensor) -> Tensor:
        """Return the coordinates of an array in the basis of the eigenvectors."""

    @abstractmethod
    def _from_basis(self, coordinates: Tensor) -> Tensor:
        """Return the array with these coordinates."""

    def _pack(self, v: Vector) -> Tensor:
        """Turn named tensors into one array; here a vector, in the order of the shapes."""
        return ravel({name: v[name] for name in self.shapes})[0]

    def _packed(self, v: Vector) -> Tensor:
        """Pack a vector, or raise a ValueError if it has another precision than the matrix."""
        packed, own = self._pack(v), getattr(self, self._TENSORS[0]).dtype
        if packed.dtype != own:
            raise ValueError(
                f"the vector is {packed.dtype} and the matrix {own}; convert one, as by "
                "F.to(dtype=v.dtype)"
            )
        return packed

    def _unpack(self, x: Tensor) -> Vector:
        """Undo :meth:`_pack`."""
        return unravel(x, self.shapes)

    def _in_basis(self, v: Vector, change: Callable[[Tensor], Tensor]) -> Vector:
        """Change the coordinates of a vector in the basis of the eigenvectors."""
        return self._unpack(self._from_basis(change(self._to_basis(self._packed(v)))))

    def _solve(self, v: Vector, damping: float) -> Vector:
        return self._in_basis(v, lambda along: divide(along, self._spectrum + damping))

    def _logdet(self, damping: float) -> Float[Tensor, ""]:
        return (self._spectrum + damping).log().sum()

    def _check_like(self, other: Self) -> None:
        super()._check_like(other)
        if list(self.shapes) != list(other.shapes):
            raise ValueError("cannot add matrices whose parameters are in another order")

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in self._TENSORS}
        return replace(self, **changed)

    def _renamed(self, names: Mapping[str, str]) -> Self:
        shapes = {names[name]: shape for name, shape in self.shapes.items()}
        renamed: dict[str, Any] = {"parameter_shapes": shapes}
        return replace(self, paths={names[n]: path for n, path in self.paths.items()}, **renamed)

    def _over(self, shapes: dict[str, torch.Size], **tensors: Tensor) -> Self:
        """Return a matrix over other parameters."""
        own: dict[str, Any] = {"parameter_shapes": shapes, **tensors}
        return replace(self, paths=self._paths_of(shapes), **own)

    def _tensors(self) -> dict[str, Tensor]:
        shapes = {f"shape.{name}": torch.tensor(tuple(s)) for name, s in self.shapes.items()}
        return {name: getattr(self, name) for name in self._TENSORS} | shapes

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        shapes = {name: torch.Size(state[f"shape.{name}"].tolist()) for name in paths}
        own = {"parameter_shapes": shapes} | cls._read(state)
        return cls(n_samples, kind, paths, **own)

    @classmethod
    def _read(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the class has beyond the shapes, by name."""
        return {name: state[name].clone() for name in cls._TENSORS}


def without_rounding(
    eigenvalues: Tensor,
    size: int | None = None,
    scale: Tensor | None = None,
    axes: tuple[int, ...] = (-1,),
) -> Tensor:
    """Set those to zero that are no larger than the rounding error of a zero.

    ``size`` is that of the matrix, by default the number of its eigenvalues, which lie along
    ``axes``, and ``scale`` that of what they were computed from, by default the largest of them.
    """
    if not eigenvalues.numel():
        return eigenvalues
    epsilon = torch.finfo(eigenvalues.dtype).eps
    size = size or math.prod(eigenvalues.shape[axis] for axis in axes)
    scale = eigenvalues.abs().amax(axes, keepdim=True) if scale is None else scale
    return eigenvalues.where(eigenvalues.abs() > size * epsilon * scale, 0.0)
