"""One batch that has gone through the model, ready for backward passes."""

from __future__ import annotations

from collections.abc import Iterator
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
from ewc_lib.score.forward_pass import ForwardPass, in_units
from ewc_lib.score.gradients import ParameterGradients, UseInBatch
from ewc_lib.score.memory import sum_dtype

if TYPE_CHECKING:
    from ewc_lib.score.plan import Plan


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
        output = self.forward.output.detach()
        return output.to(sum_dtype(output))

    @cached_property
    def uses(self) -> dict[str, dict[int, UseInBatch]]:
        """The uses of each parameter that goes by rule, cut into observations."""
        found: dict[str, dict[int, UseInBatch]] = {}
        room = memory.WINDOW_BYTES
        for name, axes in self.plan.axes.items():
            if axes and name not in self.by_vmap:
                dtype, found[name] = sum_dtype(self.vmap_gradients.parameters[name]), {}
                for i, axis in axes.items():
                    use = UseInBatch.of(self.forward.uses[i], axis, len(self), dtype, room)
                    room -= use.copied
                    found[name][i] = use
        return found

    def by_rule(
        self, column: Tensor, pulled: dict[int, Tensor] | None = None
    ) -> dict[str, ParameterGradients]:
        """Bring one output column back to every parameter that goes by rule.

        ``pulled`` holds the gradients of the uses, if they are known.
        """
        numbers = sorted({i for uses in self.uses.values() for i in uses})
        output_gradients = self.forward.pull(numbers, column) if pulled is None else pulled
        found: dict[str, ParameterGradients] = {}
        for name, uses in self.uses.items():
            if reached := {i: use for i, use in uses.items() if i in output_gradients}:
                found[name] = ParameterGradients(
                    self.vmap_gradients.parameters[name],
                    list(reached.values()),
                    [use.cut(output_gradients[i]) for i, use in reached.items()],
                    name in self.plan.selects_entries,
                )
        return found

    def gradients(
        self, by_rule: dict[str, ParameterGradients], column: Tensor, part: slice = slice(None)
    ) -> Vector:
        """Write out the gradients ``[n, *shape]`` of all parameters for a part of the batch.

        ``by_rule`` is what :meth:`by_rule` returns for this column.
        """
        found = {name: gradients.gradients(part) for name, gradients in by_rule.items()}
        pieces = [piece for _, piece in self.by_function([column], part)]
        found |= {name: torch.cat([piece[name][0] for piece in pieces]) for name in self.by_vmap}
        n = len(range(len(self))[part])
        return {
            name: found[name] if name in found else p.new_zeros(n, *p.shape, dtype=sum_dtype(p))
            for name, p in self.vmap_gradients.parameters.items()
        }

    def by_function(
        self, block: list[Tensor], part: slice = slice(None)
    ) -> Iterator[tuple[slice, Vector]]:
        """Gradients ``[K, n, *shape]`` of the parameters without a rule, piece by piece."""
        if not self.by_vmap:
            return iter(())
        columns = torch.stack(block)
        unit = self.forward.unit(columns)
        columns = (columns / unit).to(self.forward.output)[:, part]
        inputs = tree_map(lambda leaf: leaf[part], self.forward.inputs)
        pieces = self.vmap_gradients.gradients(self.by_vmap, inputs, columns)
        return (
            (piece, {name: in_units(g, unit) for name, g in found.items()})
            for piece, found in pieces
        )
