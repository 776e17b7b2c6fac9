"""One run through the network, and the way back from its output to the uses of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ewc_lib.score.graph import Graph
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.record import ParameterUse, Recorder


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One forward pass: the output, and every use of a parameter on the way."""

    inputs: Any
    output: Tensor
    recorder: Recorder

    def __len__(self) -> int:
        return len(self.output)

    @property
    def uses(self) -> list[ParameterUse]:
        """Uses by operations with a rule; none if the output depends on no parameter."""
        return self.recorder.uses if self.output.requires_grad else []

    @cached_property
    def graph(self) -> Graph:
        """What was computed."""
        return Graph.of(self.output)

    @property
    def is_predictable(self) -> bool:
        """Whether a batch with the same graph uses the parameters in the same way."""
        return self.recorder.rows.in_place and not self.graph.has_custom_functions

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same for a plan to be kept."""
        uses = (use.signature(len(self)) for use in self.uses)
        return *self.way, *uses

    @property
    def way(self) -> tuple[Any, ...]:
        """The operations, and what they do with each parameter."""
        return self.graph.signature, self.recorder.steps

    def pull(self, numbers: Sequence[int], column: Tensor) -> dict[int, Tensor]:
        """Bring an output column back to the uses of these numbers, where it reaches them."""
        if not numbers:
            return {}
        edges = [self.uses[i].edge for i in numbers]
        unit = self.unit(column)
        column = (column / unit).to(self.output)
        gradients = pull_through(self.output, edges, column)
        found = {i: g for i, g in zip(numbers, gradients, strict=True) if g is not None}
        return {i: in_units(g, unit) for i, g in found.items()}

    def unit(self, columns: Tensor) -> Tensor | float:
        """Return a power of two in whose units columns are neither small nor large.

        Operations in half precision need it: what is far from one underflows or overflows there.
        """
        if self.graph.eps() <= torch.finfo(torch.float32).eps:
            return 1.0
        return torch.ldexp(columns.new_ones(()), torch.frexp(columns.abs().amax()).exponent)


def in_units(gradient: Tensor, unit: Tensor | float) -> Tensor:
    """Multiply by a unit other than one, in the precision of the sums."""
    return gradient.to(sum_dtype(gradient)) * unit if isinstance(unit, Tensor) else gradient


def pull_through(
    output: Tensor, ends: Sequence[Tensor] | Sequence[GradientEdge], column: Tensor
) -> tuple[Tensor | None, ...]:
    """Bring an output column back to tensors or edges of the graph; None where it does not reach.

    It goes as the gradient of a scalar. A vector-Jacobian product is the same, but the first one
    in a process makes torch import sympy, which takes half a second and 40 MiB.
    """
    with torch.enable_grad():
        along = (output * column).sum()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        along, ends, retain_graph=True, allow_unused=True
    )
    return found
