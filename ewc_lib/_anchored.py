r"""What a training step does with parameters that an anchor and a precision hold.

.. math:: (\theta - m)^\top A\, (\theta - m), \qquad \lambda A (\theta - m)

With a diagonal precision all this is a few sweeps over all parameters, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ewc_lib._foreach import at_once, each, in_dtypes_of, inner, side_by_side, within_range
from ewc_lib._metric import Rates
from ewc_lib._parameters import Vector
from ewc_lib._rounding import Rests
from ewc_lib._sharded import any_sharded, placed_like, whole
from ewc_lib.fisher.structures import BlockDiagonal, Diagonal, Fisher


def displacement(parameters: Mapping[str, Tensor], anchor: Vector) -> Vector:
    """Return parameters minus anchor, in the precision of the anchor."""
    return each("sub", in_dtypes_of(anchor, parameters), anchor)


def product(precision: Fisher, v: Vector) -> Vector:
    """Return the product with a vector, sharded as the vector is."""
    return _block_by_block(precision, v, lambda F, x: F._product(x))


def solve(precision: Fisher, v: Vector, damping: float = 0.0) -> Vector:
    """Return the solution of :meth:`ewc_lib.Fisher.solve`, sharded as the vector is."""
    return _block_by_block(precision, v, lambda F, x: F.solve(x, damping))


def quadratic(precision: Fisher, v: Vector) -> Tensor:
    r"""Return :math:`v^\top A\, v`, a plain number also where processes share the vector."""
    return inner(product(precision, v), v)


def _block_by_block(
    precision: Fisher, v: Vector, change: Callable[[Fisher, Vector], Vector]
) -> Vector:
    """Apply a matrix to a vector of which each process has a part, whole blocks one by one."""
    if not any_sharded(v.values()) or any_sharded(precision._numbers()):
        return change(precision, v)
    blocks = precision.blocks if isinstance(precision, BlockDiagonal) else (precision,)
    found: Vector = {}
    for block in blocks:
        found |= placed_like(v, change(block, {name: whole(v[name]) for name in block.shapes}))
    return {name: found[name] for name in v}


def squared_distance(precision: Fisher, anchor: Vector, parameters: Mapping[str, Tensor]) -> Tensor:
    r"""Return :math:`(\theta - m)^\top A\, (\theta - m)`, differentiable in the parameters."""
    if torch.compiler.is_compiling() or not at_once(list(parameters.values())):
        return quadratic(precision, displacement(parameters, anchor))
    names, own = zip(*parameters.items(), strict=True)
    found: Any = _SquaredDistance.apply(precision, anchor, names, *own)  # type: ignore[no-untyped-call]
    value: Tensor = found[0]
    return value


class _SquaredDistance(torch.autograd.Function):
    """The squared distance, and half its gradient, which is found on the way.

    The gradient is an output as well, so that its own derivative is known.
    """

    @staticmethod
    def forward(
        ctx: Any, precision: Fisher, anchor: Vector, names: tuple[str, ...], *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.precision, ctx.parameters = precision, dict(zip(names, own, strict=True))
        moved = displacement(ctx.parameters, anchor)
        pull = precision._product(moved)
        pulls = [pull[name] for name in names]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*pulls)
        ctx.save_for_forward(*pulls)
        return inner(moved, pull), *pulls

    @staticmethod
    def backward(ctx: Any, outer: Tensor | None, *outer_pulls: Tensor | None) -> Any:
        found: Vector = {}
        if outer is not None:
            pull = dict(zip(ctx.parameters, ctx.saved_tensors, strict=True))
            found = each("mul", pull, 2 * outer)
        if any(g is not None for g in outer_pulls):
            second = ctx.precision._product(_SquaredDistance._whole(ctx, outer_pulls))
            found = each("add", found, second) if found else {n: second[n] for n in ctx.parameters}
        found = in_dtypes_of(ctx.parameters, found)
        return None, None, None, *(found.get(name) for name in ctx.parameters)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        pull = dict(zip(ctx.parameters, ctx.saved_tensors, strict=True))
        moved = in_dtypes_of(pull, _SquaredDistance._whole(ctx, tangents[3:]))
        turned = ctx.precision._product(moved)
        return 2 * inner(moved, pull), *(turned[name] for name in pull)

    @staticmethod
    def _whole(ctx: Any, parts: tuple[Tensor | None, ...]) -> Vector:
        """Put zeros where there is nothing."""
        pairs = zip(ctx.parameters, ctx.saved_tensors, parts, strict=True)
        return {n: torch.zeros_like(p) if part is None else part for n, p, part in pairs}


class Sweep(NamedTuple):
    """Parameters, anchor and diagonal precision as lists that an operation takes at once.

    They are made once for many steps: to look at each tensor in every step takes longer than
    the arithmetic of a small network.
    """

    parameters: list[Tensor]
    anchor: list[Tensor]
    precision: list[Tensor]

    @classmethod
    def of(
        cls, parameters: Mapping[str, Tensor], anchor: Vector, precision: Vector
    ) -> Sweep | None:
        """Return None if the tensors have several dtypes, or operations of their own."""
        columns = side_by_side(parameters, anchor, precision)
        return cls(*columns) if columns else None

    def add_pull_(self, strength: float) -> bool:
        """Do what the function does, or tell that a gradient is missing or sparse."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if len(gradients) < len(self.parameters) or any(g.is_sparse for g in gradients):
            return False
        moved = torch._foreach_sub(self.parameters, self.anchor)
        strength = within_range(strength, self.precision)
        torch._foreach_addcmul_(gradients, self.precision, moved, value=strength)
        return True

    def go_(self, shares: list[Tensor]) -> None:
        """Go a share of the way to the anchor."""
        lerp: Any = torch._foreach_lerp_  # whose types know of a number only
        lerp(self.parameters, self.anchor, shares)


