"""Sums of squares, one tensor a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ewc_lib._parameters import Vector, zeros_of
from ewc_lib._sharded import owner_of
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.fisher.sums.base import ParameterSpace, Sum
from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.forward_pass import Columns
from ewc_lib.score.gradients import ParameterGradients
from ewc_lib.score.squares import SquareSums


class DiagonalSum(Sum):
    """Sums of squares, one tensor a parameter.

    Parameters
    ----------
    space
        The parameters.
    in_parts
        Leave the sums of sharded parameters to the processes that share them. Those here are on
        the meta device then.
    """

    def __init__(self, space: ParameterSpace, in_parts: bool = False) -> None:
        super().__init__(space)
        owners = {name: owner_of([p]) for name, p in space.parameters.items() if in_parts}
        self._sharing = {name: owner for name, owner in owners.items() if owner}
        away = dict.fromkeys(self._sharing, torch.device("meta"))
        self.sums = zeros_of(
            {
                n: (shape, space.dtype_of(n), away.get(n) or space.device_of(n))
                for n, shape in space.shapes.items()
            }
        )
        self._terms: dict[str, tuple[ParameterGradients, Tensor]] = {}
        self._squares_on: dict[torch.device, SquareSums] = {}

    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        for _, found in parts:
            for name in found.keys() & self.sums.keys():
                sizes = found[name].abs() if found[name].is_complex() else found[name]
                squares = sizes.to(self.space.dtype_of(name)).square().sum((0, 1))
                self._join(name, squares)

    def add_block(self, batch: BatchScores, block: Columns) -> None:
        for part in batch.parts(block):
            if len(part) == 1:
                batch.one_by_one(part, self._take, again=len(block) > 1)
            else:
                for name, gradients in batch.by_rule(part).items():
                    self._take(name, gradients)

    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        for name, gradients in found.items():
            self._take(name, gradients)

    def _take(self, name: str, gradients: ParameterGradients) -> None:
        """Add the squares of a parameter, or of their terms if these factorise."""
        g = gradients.output_gradients[0]
        if not gradients.squares_factorise:
            self._add(name, g, gradients.add_squares)
        elif name in self._terms:
            self._terms[name][1].add_(gradients.squared_terms())
        else:
            self._terms[name] = gradients, gradients.squared_terms()

    def end_block(self) -> None:
        for name, (gradients, squared) in self._terms.items():
            add = partial(_add_product, gradients, squared)
            self._add(name, squared, add)
        for squares in self._squares_on.values():
            squares.finish()
        self._terms = {}

    def _on(self, device: torch.device) -> SquareSums:
        if device not in self._squares_on:
            self._squares_on[device] = SquareSums(memory.budget(device))
        return self._squares_on[device]

    def _add(self, name: str, like: Tensor, add: Callable[[Tensor, SquareSums], None]) -> None:
        """Add to the sum in place if it is like the gradients, else to a part that then joins."""
        total, squares = self.sums[name], self._on(like.device)  # of shared ones, on none
        if (total.device, total.dtype) == (like.device, like.dtype):
            add(total, squares)
        else:
            part = like.new_zeros(total.shape)
            add(part, squares)
            squares.finish()
            self._join(name, part)

    def _join(self, name: str, part: Tensor) -> None:
        """Add a part to the sum of this process, or to the one that processes share."""
        if name in self._sharing:
            self._sharing[name].add(self.space.parameters[name], part.to(self.sums[name].dtype))
        else:
            self.sums[name] += part.to(self.sums[name])

    def mean(self, kind: str, paths: dict[str, str]) -> Diagonal:
        means = torch._foreach_div(list(self.sums.values()), self.n)
        values = dict(zip(self.sums, means, strict=True))
        return Diagonal(self.n, kind, {name: paths[name] for name in values}, values)


def _add_product(
    gradients: ParameterGradients, squared: Tensor, out: Tensor, squares: SquareSums
) -> None:
    gradients.add_squares_of_terms(out, squared)
