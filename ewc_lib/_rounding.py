"""Half-precision tensors that move as if they were of single precision.

A number of bfloat16 has 8 significant bits, so it does not change unless it changes by a few
parts in a thousand; what is rounded away is kept, and added before the next change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc_lib._foreach import copy_back_, each, in_dtypes_of
from ewc_lib._parameters import Vector

EPSILON = 1e-4
"""Of a precision that is coarser than this, the rest is kept."""


class Rests:
    """What tensors have lost by rounding, by name; nothing for those of full precision."""

    def __init__(self) -> None:
        self.values: Vector = {}

    def keep(self, of: Mapping[str, Tensor]) -> None:
        """Drop what was lost of tensors that have another shape or precision now."""
        for name, rest in list(self.values.items()):
            if name in of and not (is_coarse(of[name]) and of[name].shape == rest.shape):
                del self.values[name]

    def whole(self, rounded: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Vector:
        """Return tensors in other dtypes, with what they have lost; not always copies."""
        found = in_dtypes_of(like, rounded)
        lost = {n: rest.to(found[n].device) for n, rest in self.values.items() if n in found}
        if not lost:
            return found
        return {**found, **each("add", {name: found[name] for name in lost}, lost)}

    def write_(self, places: Mapping[str, Tensor], whole: Vector) -> None:
        """Round into tensors of lower precision, and keep what they lose."""
        copy_back_(places, whole)
        coarse = {name: whole[name] for name, place in places.items() if is_coarse(place)}
        if coarse:
            rounded = in_dtypes_of(coarse, {name: places[name].detach() for name in coarse})
            self.values |= each("sub", coarse, rounded)


def is_coarse(tensor: Tensor) -> bool:
    """Tell whether steps are lost in the precision of a tensor."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).eps > EPSILON
