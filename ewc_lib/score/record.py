"""Who used which parameter, with which input, and where the output's gradient arrives.

Operations are watched, not modules: functional code, tied weights, modules called twice and
raw parameters are all seen. What is computed from parameters alone, as a transposed, sliced or
normalised weight, is watched like a parameter. A parameter that an operation without a rule uses
together with data is *known* to need another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ewc_lib._checking import check_operation
from ewc_lib.score.batch_axis import Placement
from ewc_lib.score.graph import rounding
from ewc_lib.score.operations import Later, inside, match
from ewc_lib.score.row_tracker import RowTracker, tensors, values_read
from ewc_lib.score.rules import Rule


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
        The other input of the operation; of a normalisation, before it is normalised.
    edge
        Where the gradient of the operation's output arrives.
    shape
        The shape of the operation's output.
    operation
        Its name.
    change
        What makes of the input what the rule needs, if it is not the same.
    """

    source: Tensor
    rule: Rule
    input: Tensor
    edge: GradientEdge
    shape: torch.Size
    operation: str
    change: Callable[[Tensor], Tensor] | None = None

    def operand(self) -> Tensor:
        """Return what the rule needs beside the gradient of the output."""
        if self.change is None:
            return self.input
        with torch.no_grad():
            return self.change(self.input)

    def signature(self, n: int) -> tuple[Any, ...]:
        """Return what must stay the same for a plan that has this use to be kept.

        How many rows come to each observation matters: one looks like an axis of its own.
        """
        per_observation, rest = divmod(self.shape[:1].numel(), n)
        rows = -1 if rest else per_observation
        way = self.operation, type(self.rule), self.source.shape
        return *way, self.input.dim(), len(self.shape), rows

    def is_silent(self, gradient: Tensor) -> bool:
        """Whether it adds nothing to the gradient of any observation, wherever these lie."""
        return self.is_blank or not gradient.any()

    @property
    def is_blank(self) -> bool:
        """Whether its input is zero and with it its gradient, whatever arrives."""
        return self.rule.multiplies and not self.operand().any()


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
    inputs
        What the model is given.

    Attributes
    ----------
    uses
        Every use by an operation with a rule, in order.
    eps
        Machine precision of the coarsest computation, be there a gradient of it or not.
    rows
        Whether each row is known to have stayed in place, whatever the values are.
    nbytes
        Size of all results together.
    originals
        Parameters that the model has changed in place, and what they were.
    """

    def __init__(
        self, parameters: dict[str, Tensor], constants: Iterable[Tensor], inputs: Any = ()
    ) -> None:
        super().__init__()
        self.uses: list[ParameterUse] = []
        self.eps = 0.0
        self.nbytes = 0
        self._parameters = parameters
        self._steps: dict[int, list[Step]] = {id(p): [] for p in parameters.values()}
        self._constants = {id(t): (t, t._version) for t in constants}
        self.originals: dict[int, tuple[Tensor, Tensor]] = {}
        given = tensors(inputs)
        # Not a method of its own, which would keep it, and with it the graph, alive.
        is_constant = partial(_is_unchanged, self._constants)
        self.rows = RowTracker(len(given[0]) if given else 0, given, is_constant)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        check_operation(func, args, kwargs)
        self._keep_what_changes(func, args)
        if code := inside(func):
            with self:
                return code(*args, **kwargs)
        operands = tensors(*values_read(func, args), *kwargs.values())
        constant = all(map(self._is_constant, operands))
        versions = {id(t): t._version for t in operands}
        self.rows.check(func, args, kwargs)
        output = func(*args, **kwargs)
        results = tensors(args[0] if func is Tensor.__setitem__ else output)
        results += _bases(results, versions)
        if results:
            self.rows.see(results)
            if any(map(torch.is_floating_point, operands)):
                self.eps = max(self.eps, *map(rounding, results))
            self.nbytes += sum(t.numel() * t.element_size() for t in results)
            if constant:
                self._constants.update({id(t): (t, t._version) for t in results})
            new = [t for t in results if versions.get(id(t)) != t._version]
            if new or not constant:  # else `contiguous`, `to` and the like have nothing to do
                self._record(func, args, kwargs, operands, results, new if constant else [])
        return output

    def _keep_what_changes(self, func: Any, args: tuple[Any, ...]) -> None:
        """Copy a parameter that the model is about to change in place, as by a constraint."""
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            memory = _memory(args[0])
            for p in self._parameters.values() if memory else ():
                if _memory(p) == memory and id(p) not in self.originals:
                    self.originals[id(p)] = p, p.detach().clone()

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        results: list[Tensor],
        computed: list[Tensor],
    ) -> None:
        """Note what is done with watched tensors; ``computed`` comes from parameters alone."""
        results = [t for t in results if t.requires_grad]
        if not results:
            return
        for tensor in operands:
            self._adopt(tensor)
        touched = Counter(id(t) for t in operands if id(t) in self._steps)
        if not touched:
            return
        numbers = self._add_uses(func, args, kwargs, results[0])
        computed = [t for t in computed if t.requires_grad]
        for key, count in touched.items():
            own = tuple(i for i in numbers if id(self.uses[i].source) == key)
            others = [t for t in computed if id(t) != key]
            if others or not computed:  # what changes a tensor in place does not use that tensor
                self._steps[key].append(Step(own if len(own) == count else None, others))
        for tensor in computed:
            self._steps.setdefault(id(tensor), [])

    def _adopt(self, tensor: Tensor) -> None:
        """Watch what was computed from parameters alone out of sight, by a custom function."""
        if tensor.grad_fn is None or id(tensor) in self._steps or not self._is_constant(tensor):
            return
        for leaf in _leaves(tensor):
            if id(leaf) in self._steps:
                self._steps[id(leaf)].append(Step(None, [tensor]))
                self._steps.setdefault(id(tensor), [])

    def _is_constant(self, tensor: Tensor) -> bool:
        return _is_unchanged(self._constants, tensor)

    def _add_uses(self, func: Any, args: Any, kwargs: Any, output: Tensor) -> range:
        first = len(self.uses)
        for source, rule, other in match(func, args, kwargs):
            if id(source) in self._steps and not (output.is_complex() or output.is_nested):
                edge, name, change = get_gradient_edge(output), func.__name__, None
                if other is None:
                    a = output.detach().new_empty(()).expand(output.shape)
                elif isinstance(other, Later):
                    a, change = other.input, other.change
                else:
                    a = other().detach()
                use = ParameterUse(source, rule, a, edge, output.shape, name, change)
                self.uses.append(use)
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
        if parameter.is_complex():
            return None
        found: list[int] = []
        pending, seen = [parameter], set[int]()
        while pending:
            tensor = pending.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            for step in self._steps[id(tensor)]:
                if step.uses is not None and all(axes[i] is not None for i in step.uses):
                    found += step.uses
                elif step.results:
                    pending += step.results
                else:
                    return None
        return found


def _is_unchanged(constants: dict[int, tuple[Tensor, int]], tensor: Tensor) -> bool:
    known, version = constants.get(id(tensor), (None, 0))
    return known is tensor and tensor._version == version


def _memory(tensor: Tensor) -> int:
    """Return where a tensor is kept; 0 for those that are nowhere, as inside of a transform."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _bases(results: list[Tensor], versions: dict[int, int]) -> list[Tensor]:
    """Return the tensors of which some were views that an operation has changed in place."""
    changed = (t for t in results if versions.get(id(t), t._version) != t._version)
    return [t._base for t in changed if t._base is not None]


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a result was computed from, as far as they have a gradient."""
    pending, seen = [tensor.grad_fn], set[Any]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        pending += (function for function, _ in node.next_functions)
