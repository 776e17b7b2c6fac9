"""A few directions that hold most of the information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures.spectral import Spectral, without_rounding
from ewc_lib.fisher.structures.vectors import entries, positions


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Spectral):
    r"""A few eigenvectors over all parameters; what is orthogonal to them is taken as zero.

    .. math:: F \approx U \, \mathrm{diag}(\lambda) \, U^\top
              = \sum_{j=1}^k \lambda_j u_j u_j^\top

    ``F + G`` and :meth:`pool` are the exact sums of two such matrices, so the rank grows, up to
    the sum of both. The inverse of the damped matrix is that of Woodbury (1950),
    :math:`(F + \delta I)^{-1} = \frac1\delta (I - U\,\mathrm{diag}(\frac{\lambda_j}{\lambda_j +
    \delta})\,U^\top)`.

    Attributes
    ----------
    directions
        :math:`U`, ``[P, k]``, orthonormal columns, parameters in the order of
        ``parameter_shapes``.
    eigenvalues
        :math:`\lambda`, ``[k]``, in the units of the Fisher information.
    parameter_shapes
        Shapes of the parameters, by name.

    Examples
    --------
    >>> import torch
    >>> shapes = {"weight": torch.Size([1, 2]), "bias": torch.Size([1])}
    >>> directions = torch.tensor([[0.6], [0.8], [0.0]])
    >>> F = LowRank(10, "exact", dict.fromkeys(shapes, "rule"), directions, torch.ones(1), shapes)
    >>> F.diagonal()["weight"]
    tensor([[0.3600, 0.6400]])
    >>> (F + F).eigenvalues
    tensor([2.])
    """

    directions: Float[Tensor, "P k"]
    eigenvalues: Float[Tensor, " k"]
    parameter_shapes: dict[str, torch.Size]

    _TENSORS = ("directions", "eigenvalues")

    def diagonal(self) -> Vector:
        return self._unpack(self.directions.square() @ self.eigenvalues)

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self._from_basis(self.eigenvalues.diag()) @ self.directions.mT

    @property
    def _spectrum(self) -> Float[Tensor, " k"]:
        return without_rounding(self.eigenvalues, len(self.directions))

    def _to_basis(self, x: Float[Tensor, " P"]) -> Float[Tensor, " k"]:
        return self.directions.mT @ x

    def _from_basis(self, coordinates: Float[Tensor, " k"]) -> Float[Tensor, " P"]:
        return self.directions @ coordinates

    def _product(self, v: Vector) -> Vector:
        return self._in_basis(v, lambda along: self.eigenvalues * along)

    def _solve(self, v: Vector, damping: float) -> Vector:
        if damping == 0:
            return super()._solve(v, damping)
        share = self._spectrum / (self._spectrum + damping)
        spanned = self._in_basis(v, lambda along: share * along)
        return {name: (v[name] - part) / damping for name, part in spanned.items()}

    def _logdet(self, damping: float) -> Float[Tensor, ""]:
        spanned = super()._logdet(damping)
        size, rank = self.directions.shape
        left: Tensor = torch.special.xlogy(size - rank, spanned.new_tensor(damping))
        return spanned + left

    def _times(self, factor: float) -> Self:
        return replace(self, eigenvalues=factor * self.eigenvalues)

    def _plus(self, other: Self) -> Self:
        both = torch.cat([self.eigenvalues, other.eigenvalues])
        return self._spanned(torch.cat([self.directions, other.directions], 1), both, self.shapes)

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        if list(shapes.items()) == list(self.shapes.items()):
            return self
        size = sum(shape.numel() for shape in shapes.values())
        directions = self.directions.new_zeros(size, self.directions.shape[1])
        directions[positions(self.shapes, shapes).to(self.device)] = self.directions
        return self._over(shapes, directions=directions)

    def _congruent(self, scales: Mapping[str, float]) -> Self:
        shapes = {name: shape for name, shape in self.shapes.items() if name in scales}
        place = positions(shapes, self.shapes).to(self.device)
        factor = entries(scales, shapes).to(self.directions)
        return self._spanned(factor[:, None] * self.directions[place], self.eigenvalues, shapes)

    def _spanned(
        self,
        columns: Float[Tensor, "P k"],
        weights: Float[Tensor, " k"],
        shapes: dict[str, torch.Size],
    ) -> Self:
        """Return the sum of the weighted outer products of columns with themselves."""
        basis, triangle = torch.linalg.qr(columns)
        eigenvalues, rotation = torch.linalg.eigh(triangle * weights @ triangle.mT)
        scale = weights.abs().max() if weights.numel() else None
        kept = without_rounding(eigenvalues, len(basis), scale) != 0
        return self._over(
            shapes, directions=basis @ rotation[:, kept], eigenvalues=eigenvalues[kept]
        )
