"""The parameters that a penalty holds, in a model that may have changed since.

What is frozen is a constant. What has grown holds its old entries, which come first along each
axis. What has gone, or is smaller, has to be forgotten by name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ewc_lib._anchored import (
    Sweep,
    add_pull_,
    displacement,
    go_,
    product,
    shares,
    solve,
    squared_distance,
)
from ewc_lib._foreach import each, inner
from ewc_lib._multiplier import MOST, multiplier
from ewc_lib._names import plain_name
from ewc_lib._parameters import Vector, ravel, unravel
from ewc_lib._rounding import Rests
from ewc_lib._sharded import placed_like, whole
from ewc_lib.attaching import own_parameters
from ewc_lib.fisher.iterative import conjugate_gradients
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.fisher.structures.base import NotKept
from ewc_lib.fisher.structures.vectors import has_room

Square: TypeAlias = Callable[[float], tuple[float, float]]
"""Returns a square distance that is left after a step of some strength, and its slope."""

MOST_STIFF = 1e8
"""Where only products solve: beyond this stiffness what has information is at its end anyway."""

MOST_CORRECTIONS = 4
"""Of a step that has to end within a limit, and by rounding does not."""

MOST_PRODUCTS = 1000
"""Of conjugate gradients, where a structure cannot be solved for some of its parameters."""


class Held:
    """Parameters with their anchor and precision, and those of them that a step may move.

    Attributes
    ----------
    parameters
        All that are held, by plain names.
    rests
        What those of half precision have lost by rounding, in earlier steps.
    moving
        Those that require grad, or some of them; all others are constants.
    """

    def __init__(
        self,
        precision: Fisher,
        anchor: Vector,
        parameters: dict[str, nn.Parameter],
        rests: Rests,
        moving: dict[str, nn.Parameter] | None = None,
    ) -> None:
        self.precision, self.anchor, self.parameters = precision, anchor, parameters
        self.rests = rests
        rests.keep(parameters)
        if moving is None:
            moving = {name: p for name, p in parameters.items() if p.requires_grad}
        self.moving = moving
        self._forms = _forms(parameters)
        self._sweep: Sweep | None = None
        if isinstance(precision, Diagonal) and not torch.compiler.is_compiling():
            self._sweep = Sweep.of(moving, anchor, precision.values) if moving else None
        self._pulled = Rests()
        self._parts: dict[tuple[str, ...], Held] = {}
        self._kept: tuple[Any, Any] = None, None

    def is_of(self, precision: Fisher | None, anchor: Vector) -> bool:
        """Tell whether anchor and precision are these, and the parameters as they were."""
        same = precision is self.precision and anchor is self.anchor
        return same and _forms(self.parameters) == self._forms

    def part(self, names: Collection[str]) -> Held:
        """Return the same with fewer parameters that a step may move."""
        if len(names) == len(self.moving):
            return self
        found = self._parts.get(tuple(names))
        if found is None:
            moving = {name: self.moving[name] for name in names}
            found = Held(self.precision, self.anchor, self.parameters, self.rests, moving)
            found._pulled = self._pulled
            if not torch.compiler.is_compiling():
                self._parts[tuple(names)] = found
        return found

    def own_of(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the names of those that an optimizer can move."""
        own = own_parameters(optimizer)
        return [name for name, p in self.moving.items() if id(p) in own]

    def squared_distance(self) -> Tensor:
        """Return that from the anchor, differentiable."""
        return squared_distance(self.precision, self._seen_anchor(), self.parameters)

    def _seen_anchor(self) -> Vector:
        """Return the anchor less the rests: from there, rounded parameters are as far away."""
        if not self.rests.values:
            return self.anchor
        rests = {n: rest.to(self.anchor[n].device) for n, rest in self.rests.values.items()}
        return {n: m - rests[n] if n in rests else m for n, m in self.anchor.items()}

    def add_pull_(self, strength: float) -> None:
        """Add the gradient of the penalty to that of what moves."""
        if self._sweep is None or not self._sweep.add_pull_(strength):
            anchor, moving = self._seen_anchor(), self.moving
            add_pull_(self.precision, anchor, self.parameters, moving, strength, self._pulled)

    def go_(self, strength: float, rates: dict[str, float]) -> None:
        """Take the proximal step, each parameter that moves with its rate."""
        if isinstance(self.precision, Diagonal):
            found = self._shares(self.precision, strength, rates)
            if self._sweep is None:
                go_(self.moving, self.anchor, found, self.rests)
            else:
                self._sweep.go_([found[name] for name in self.moving])
        elif scales := _scales(rates):
            left = self._left(max(rates.values()) * strength, scales)
            places = each("add", {name: self.anchor[name] for name in left}, left)
            self.rests.write_({name: self.moving[name] for name in left}, places)

    def go_within_(self, limit: float, rates: dict[str, float], guess: float) -> float:
        """Take the proximal step of the smallest strength that keeps the square below a limit.

        Return that strength; a guess of it saves time.
        """
        moving = {name: rate for name, rate in rates.items() if rate > 0}
        if not moving:
            return guess
        if isinstance(self.precision, Diagonal):
            at, constant = self._diagonal_square(self.precision, moving)
            return self._go_with(multiplier(at, limit - constant, guess), rates)
        aim, strength = limit, 0.0
        for _ in range(MOST_CORRECTIONS):  # products with a matrix lose digits
            at, constant = self._square(moving)
            strength = max(strength, self._go_with(multiplier(at, aim - constant, guess), rates))
            if not (excess := float(self.squared_distance()) - limit) > 0:
                break
            aim -= 2 * excess
        return strength

    def _go_with(self, strength: float, rates: dict[str, float]) -> float:
        if strength:
            self.go_(strength, rates)
        return strength

    def _diagonal_square(
        self, precision: Diagonal, rates: dict[str, float]
    ) -> tuple[Square, float]:
        """Return the square of what moves after a step, by its strength, and that of the rest."""
        moved = displacement(self.parameters, self._seen_anchor())
        sizes = each("abs", moved)  # which may be complex
        squares = each("mul", each("mul", sizes, sizes), precision.values)
        fixed = [squares[name].sum() for name in squares if name not in rates]
        own = {name: squares[name] for name in rates}
        stiffness = {name: rate * precision.values[name] for name, rate in rates.items()}

        def at(strength: float) -> tuple[float, float]:
            w = each("mul", stiffness, strength)
            each("add_", w, 1.0)
            each("reciprocal_", w)
            left = each("mul", own, w)
            slopes = each("mul", each("mul", w, w), stiffness)
            q, slope = torch.stack([inner(left, w), inner(left, slopes)]).tolist()
            return q, -2 * slope

        return at, float(sum(fixed))

    def _square(self, rates: dict[str, float]) -> tuple[Square, float]:
        """Return the same for a precision with coupling, beyond what no strength takes away."""
        scales, top = _scales(rates), max(rates.values())

        def at(strength: float) -> tuple[float, float]:
            moved = displacement(self.parameters, self._seen_anchor())
            left = self._left(top * strength, scales) if strength else {}
            moved = {**moved, **left}
            pull = product(self.precision, moved)
            along = {name: scale * pull[name] for name, scale in scales.items()}
            turned = self._resolved(top * strength, scales, along)
            q, slope = torch.stack([inner(moved, pull), inner(along, turned)]).tolist()
            return q, -2 * top * slope

        everything = len(scales) == len(self.parameters)
        constant = 0.0 if everything else at(MOST)[0]

        def beyond(strength: float) -> tuple[float, float]:
            q, slope = at(strength)
            return q - constant, slope

        return beyond, constant

    def _shares(self, precision: Diagonal, strength: float, rates: dict[str, float]) -> Vector:
        """Return how far to go towards the anchor; they stay the same from step to step."""
        if torch.compiler.is_compiling():  # what is fused into the step costs less than to keep it
            return shares(precision, self.anchor, strength, rates)
        if self._kept[0] != (strength, rates):
            self._kept = (strength, rates), shares(precision, self.anchor, strength, rates)
        found: Vector = self._kept[1]
        return found

    def _left(self, factor: float, scales: dict[str, float]) -> Vector:
        r"""Return what is left of the displacements :math:`d` after a proximal step.

        With :math:`S` the roots of the rates relative to the largest of them, which is in the
        factor :math:`f`, and with the constants :math:`c`, it is :math:`S u`, where

        .. math:: (I + f S A S)\, (u + w) = S^{-1} d + w, \qquad S A S\, w = S A c
        """
        moved = displacement(self.parameters, self._seen_anchor())
        start = {name: moved[name] / scale for name, scale in scales.items()}
        fixed = self._fixed_part(scales, moved) if len(start) < len(moved) else {}
        start = each("add", start, fixed) if fixed else start
        left = self._resolved(factor, scales, start)
        left = each("sub", left, fixed) if fixed else left
        return {name: scale * left[name] for name, scale in scales.items()}

    def _fixed_part(self, scales: dict[str, float], moved: Vector) -> Vector:
        """Return where the constants pull, :math:`w`; what they do not reach is left alone."""
        rest = {n: torch.zeros_like(d) if n in scales else d for n, d in moved.items()}
        pull = product(self.precision, rest)
        b = {name: scale * pull[name] for name, scale in scales.items()}
        system = self._system(scales)
        if system is not None:
            return solve(system, b)
        alone = {name: whole(value) for name, value in b.items()}
        return placed_like(b, _by_products(self.precision, scales, alone))

    def _resolved(self, factor: float, scales: dict[str, float], b: Vector) -> Vector:
        """Return the solution of :math:`(I + f S A S)\, u = b`."""
        if not factor:
            return b
        system = self._system(scales)
        if system is not None:
            return each("div", solve(system, b, damping=1 / factor), factor)
        alone = {name: whole(value) for name, value in b.items()}
        return placed_like(b, _by_products(self.precision, scales, alone, factor))

    def _system(self, scales: dict[str, float]) -> Fisher | None:
        """Return :math:`S A S` of what moves; it stays the same, with its eigenvectors."""
        if self._kept[0] != scales:
            self._kept = scales, _scaled(self.precision, scales)
        found: Fisher | None = self._kept[1]
        return found


