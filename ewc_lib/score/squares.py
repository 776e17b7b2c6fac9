"""Sums of squares of per-observation gradients, in as few operations as suit the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score.memory import Budget

SMALL = 1 / 16
"""Rows that take this share of a piece at most wait for each other, and are squared together."""

WAITING = 1 / 4
"""Of a piece, what may wait at most."""


class SquareSums:
    """Add squares to sums, some at once and some when :meth:`finish` is called.

    Parameters
    ----------
    budget
        What pieces may take on the device of the sums.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._rows: dict[tuple[int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        self._roots: list[tuple[Tensor, Tensor]] = []
        self._waiting = 0
        self._scratch: dict[torch.dtype, Tensor] = {}

    def scratch(self, like: Tensor, *size: int) -> Tensor:
        """Return memory for one piece, the same again: new memory costs more than its use."""
        n = torch.Size(size).numel()
        if like.dtype not in self._scratch or self._scratch[like.dtype].numel() < n:
            self._scratch[like.dtype] = like.new_empty(n)
        return self._scratch[like.dtype][:n].view(size)

    def add(
        self, out: Float[Tensor, ...], rows: Float[Tensor, ...], reusable: bool = False
    ) -> None:
        """Add the squares of rows ``[..., *out.shape]`` to ``out``, over all axes in front.

        A reduction gives the roots of their sums, which are squared when :meth:`finish` adds them.
        ``reusable`` rows are read before this returns, and may be overwritten by it.
        """
        few = rows.numel() * rows.element_size() <= self.budget.squares * SMALL
        if few and not reusable:
            self._keep(out, rows)
        elif self.budget.by_reduction:
            axes = tuple(range(rows.dim() - out.dim()))
            self._roots.append((out, torch.linalg.vector_norm(rows, dim=axes)))
            self._wait_for(out)
        else:
            add_rows(out, rows.square_() if reusable else rows.square())

    def finish(self) -> None:
        """Add what has waited."""
        sums: list[tuple[Tensor, Tensor]] = []
        for group in self._rows.values():
            outs, rows = zip(*group, strict=True)
            row = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
            if self.budget.by_reduction:
                found, pairs = torch.linalg.vector_norm(row, dim=0), self._roots
            else:
                found, pairs = row.new_zeros(row.shape[1]), sums
                add_rows(found, row.square())
            parts = found.split([out.numel() for out in outs])
            pairs += zip(outs, map(Tensor.view_as, parts, outs), strict=True)
        _together(self._roots, torch._foreach_addcmul_, 2)
        _together(sums, torch._foreach_add_, 1)
        self._rows, self._roots, self._waiting = {}, [], 0

    def _keep(self, out: Tensor, rows: Tensor) -> None:
        rows = rows.reshape(-1, out.numel())
        self._rows.setdefault((len(rows), rows.dtype), []).append((out, rows))
        self._wait_for(rows)

    def _wait_for(self, tensor: Tensor) -> None:
        """Let no more wait than a part of a piece."""
        self._waiting += tensor.numel() * tensor.element_size()
        if self._waiting > self.budget.squares * WAITING:
            self.finish()


def add_rows(out: Tensor, rows: Float[Tensor, ...]) -> None:
    """Add all rows to ``out`` in one sweep, as a product with ones."""
    rows = rows.reshape(-1, out.numel())
    out.view(-1).addmv_(rows.mT, rows.new_ones(len(rows)))


def _together(pairs: list[tuple[Tensor, Tensor]], change: Callable[..., Any], times: int) -> None:
    """Change many sums by one operation, given what each is changed by, so many times.

    A sum that comes twice is changed apart: together, two threads would write to one place.
    """
    while pairs:
        first = {out.data_ptr() or i: (out, by) for i, (out, by) in reversed([*enumerate(pairs)])}
        outs, changes = map(list, zip(*first.values(), strict=True))
        change(outs, *[changes] * times)
        done = {id(by) for by in changes}
        pairs = [pair for pair in pairs if id(pair[1]) not in done]