def add_pull_(
    precision: Fisher,
    anchor: Vector,
    parameters: Mapping[str, Tensor],
    moving: Mapping[str, nn.Parameter],
    strength: float,
    rests: Rests,
) -> None:
    r"""Add :math:`\lambda A (\theta - m)` to the ``.grad`` of some, in place where there is one.

    What a gradient of half precision loses is kept in the rests, and added the next time.
    """
    swept = isinstance(precision, Diagonal)
    moved = displacement(moving if swept else parameters, anchor)
    pull = moved if swept else product(precision, moved)
    strength = within_range(strength, pull.values())
    if there := _gradients(moving):
        sums = rests.whole(there, pull)
        if isinstance(precision, Diagonal):
            each("addcmul_", sums, precision.values, moved, value=strength)
        else:
            each("add_", sums, pull, alpha=strength)
        rests.write_(there, sums)
    if new := {name: pull[name] for name in moving if name not in there}:
        if isinstance(precision, Diagonal):
            new = each("mul", new, precision.values)
        for name, value in in_dtypes_of(moving, each("mul", new, strength)).items():
            wanted = getattr(moving[name], "grad_dtype", None)  # since PyTorch 2.10
            moving[name].grad = value.to(wanted or value.dtype)


def _gradients(parameters: Mapping[str, nn.Parameter]) -> Vector:
    """Return the gradients that there are; a sparse one is made dense, as its sum will be."""
    found: Vector = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            found[name] = parameter.grad
    return found


def shares(A: Vector, anchor: Vector, strength: float, rates: Rates) -> Vector:
    r"""Return how far to go towards the anchor, :math:`sA / (P + sA)` with :math:`s=\eta\lambda`.

    This form has no overflow: 1 / (1 + P / (sA)) is 0 for A = 0, and 1 at most, with the largest
    number for an s beyond it. It is computed in the place of :math:`P`.
    """
    numbers, below = rates
    plain = {name: A[name] for name in numbers if name not in below}
    found = each("reciprocal", plain)
    found |= each("div_", below, of_parts(below, A))
    for number in set(numbers.values()):
        own = {name: value for name, value in found.items() if numbers[name] == number}
        each("div_", own, within_range(number * strength, own.values()))
    each("add_", found, 1.0)
    each("reciprocal_", found)
    return in_dtypes_of(as_parts(anchor, found), found)


def of_parts(like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Vector:
    """Return real values of complex numbers, as those of their two parts where others are."""
    return {
        n: values[n].unsqueeze(-1) if x.dim() > values[n].dim() else values[n]
        for n, x in like.items()
    }


def as_parts(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Vector:
    """Return complex numbers as their two parts, where others are."""
    return {
        n: torch.view_as_real(values[n]) if x.dim() > values[n].dim() else values[n]
        for n, x in like.items()
    }


def go_(parameters: Mapping[str, Tensor], anchor: Vector, shares: Vector, rests: Rests) -> None:
    """Go a share of the way to the anchor, from where the parameters are with their rests."""
    places = rests.whole(parameters, anchor)
    each("lerp_", as_parts(places, shares), as_parts(anchor, shares), shares)
    rests.write_(parameters, places)


def in_layout_of(like: Mapping[str, Tensor], values: Vector) -> Vector:
    """Lay tensors out in memory as others are, so that one sweep takes both."""
    return {
        name: value
        if name not in like
        or value.shape != like[name].shape
        or value.stride() == like[name].stride()
        else torch.empty_like(like[name], dtype=value.dtype, device=value.device).copy_(value)
        for name, value in values.items()
    }