def _scales(rates: dict[str, float]) -> dict[str, float]:
    """Return the roots of the rates, relative to the largest; what has none does not move."""
    moving = {name: rate for name, rate in rates.items() if rate > 0}
    top = max(moving.values(), default=1.0)
    return {name: (rate / top) ** 0.5 for name, rate in moving.items()}


def _scaled(precision: Fisher, scales: dict[str, float]) -> Fisher | None:
    """Return :math:`S A S` of some parameters, or None if the structure cannot hold it."""
    try:
        alike = set(scales.values()) == {1.0}
        return precision._within(scales) if alike else precision._congruent(scales)
    except NotKept:
        return None


def _by_products(
    precision: Fisher, scales: dict[str, float], start: Vector, factor: float | None = None
) -> Vector:
    r"""Solve :math:`(I + f S A S)\, u = b` by products alone, to the rounding error.

    Without a factor it is :math:`S A S\, u = b`.
    """
    shapes = {name: value.shape for name, value in start.items()}
    nothing = {n: next(iter(start.values())).new_zeros(s) for n, s in precision.shapes.items()}
    top = max(float(d.abs().max()) for d in precision.diagonal().values())
    own = 0.0 if factor is None else 1.0
    factor = 1.0 if factor is None else min(factor, MOST_STIFF / max(top, 1 / MOST_STIFF))

    def product(flat: Tensor) -> Tensor:
        x = {name: scales[name] * part for name, part in unravel(flat, shapes).items()}
        pull = precision._product({**nothing, **x})
        return own * flat + factor * ravel({n: scales[n] * pull[n] for n in shapes})[0]

    b = ravel(start)[0]
    tolerance = 4 * torch.finfo(b.dtype).eps
    return unravel(conjugate_gradients(product, b, tolerance, MOST_PRODUCTS).value, shapes)


