"""Sums of squares, one tensor a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.score.gradients import ParameterGradients


class DiagonalSum(Sum):
    """Sums of squares, one tensor a parameter."""

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self.sums = {
            name: torch.zeros(shape, dtype=space.dtype_of(name), device=space.device_of(name))
            for name, shape in space.shapes.items()
        }
        self._terms: dict[str, tuple[ParameterGradients, Tensor]] = {}

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for _, found in parts:
            for name in found.keys() & self.sums.keys():
                sizes = found[name].abs() if found[name].is_complex() else found[name]
                squares = sizes.to(self.space.dtype_of(name)).square().sum((0, 1))
                self.sums[name] += squares.to(self.space.device_of(name))

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for name, gradients in found.items():
            g = gradients.output_gradients[0]
            if not gradients.squares_factorise:
                self._add(name, gradients.add_squares, g)
            elif name in self._terms:
                self._terms[name][1].addcmul_(g, g)
            else:
                self._terms[name] = gradients, g.square()

    def end_block(self) -> None:
        for name, (gradients, squared) in self._terms.items():
            self._add(name, partial(gradients.add_squares_of_terms, squared=squared), squared)
        self._terms = {}

    def _add(self, name: str, add: Callable[[Tensor], None], like: Tensor) -> None:
        """Add to the sum in place if it is like the gradients, else to a part that then joins."""
        total = self.sums[name]
        if (total.device, total.dtype) == (like.device, like.dtype):
            add(total)
        else:
            part = like.new_zeros(total.shape)
            add(part)
            total += part.to(total)

    def mean(self, kind: str, paths: dict[str, str]) -> Diagonal:
        values = {name: total / self.n for name, total in self.sums.items()}
        return Diagonal(self.n, kind, {name: paths[name] for name in values}, values)
