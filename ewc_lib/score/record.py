"""Who used which parameter, with which input, and where the output's gradient arrives.

Operations are watched, not modules: functional code, tied weights, modules called twice and
raw parameters are all seen. What is computed from parameters alone, as a transposed, sliced or
normalised weight, is watched like a parameter. A parameter that an operation without a rule uses
together with data is *known* to need another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ewc_lib._checking import check_operation
from ewc_lib.score.batch_axis import Placement
from ewc_lib.score.graph import Graph, rounding
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.operations import inside, match
from ewc_lib.score.rules import Rule
from ewc_lib.score.values import depend_on_values


@dataclass(frozen=True, eq=False)
class ParameterUse:
    """One use of a parameter, or of a tensor computed from parameters, by an operation with a rule.

    Attributes
    ----------
    source
        The parameter or the tensor computed from parameters.
    rule
        How its gradient for each observation follows.
    input
        The other input of the operation.
    edge
        Where the gradient of the operation's output arrives.
    shape
        The shape of the operation's output.
    operation
        Its name.
    """

    source: Tensor
    rule: Rule
    input: Tensor
    edge: GradientEdge
    shape: torch.Size
    operation: str

    def signature(self, n: int) -> tuple[Any, ...]:
        """Return what must stay the same for a plan that has this use to be kept."""
        return *self.kind, self.input.dim(), len(self.shape), self.shape[:1] == (n,)

    @property
    def kind(self) -> tuple[str, type[Rule]]:
        """The operation and the rule, which do not depend on the number of observations."""
        return self.operation, type(self.rule)

    def is_silent(self, gradient: Tensor) -> bool:
        """Whether it adds nothing to the gradient of any observation, wherever these lie."""
        return not gradient.any() or (self.rule.multiplies and not self.input.any())


class Step(NamedTuple):
    """What one operation does with a watched tensor.

    Attributes
    ----------
    uses
        Numbers of the uses by rule, or None if the operation has no rule.
    results
        What it computes, if from parameters alone.
    """

    uses: tuple[int, ...] | None
    results: list[Tensor]


class Recorder(TorchFunctionMode):
    """Watch one forward pass.

    Parameters
    ----------
    parameters
        The parameters to watch, by name.
    constants
        All tensors of the model, which do not depend on the data.

    Attributes
    ----------
    uses
        Every use by an operation with a rule, in order.
    eps
        Machine precision of the coarsest computation, be there a gradient of it or not.
    depends_on_values
        Whether values decided what was computed, or which row of a tensor went where.
    nbytes
        Size of all results together.
    """

    def __init__(self, parameters: dict[str, Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.uses: list[ParameterUse] = []
        self.eps = 0.0
        self.depends_on_values = False
        self.nbytes = 0
        self._parameters = parameters
        self._steps: dict[int, list[Step]] = {id(p): [] for p in parameters.values()}
        self._constants = {id(t): (t, t._version) for t in constants}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        check_operation(func, args, kwargs)
        if code := inside(func):
            with self:
                return code(*args, **kwargs)
        output = func(*args, **kwargs)
        if not self.depends_on_values:
            self.depends_on_values = depend_on_values(func, args, kwargs, self._is_constant)
        results = _tensors(output)
        if results:
            operands = _tensors(*args, *kwargs.values())
            if any(map(torch.is_floating_point, operands)):
                self.eps = max(self.eps, *map(rounding, results))
            self.nbytes += sum(t.numel() * t.element_size() for t in results)
            self._record(func, args, kwargs, operands, results)
        return output

    def _record(
        self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor]
    ) -> None:
        constant = all(map(self._is_constant, operands))
        if constant:
            self._constants.update({id(t): (t, t._version) for t in results})
        results = [t for t in results if t.requires_grad]
        touched = Counter(id(t) for t in operands if id(t) in self._steps)
        if not touched or not results:
            return
        new = [t for t in results if all(t is not operand for operand in operands)]
        if constant and not new:  # `contiguous`, `to` and the like, where nothing is to do
            return
        numbers = self._add_uses(func, args, kwargs, results[0])
        for key, count in touched.items():
            own = tuple(i for i in numbers if id(self.uses[i].source) == key)
            step = Step(own if len(own) == count else None, new if constant else [])
            self._steps[key].append(step)
        if constant:
            for tensor in new:
                self._steps.setdefault(id(tensor), [])

    def _is_constant(self, tensor: Tensor) -> bool:
        known, version = self._constants.get(id(tensor), (None, 0))
        return known is tensor and tensor._version == version

    def _add_uses(self, func: Any, args: Any, kwargs: Any, output: Tensor) -> range:
        first = len(self.uses)
        for source, rule, other in match(func, args, kwargs):
            if id(source) in self._steps and not (output.is_complex() or output.is_nested):
                nothing = output.detach().new_empty(()).expand(output.shape)
                a = nothing if other is None else other().detach()
                edge = get_gradient_edge(output)
                self.uses.append(ParameterUse(source, rule, a, edge, output.shape, func.__name__))
        return range(first, len(self.uses))

    @property
    def steps(self) -> tuple[Any, ...]:
        """What was done with each watched tensor."""
        return tuple(tuple(step.uses for step in steps) for steps in self._steps.values())

    def uses_of(self, name: str, axes: Sequence[Placement | None]) -> list[int] | None:
        """Return the uses that make up the gradient of a parameter, or None if one has no rule.

        An operation on parameters alone, as a lookup of position embeddings, counts as a use
        where the observations have rows of their own in its output; elsewhere the uses of its
        output count.
        """
        parameter = self._parameters[name]
        return None if parameter.is_complex() else self._uses_of(parameter, axes)

    def _uses_of(self, tensor: Tensor, axes: Sequence[Placement | None]) -> list[int] | None:
        found: list[int] = []
        for step in self._steps[id(tensor)]:
            uses: list[int] | None = None
            if step.uses is not None and all(axes[i] is not None for i in step.uses):
                uses = list(step.uses)
            elif step.results:
                uses = self._join(self._uses_of(result, axes) for result in step.results)
            if uses is None:
                return None
            found += uses
        return found

    @staticmethod
    def _join(parts: Iterator[list[int] | None]) -> list[int] | None:
        found: list[int] = []
        for part in parts:
            if part is None:
                return None
            found += part
        return found


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
        return not (self.recorder.depends_on_values or self.graph.has_custom_functions)

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same for a plan to be kept."""
        uses = (use.signature(len(self)) for use in self.uses)
        return self.graph.signature, self.recorder.steps, *uses

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


def _tensors(*values: Any) -> list[Tensor]:
    """Return all tensors in nested values; most operations nest none."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            found += (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return found