def _forms(parameters: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    return [(p.shape, p.dtype, p.device) for p in parameters.values()]


def held_ones(every: Mapping[str, nn.Parameter], anchor: Vector) -> dict[str, nn.Parameter]:
    """Return the parameters of an anchor.

    Raise a ValueError if one has gone, or is the same as another now, or has another shape than
    it could have grown to, or has no values.
    """
    if gone := [name for name in anchor if name not in every]:
        raise ValueError(
            f"the penalty holds what the model does not have any more: {_listed(gone)}; "
            f"{_way_out(gone, anchor)}"
        )
    found = {name: p for name, p in every.items() if name in anchor}
    first: dict[int, str] = {}
    for name, parameter in found.items():
        before, now = anchor[name].shape, parameter.shape
        if not has_room(now, before):
            raise ValueError(
                f"{name!r} has shape {tuple(now)}, but the penalty holds {tuple(before)} of it: "
                f"it may grow along its axes, and no more; {_way_out([name], anchor)}"
            )
        if parameter.is_meta:  # to follow it there would lose what was consolidated
            raise ValueError(f"parameter {name!r} is on the meta device: it has no values")
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"{name!r} is the same parameter as {first[id(parameter)]!r} now, but the penalty "
                f"holds both; {_way_out([name], anchor)}"
            )
    return found


def grown_from(
    shapes: Mapping[str, torch.Size], every: Mapping[str, nn.Parameter]
) -> dict[str, torch.Size]:
    """Return the shapes that parameters can have had, as close to some as may be."""
    found = {name: every[name].shape for name in shapes if name in every}
    return {n: shapes[n] if has_room(now, shapes[n]) else now for n, now in found.items()}


def names_like(pattern: str | Iterable[str], names: Collection[str]) -> list[str]:
    """Return the names that patterns match; raise a ValueError if one matches nothing."""
    found: list[str] = []
    for wanted in [pattern] if isinstance(pattern, str) else pattern:
        own = [n for n in names if n == wanted or fnmatchcase(n, wanted)]
        own = own or [n for n in names if fnmatchcase(n, plain_name(wanted))]
        if not own:
            raise ValueError(f"the penalty holds no parameter {wanted!r}{_hint(wanted, names)}")
        found += own
    return [name for name in names if name in found]


def _hint(wanted: str, names: Collection[str]) -> str:
    if any(name.startswith(f"{wanted}.") for name in names):
        return f"; those of the module are '{wanted}.*'"
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it holds {_listed(names)}"


def _way_out(names: list[str], held: Collection[str]) -> str:
    """Say how to forget parameters, by one pattern if that matches no other."""
    modules = {name.rpartition(".")[0] for name in names}
    pattern = f"{modules.pop()}.*"
    others = [name for name in held if fnmatchcase(name, pattern) and name not in names]
    what: Any = names if modules or others or pattern == ".*" else pattern
    return f"ewc.forget({json.dumps(names[0] if len(names) == 1 else what)}) drops it"


def _listed(names: Collection[str]) -> str:
    """Name some of many."""
    shown = ", ".join(map(repr, list(names)[:6]))
    return f"{shown} and {len(names) - 6} others" if len(names) > 6 else shown or "nothing"
