"""One batch that has gone through the model, ready for backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ewc_lib._batches import Batch
from ewc_lib._parameters import Vector
from ewc_lib.score import memory
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.forward_pass import Columns, ForwardPass, in_units
from ewc_lib.score.gradients import ParameterGradients, UseInBatch
from ewc_lib.score.memory import sum_dtype

if TYPE_CHECKING:
    from ewc_lib.score.trial import Plan


@dataclass(frozen=True, eq=False)
class BatchScores:
    """The gradients of every observation of a batch, along any output column.

    Attributes
    ----------
    batch
        Inputs and targets.
    forward
        The forward pass through the model.
    plan
        Where the observations lie in the uses of the parameters.
    by_vmap
        The parameters that no rule is used for.
    vmap_gradients
        Their way.
    """

    batch: Batch
    forward: ForwardPass
    plan: Plan
    by_vmap: list[str]
    vmap_gradients: VmapGradients

    def __len__(self) -> int:
        return len(self.forward)

    @property
    def output(self) -> Tensor:
        """The output of the model, in the precision of the sums."""
        return self.forward.output_for_sums

    @cached_property
    def uses(self) -> dict[str, dict[int, UseInBatch]]:
        """The uses of each parameter that goes by rule, cut into observations."""
        found: dict[str, dict[int, UseInBatch]] = {}
        room = self._budget.windows
        for name in self._by_rule:
            found[name] = {}
            for i in self.plan.axes[name]:
                use = self._use(name, i, room)
                room -= use.copied
                found[name][i] = use
        return found

    @cached_property
    def _budget(self) -> memory.Budget:
        return memory.budget(self.forward.output.device)

    @cached_property
    def _by_rule(self) -> dict[str, list[int]]:
        """The parameters that go by rule, and the numbers of their uses."""
        axes = self.plan.axes.items()
        return {name: list(its) for name, its in axes if its and name not in self.by_vmap}

    def _use(self, name: str, i: int, room: int) -> UseInBatch:
        """Cut one use of a parameter into observations, with room for a copy."""
        parameter = self.vmap_gradients.parameters[name]
        axis, dtype = self.plan.axes[name][i], sum_dtype(parameter)
        return UseInBatch.of(self.forward.uses[i], axis, len(self), dtype, room)

    @property
    def _numbers(self) -> list[int]:
        return sorted({i for its in self._by_rule.values() for i in its})

    def parts(self, block: Columns) -> Iterator[Columns]:
        """Cut a block of output columns into those that go back together."""
        most = self._budget.columns // max(1, self.forward.nbytes) if self.plan.together else 1
        return iter(block.split(max(1, most)))

    def by_rule(
        self, columns: Columns, pulled: dict[int, Columns] | None = None
    ) -> dict[str, ParameterGradients]:
        """Bring output columns back, together, to every parameter that goes by rule.

        ``pulled`` holds the gradients of the uses, if they are known.
        """
        arrived = self.forward.pull(self._numbers, columns) if pulled is None else pulled
        found: dict[str, ParameterGradients] = {}
        for name, uses in self.uses.items():
            if reached := {i: use for i, use in uses.items() if i in arrived}:
                found[name] = self._gradients(name, reached, arrived)
        return found

    def one_by_one(
        self, column: Columns, take: Callable[[str, ParameterGradients], None], again: bool
    ) -> None:
        """Bring one output column back, and hand out each parameter as soon as it is reached.

        So not all gradients exist at once, and no copies of windows unless they are needed
        ``again``, for other columns.
        """
        waiting = {name: set(its) for name, its in self._by_rule.items()}
        of_use: dict[int, list[str]] = {}
        for name, its in self._by_rule.items():
            for i in its:
                of_use.setdefault(i, []).append(name)
        arrived: dict[str, dict[int, Tensor]] = {name: {} for name in waiting}

        def hand_out(name: str) -> None:
            found = arrived.pop(name)
            uses = {i: self.uses[name][i] if again else self._use(name, i, room=0) for i in found}
            take(name, self._gradients(name, uses, found))

        def arrive(i: int, g: Tensor) -> None:
            for name in of_use[i]:
                arrived[name][i] = g
                waiting[name].discard(i)
                if not waiting[name]:
                    hand_out(name)

        self.forward.visit(self._numbers, column[0], arrive)
        for name in [name for name, found in arrived.items() if found]:
            hand_out(name)

    def _gradients(
        self, name: str, uses: dict[int, UseInBatch], pulled: dict[int, Columns]
    ) -> ParameterGradients:
        return ParameterGradients(
            self.vmap_gradients.parameters[name],
            list(uses.values()),
            [use.cut(pulled[i]) for i, use in uses.items()],
            name in self.plan.selects_entries,
        )

    def gradients(
        self, by_rule: dict[str, ParameterGradients], column: Tensor, part: slice = slice(None)
    ) -> Vector:
        """Write out the gradients ``[n, *shape]`` of all parameters for a part of the batch.

        ``by_rule`` is what :meth:`by_rule` returns for this ``column``, ``[1, N, ...]``.
        """
        found = {name: gradients.gradients(part) for name, gradients in by_rule.items()}
        pieces = [piece for _, piece in self.by_function(column, part)]
        found |= {name: torch.cat([piece[name][0] for piece in pieces]) for name in self.by_vmap}
        n = len(range(len(self))[part])
        return {
            name: found[name] if name in found else p.new_zeros(n, *p.shape, dtype=sum_dtype(p))
            for name, p in self.vmap_gradients.parameters.items()
        }

    def by_function(
        self, columns: Columns, part: slice = slice(None)
    ) -> Iterator[tuple[slice, Vector]]:
        """Gradients ``[K, n, *shape]`` of the parameters without a rule, piece by piece."""
        if not self.by_vmap:
            return iter(())
        unit = self.forward.unit(columns)
        columns = (columns / unit).to(self.forward.output)[:, part]
        inputs = tree_map(lambda leaf: leaf[part], self.forward.inputs)
        pieces = self.vmap_gradients.gradients(self.by_vmap, inputs, columns)
        return (
            (piece, {name: in_units(g, unit) for name, g in found.items()})
            for piece, found in pieces
        )
