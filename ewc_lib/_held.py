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
    as_parts,
    displacement,
    go_,
    of_parts,
    product,
    shares,
    squared_distance,
)
from ewc_lib._coupled import AtRate, Coupled, above_zero, scales_of
from ewc_lib._foreach import each, inner
from ewc_lib._metric import Rates
from ewc_lib._multiplier import MOST, multiplier
from ewc_lib._names import listed, plain_name
from ewc_lib._parameters import Vector
from ewc_lib._rounding import Rests
from ewc_lib.attaching import own_parameters
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.fisher.structures.vectors import has_room

Square: TypeAlias = Callable[[float], tuple[float, float]]
"""Returns a square distance that is left after a step of some strength, and its slope."""

MOST_CORRECTIONS = 4
"""Of a step that has to end within a limit, and by rounding does not."""


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

    def go_(self, strength: float, rates: Rates) -> None:
        """Take the proximal step, each parameter that moves with its rates."""
        if isinstance(self.precision, Diagonal):
            found = self._shares(self.precision, strength, rates)
            if self._sweep is None:
                go_(self.moving, self.anchor, found, self.rests)
            else:
                self._sweep.go_([found[name] for name in self.moving])
        elif (rates := above_zero(rates)).numbers:
            moved = displacement(self.parameters, self._seen_anchor())
            left = self._coupled(rates).left(strength, moved)
            places = each("add", {name: self.anchor[name] for name in left}, left)
            self.rests.write_({name: self.moving[name] for name in left}, places)

    def go_within_(self, limit: float, rates: Rates, guess: float) -> float:
        """Take the proximal step of the smallest strength that keeps the square below a limit.

        Return that strength; a guess of it saves time.
        """
        moving = above_zero(rates)
        if not moving.numbers:
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

    def _go_with(self, strength: float, rates: Rates) -> float:
        if strength:
            self.go_(strength, rates)
        return strength

    def _diagonal_square(self, precision: Diagonal, rates: Rates) -> tuple[Square, float]:
        """Return the square of what moves after a step, by its strength, and that of the rest."""
        moved = displacement(self.parameters, self._seen_anchor())
        numbers, below = rates
        moved |= as_parts(moved, below)
        values = precision.values | of_parts(below, precision.values)
        sizes = each("abs", moved)  # which may be complex
        squares = each("mul", each("mul", sizes, sizes), values)
        fixed = [squares[name].sum() for name in squares if name not in numbers]
        own = {name: squares[name] for name in numbers}
        stiffness = {name: number * values[name] for name, number in numbers.items()}
        stiffness |= each("div", {name: stiffness[name] for name in below}, below)

        def at(strength: float) -> tuple[float, float]:
            w = each("mul", stiffness, strength)
            each("add_", w, 1.0)
            each("reciprocal_", w)
            left = each("mul", own, w)
            slopes = each("mul", each("mul", w, w), stiffness)
            q, slope = torch.stack([inner(left, w), inner(left, slopes)]).tolist()
            return q, -2 * slope

        return at, float(sum(fixed))

    def _square(self, rates: Rates) -> tuple[Square, float]:
        """Return the same for a precision with coupling, beyond what no strength takes away."""
        coupled = self._coupled(rates)

        def at(strength: float) -> tuple[float, float]:
            moved = displacement(self.parameters, self._seen_anchor())
            moved |= coupled.left(strength, moved) if strength else {}
            pull = product(self.precision, moved)
            own = {name: pull[name] for name in rates.numbers}
            turned = coupled.solved(strength, own)
            q, slope = torch.stack([inner(moved, pull), inner(own, turned)]).tolist()
            return q, -2 * slope

        everything = len(rates.numbers) == len(self.parameters)
        constant = 0.0 if everything else at(MOST)[0]

        def beyond(strength: float) -> tuple[float, float]:
            q, slope = at(strength)
            return q - constant, slope

        return beyond, constant

    def _shares(self, precision: Diagonal, strength: float, rates: Rates) -> Vector:
        """Return how far to go towards the anchor; without divisors it stays the same."""
        if rates.divisors or torch.compiler.is_compiling():  # fused, it costs less than to keep it
            return shares(precision.values, self.anchor, strength, rates)
        if self._kept[0] != (strength, rates.numbers):
            found = shares(precision.values, self.anchor, strength, rates)
            self._kept = (strength, rates.numbers), found
        kept: Vector = self._kept[1]
        return kept

    def _coupled(self, rates: Rates) -> AtRate:
        """Return the precision with rates of tensors; it keeps its eigenvectors."""
        scales, top = scales_of(rates.numbers)
        if self._kept[0] != scales:
            self._kept = scales, Coupled(self.precision, scales)
        found: Coupled = self._kept[1]
        return found.at(top)


def _forms(parameters: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    return [(p.shape, p.dtype, p.device) for p in parameters.values()]


def held_ones(every: Mapping[str, nn.Parameter], anchor: Vector) -> dict[str, nn.Parameter]:
    """Return the parameters of an anchor.

    Raise a ValueError if one has gone, or is the same as another now, or has another shape than
    it could have grown to, or has no values.
    """
    if gone := [name for name in anchor if name not in every]:
        raise ValueError(
            f"the penalty holds what the model does not have any more: {listed(gone)}; "
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
    return f"; did you mean {near[0]!r}?" if near else f"; it holds {listed(names)}"


def _way_out(names: list[str], held: Collection[str]) -> str:
    """Say how to forget parameters, by one pattern if that matches no other."""
    modules = {name.rpartition(".")[0] for name in names}
    pattern = f"{modules.pop()}.*"
    others = [name for name in held if fnmatchcase(name, pattern) and name not in names]
    what: Any = names if modules or others or pattern == ".*" else pattern
    return f"ewc.forget({json.dumps(names[0] if len(names) == 1 else what)}) drops it"
