r"""Proximal steps with a precision that couples parameters.

.. math:: (S^{-1} + \lambda A)\, x = S^{-1} d - \lambda A\, c

with the rates :math:`S`, the displacement :math:`d` of what moves, that of the constants
:math:`c`, and what is left of the first, :math:`x`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc_lib._anchored import product, solve
from ewc_lib._foreach import each
from ewc_lib._metric import Rates
from ewc_lib._multiplier import MOST
from ewc_lib._parameters import Vector, ravel, unravel
from ewc_lib._sharded import placed_like, whole
from ewc_lib.fisher.iterative import conjugate_gradients
from ewc_lib.fisher.structures import Fisher
from ewc_lib.fisher.structures.base import NotKept

MOST_STIFF = 1e8
"""Where only products solve: beyond this stiffness what has information is at its end anyway."""

LEAST = 1e-30
"""A strength times a rate that does nothing; its inverse is not beyond single precision."""

MOST_PRODUCTS = 1000
"""Of conjugate gradients, where only products solve."""


def above_zero(rates: Rates) -> Rates:
    """Return the rates of what moves at all."""
    moving = {name: number for name, number in rates.numbers.items() if number > 0}
    return Rates(moving, {name: P for name, P in rates.divisors.items() if name in moving})


class Coupled:
    """Rates of whole parameters: the same matrix from step to step, with its eigenvectors.

    ``scales`` are the roots of the rates, relative to the largest.
    """

    def __init__(self, precision: Fisher, scales: dict[str, float]) -> None:
        self.precision, self.scales = precision, scales
        self._system = _scaled(precision, scales)

    def at(self, top: float) -> AtRate:
        """Return it with the largest rate."""
        return AtRate(self, top)

    def left(self, factor: float, moved: Vector) -> Vector:
        r"""Return what is left of the displacements :math:`d`.

        With :math:`S` the scales, the largest rate in the factor :math:`f`, and the constants
        :math:`c`, it is :math:`S u`, where

        .. math:: (I + f S A S)\, (u + w) = S^{-1} d + w, \qquad S A S\, w = S A c
        """
        start = {name: moved[name] / scale for name, scale in self.scales.items()}
        fixed = self._fixed_part(moved) if len(start) < len(moved) else {}
        start = each("add", start, fixed) if fixed else start
        left = self.resolved(factor, start)
        left = each("sub", left, fixed) if fixed else left
        return {name: scale * left[name] for name, scale in self.scales.items()}

    def _fixed_part(self, moved: Vector) -> Vector:
        """Return where the constants pull, :math:`w`; what they do not reach is left alone."""
        rest = {n: torch.zeros_like(d) if n in self.scales else d for n, d in moved.items()}
        pull = product(self.precision, rest)
        b = {name: scale * pull[name] for name, scale in self.scales.items()}
        if self._system is not None:
            return solve(self._system, b)
        return self._by_products(b)

    def resolved(self, factor: float, b: Vector) -> Vector:
        r"""Return the solution of :math:`(I + f S A S)\, u = b`."""
        if factor < LEAST:
            return b
        if self._system is not None:
            return each("div", solve(self._system, b, damping=1 / factor), factor)
        return self._by_products(b, factor)

    def _by_products(self, b: Vector, factor: float | None = None) -> Vector:
        r"""Solve :math:`(I + f S A S)\, u = b` by products alone, to the rounding error.

        Without a factor it is :math:`S A S\, u = b`.
        """
        own = 0.0 if factor is None else 1.0
        top = max(float(whole(d).abs().max()) for d in self.precision.diagonal().values())
        factor = 1.0 if factor is None else min(factor, MOST_STIFF / max(top, 1 / MOST_STIFF))
        start = {name: whole(value) for name, value in b.items()}
        return placed_like(b, _by_products(self.precision, self.scales, own, factor, start))


class AtRate:
    """A precision with rates of whole parameters, the largest included."""

    def __init__(self, of: Coupled, top: float) -> None:
        self._of, self._top = of, top

    def left(self, strength: float, moved: Vector) -> Vector:
        """Return what is left of the displacements of what moves after a step."""
        return self._of.left(self._factor(strength), moved)

    def solved(self, strength: float, b: Vector) -> Vector:
        r"""Return :math:`(S^{-1} + \lambda A)^{-1} b` of what moves."""
        scales = self._of.scales
        along = {name: scale * b[name] for name, scale in scales.items()}
        found = self._of.resolved(self._factor(strength), along)
        return {name: self._top * scale * found[name] for name, scale in scales.items()}

    def _factor(self, strength: float) -> float:
        return min(self._top * strength, MOST)


def _by_products(
    precision: Fisher, scales: Mapping[str, float], own: float, factor: float, b: Vector
) -> Vector:
    r"""Solve :math:`(d I + f S A S)\, u = b` to the rounding error."""
    shapes = {name: value.shape for name, value in b.items()}
    nothing = {n: next(iter(b.values())).new_zeros(s) for n, s in precision.shapes.items()}

    def times(flat: Tensor) -> Tensor:
        v = unravel(flat, shapes)
        pull = precision._product({**nothing, **{n: scales[n] * x for n, x in v.items()}})
        return own * flat + factor * ravel({n: scales[n] * pull[n] for n in v})[0]

    flat = ravel(b)[0]
    least = 4 * torch.finfo(flat.dtype).eps
    return unravel(conjugate_gradients(times, flat, least, MOST_PRODUCTS).value, shapes)


def scales_of(numbers: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Return the roots of rates, relative to the largest, and the largest."""
    top = max(numbers.values(), default=1.0)
    return {name: (number / top) ** 0.5 for name, number in numbers.items()}, top


def _scaled(precision: Fisher, scales: dict[str, float]) -> Fisher | None:
    """Return :math:`S A S` of some parameters, or None if the structure cannot hold it."""
    try:
        alike = set(scales.values()) == {1.0}
        return precision._within(scales) if alike else precision._congruent(scales)
    except NotKept:
        return None
