"""One run through the network, and the way back from its output to the uses of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ewc_lib.score.graph import Graph, endmost
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.record import ParameterUse, Recorder

Columns: TypeAlias = Float[Tensor, "K ..."]
"""Output columns, or gradients along them, one behind the other."""


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

    @property
    def output_for_sums(self) -> Tensor:
        """The output, without its graph, in the precision of the sums."""
        output = self.output.detach()
        return output.to(sum_dtype(output))

    @property
    def nbytes(self) -> int:
        """Size of the results of all operations."""
        return self.recorder.nbytes

    def pull(self, numbers: Sequence[int], columns: Columns) -> dict[int, Columns]:
        """Bring output columns back to the uses of these numbers, where they reach them.

        Several go back together, as one gradient of which each operation makes many.
        """
        if not numbers:
            return {}
        edges = self.edges(numbers)
        unit = self.unit(columns)
        columns = (columns / unit if isinstance(unit, Tensor) else columns).to(self.output)
        if len(columns) == 1:
            found = pull_through(self.output, list(edges), columns[0])
        else:
            found = pull_through_together(self.output, list(edges), columns)
        reached: dict[int, Tensor] = {}
        for its, g in zip(edges.values(), found, strict=True):
            if g is not None:
                g = in_units(g if len(columns) > 1 else g.unsqueeze(0), unit)
                reached |= dict.fromkeys(its, g)
        return reached

    def visit(
        self, numbers: Sequence[int], column: Tensor, arrive: Callable[[int, Columns], None]
    ) -> None:
        """Bring one output column back, and hand each use its gradient as soon as it is known.

        So not all of them exist at once. Nothing of a use is handed out where none arrives.
        """
        edges = self.edges(numbers)
        if not edges:
            return
        unit = self.unit(column)
        column = (column / unit if isinstance(unit, Tensor) else column).to(self.output)
        last = endmost(self.output, {edge.node for edge in edges})
        at_ends = {edge: its for edge, its in edges.items() if edge.node in last}
        on_the_way: dict[Node, list[GradientEdge]] = {}
        for edge in edges.keys() - at_ends.keys():
            on_the_way.setdefault(edge.node, []).append(edge)

        def hand_out(its: list[int], g: Tensor | None) -> None:
            if g is not None:
                for i in its:
                    arrive(i, in_units(g.detach().unsqueeze(0), unit))

        def passing(own: list[GradientEdge]) -> Callable[[tuple[Tensor | None, ...]], None]:
            def watch(gradients: tuple[Tensor | None, ...]) -> None:
                with torch.no_grad():
                    for edge in own:
                        hand_out(edges[edge], gradients[edge.output_nr])

            return watch

        handles = [node.register_prehook(passing(own)) for node, own in on_the_way.items()]
        try:
            found = pull_through(self.output, list(at_ends), column)
        finally:
            for handle in handles:
                handle.remove()
        for its, g in zip(at_ends.values(), found, strict=True):
            hand_out(its, g)

    def pull_to(self, ends: Mapping[str, Tensor], column: Tensor) -> dict[str, Tensor]:
        """Bring an output column back to parameters, summed over observations; by name."""
        if not self.output.requires_grad:
            return {}
        unit = self.unit(column)
        column = (column / unit if isinstance(unit, Tensor) else column).to(self.output)
        found = pull_through(self.output, list(ends.values()), column)
        pairs = zip(ends, found, strict=True)
        return {name: in_units(g.detach(), unit) for name, g in pairs if g is not None}

    def edges(self, numbers: Sequence[int]) -> dict[GradientEdge, list[int]]:
        """Return where the gradients of some uses arrive; those of one operation share it."""
        edges: dict[GradientEdge, list[int]] = {}
        for i in numbers:
            edges.setdefault(self.uses[i].edge, []).append(i)
        return edges

    def unit(self, columns: Tensor) -> Tensor | float:
        """Return a power of two in whose units columns are neither small nor large.

        Operations in half precision need it: what is far from one underflows or overflows there.
        """
        if self.graph.eps() <= torch.finfo(torch.float32).eps:
            return 1.0
        return torch.ldexp(columns.new_ones(()), torch.frexp(columns.abs().amax()).exponent)


def pull_through_together(
    output: Tensor, ends: Sequence[GradientEdge], columns: Columns
) -> tuple[Tensor | None, ...]:
    """Bring several output columns back at once, by a vmap of the way back.

    Raises
    ------
    RuntimeError
        If some operation cannot go back for several at once.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            output, ends, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return found


def in_units(gradient: Tensor, unit: Tensor | float) -> Tensor:
    """Multiply by a unit other than one, in the precision of the sums."""
    return gradient.to(sum_dtype(gradient)) * unit if isinstance(unit, Tensor) else gradient


def pull_through(
    output: Tensor, ends: Sequence[GradientEdge] | Sequence[Tensor], column: Tensor
) -> tuple[Tensor | None, ...]:
    """Bring an output column back to edges of the graph; None where it does not reach.

    It goes as the gradient of a scalar. A vector-Jacobian product is the same, but the first one
    in a process makes torch import sympy, which takes half a second and 40 MiB.
    """
    with torch.enable_grad():
        along = (output * column).sum()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        along, ends, retain_graph=True, allow_unused=True
    )
    return found
