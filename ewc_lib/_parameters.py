"""Parameters as one flat vector, and data as rows of observations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ewc_lib.errors import EmptyData

Params: TypeAlias = Tensor | dict[str, Tensor]
"""A vector ``[P]`` or named tensors, for example those of a network."""

Vector: TypeAlias = dict[str, Tensor]
"""One tensor for each parameter, by name."""

Data: TypeAlias = Any
"""A tensor ``[N, ...]`` or a (nested) tuple or dict of tensors with a common first axis."""


def ravel(theta: Params) -> tuple[Float[Tensor, " P"], Callable[[Tensor], Params]]:
    """Flatten parameters into one vector, and return the way back.

    Named tensors are concatenated in the order of the dict.
    """
    if isinstance(theta, Tensor):
        shape = theta.shape
        return theta.reshape(-1), lambda flat: flat.reshape(shape)
    shapes = {name: value.shape for name, value in theta.items()}
    flat = torch.cat([value.reshape(-1) for value in theta.values()])
    return flat, lambda vector: unravel(vector, shapes)


def zeros_of(forms: dict[str, tuple[torch.Size, torch.dtype, torch.device]]) -> Vector:
    """Return zeros of given shapes, dtypes and devices: of each kind, parts of one tensor."""
    found: Vector = {}
    for dtype, device in {form[1:] for form in forms.values()}:
        shapes = {name: form[0] for name, form in forms.items() if form[1:] == (dtype, device)}
        size = sum(shape.numel() for shape in shapes.values())
        found |= unravel(torch.zeros(size, dtype=dtype, device=device), shapes)
    return {name: found[name] for name in forms}


def check_real(parameters: Mapping[str, Tensor], otherwise: str) -> None:
    """Raise a ValueError if one is complex."""
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex: {otherwise}, or make it of real numbers by "
                "torch.view_as_real"
            )


def unravel(flat: Float[Tensor, " P"], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Cut a vector into named tensors of the given shapes."""
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}


def count(data: Data) -> int:
    """Return the number of observations, the common length of the first axes.

    Raises
    ------
    ValueError
        If the lengths differ; an :class:`~ewc_lib.errors.EmptyData` if there is no observation.
    """
    leaves = tree_leaves(data)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError("data must be a tensor [N, ...] or a tuple or dict of such tensors")
    if any(leaf.dim() == 0 for leaf in leaves):
        raise ValueError("data must have one observation per row, but it holds a 0-d tensor")
    lengths = [len(leaf) for leaf in leaves]
    if len(set(lengths)) > 1:
        raise ValueError(f"data and targets have different lengths: {lengths}")
    if lengths[0] == 0:
        raise EmptyData("data is empty: there is no observation")
    return lengths[0]


def rows(data: Data) -> Iterator[Data]:
    """Iterate over single observations."""
    return (row(data, n) for n in range(count(data)))


def row(data: Data, n: int) -> Data:
    """Return observation ``n``."""
    return tree_map(lambda leaf: leaf[n], data)


def form(data: Data) -> Any:
    """Return everything about data but the number of observations and their values."""
    leaves, structure = tree_flatten(data)
    return structure, tuple((leaf.dtype, leaf.shape[1:]) for leaf in leaves)
