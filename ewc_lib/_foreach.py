"""One operation on many tensors, by a single call where PyTorch has one.

On an accelerator a call for each tensor costs more than the arithmetic of a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ewc_lib._parameters import Vector
from ewc_lib._sharded import total

Operand: TypeAlias = Mapping[str, Tensor] | Tensor | float
"""Tensors of the same names, or one number for all."""

PLAIN = {Tensor, nn.Parameter}
"""What PyTorch's operations on lists take; a sharded tensor, for one, has operations of its own."""


def each(name: str, first: Mapping[str, Tensor], *others: Operand, **options: Any) -> Vector:
    """Call a method of every tensor, with the others of its name; changed in place if it says so.

    There is one call for all tensors of the same dtypes, or one for each where PyTorch has none.
    """
    names = list(first)
    target = list(first.values())
    columns = [[v[n] for n in names] if isinstance(v, Mapping) else v for v in others]
    groups = _alike(names, target, *columns)
    if len(groups) > 1:
        parts = ({n: first[n] for n in group} for group in groups)
        found = [each(name, part, *others, **options) for part in parts]
        return {n: x for n in names for part in found if (x := part.get(n)) is not None}
    together = getattr(torch, f"_foreach_{name}", None)
    if names and together is not None and at_once(target, *columns):
        results = together(target, *columns, **options) or target  # none of those in place
    else:
        rows = (c if isinstance(c, list) else [c] * len(names) for c in columns)
        alone = getattr(Tensor, name)
        results = [alone(*row, **options) for row in zip(target, *rows, strict=True)]
    return dict(zip(names, results, strict=True))


def at_once(*columns: Any) -> bool:
    """Tell whether an operation on lists takes these."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # vmap has no rule for them
    if any(isinstance(c, Tensor) and c.requires_grad for c in columns):
        return False  # they cannot be differentiated in one number for all
    return all(PLAIN.issuperset(map(type, c)) for c in columns if isinstance(c, list))


def side_by_side(*vectors: Mapping[str, Tensor]) -> list[list[Tensor]] | None:
    """Return vectors as lists, or None if some operation has to look at each tensor."""
    columns = [[vector[name] for name in vectors[0]] for vector in vectors]
    known = all(hasattr(torch, f"_foreach_{name}") for name in ("sub", "addcmul_", "lerp_"))
    alike = len({x.dtype for column in columns for x in column}) == 1
    return columns if known and alike and at_once(*columns) else None


def in_dtypes_of(like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Vector:
    """Convert what has another dtype; the others are returned themselves."""
    other = {name: v for name, v in values.items() if v.dtype != like[name].dtype}
    if not other:
        return dict(values)
    if torch.is_grad_enabled() or not at_once(list(other.values())):
        converted = {name: v.to(like[name].dtype) for name, v in other.items()}
    else:
        converted = each("copy_", {n: torch.empty_like(like[n]) for n in other}, other)
    return {**values, **converted}


def copy_back_(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into their places, but for those that are there already."""
    away = {name: value for name, value in values.items() if value is not places[name]}
    each("copy_", {name: places[name] for name in away}, away)


def within_range(number: float, values: Iterable[Tensor]) -> float:
    """Return a factor, or the largest that tensors can hold: times zero it is zero still."""
    return min([number, *(torch.finfo(dtype).max for dtype in {x.dtype for x in values})])


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the real part of the inner product of two vectors."""
    products = each("mul", _real(a), _real(b)).values()
    if at_once(list(products)):
        return torch.cat([_flat(product) for product in products]).sum()
    return total([product.sum() for product in products])


def _alike(names: list[str], *columns: Any) -> list[list[str]]:
    """Put names together whose tensors have the same dtypes."""
    dtypes = [[x.dtype for x in column] for column in columns if isinstance(column, list)]
    if all(len(set(found)) <= 1 for found in dtypes):
        return [names]
    groups: dict[tuple[torch.dtype, ...], list[str]] = {}
    for name, *own in zip(names, *dtypes, strict=True):
        groups.setdefault(tuple(own), []).append(name)
    return list(groups.values())


def _real(values: Mapping[str, Tensor]) -> Vector:
    return {n: torch.view_as_real(v) if v.is_complex() else v for n, v in values.items()}


def _flat(x: Tensor) -> Tensor:
    """Return all entries, in their order in memory, where that is a view."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)
