"""Vectors in the space of the parameters: named tensors, or one flat tensor."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from ewc_lib._parameters import Vector, ravel, unravel

V = TypeVar("V", Vector, Tensor)
"""A vector in the form of the caller: named tensors, or one flat tensor ``[P]``."""


def divide(x: Tensor, d: Tensor) -> Tensor:
    """Divide by a diagonal, leaving out where it is zero."""
    return x / d.where(d != 0, torch.inf)


def named(v: Vector | Tensor, shapes: dict[str, torch.Size]) -> Vector:
    """Cut a flat vector into the parameters; raise a ValueError if a vector does not fit them."""
    if isinstance(v, Tensor):
        size = sum(shape.numel() for shape in shapes.values())
        if v.shape != (size,):
            raise ValueError(f"a flat vector must have shape ({size},), got {tuple(v.shape)}")
        return unravel(v, shapes)
    if not isinstance(v, Mapping):
        raise ValueError(
            "a vector must be a dict of tensors with the names of the parameters, or one flat "
            f"tensor; got {type(v).__name__}"
        )
    check_shapes(shapes, {name: t.shape for name, t in v.items()})
    return v


def in_form_of(v: V, found: Vector, shapes: dict[str, torch.Size]) -> V:
    """Return named tensors flat if a vector was given flat."""
    if isinstance(v, Tensor):
        return ravel({name: found[name] for name in shapes})[0]
    return found


def leading(shape: torch.Size) -> tuple[slice, ...]:
    """Return where the entries of a tensor are in one that has grown: first along each axis."""
    return tuple(slice(length) for length in shape)


def has_room(larger: torch.Size, smaller: torch.Size) -> bool:
    """Tell whether a tensor has grown along its axes, if at all."""
    return len(larger) == len(smaller) and all(a >= b for a, b in zip(larger, smaller, strict=True))


def padded(value: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor in a larger one, with zeros behind it along each axis."""
    if value.shape == shape:
        return value
    larger = value.new_zeros(shape)
    larger[leading(value.shape)] = value
    return larger


def grown(value: Tensor, into: Tensor) -> Tensor:
    """Return a tensor with its old entries, and behind them along each axis those of another."""
    if value.shape == into.shape:
        return value
    larger = into.detach().to(value.device, value.dtype, copy=True)
    larger[leading(value.shape)] = value
    return larger


def positions(inner: dict[str, torch.Size], outer: dict[str, torch.Size]) -> Tensor:
    """Return where the entries of some parameters are in a flat vector of more or larger ones."""
    size = sum(shape.numel() for shape in outer.values())
    places = unravel(torch.arange(size), outer)
    return torch.cat([places[name][leading(shape)].reshape(-1) for name, shape in inner.items()])


def entries(scales: Mapping[str, float], shapes: dict[str, torch.Size]) -> Tensor:
    """Return a number for each parameter as one for each entry of a flat vector."""
    numbers = torch.tensor([scales[name] for name in shapes], dtype=torch.float64)
    return numbers.repeat_interleave(torch.tensor([s.numel() for s in shapes.values()]))


MOST_SHOWN = 3
"""Of what does not match, in a message."""


def check_shapes(expected: dict[str, torch.Size], given: dict[str, torch.Size]) -> None:
    """Raise a ValueError that lists names and shapes that differ, and how many more do."""
    if expected == given:
        return
    missing = [f"{name!r} is missing" for name in expected if name not in given]
    unknown = [f"{name!r} is not expected" for name in given if name not in expected]
    misshapen = [
        f"{name!r} is given in shape {tuple(given[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    kinds = zip_longest(missing, unknown, misshapen)
    problems = [problem for some in kinds for problem in some if problem]
    if problems:
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise ValueError("parameters do not match: " + "; ".join(problems[:MOST_SHOWN]) + more)
