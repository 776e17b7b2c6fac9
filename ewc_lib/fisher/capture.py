"""Who used which parameter, with which input, and where the output's gradient arrives.

Operations are watched, not modules: functional code, tied weights, modules called twice and
raw parameters are all seen. A parameter that an operation without a rule uses is *known* to
need the generic path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ewc_lib.fisher.rules import Rule, chunks, match, sum_of_squares


@dataclass(frozen=True, eq=False)
class Use:
    """One use of one parameter by an operation that has a rule."""

    name: str
    rule: Rule
    input: Tensor
    edge: GradientEdge
    operation: str

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same for a decision about this use to be kept."""
        return self.name, self.rule, self.operation, self.input.dim()


class Recorder(TorchFunctionMode):
    """Watch one forward pass.

    Parameters
    ----------
    parameters
        The parameters to watch, by name.
    n
        The number of observations in the batch.

    Attributes
    ----------
    uses
        Every use by an operation with a rule, in order.
    unknown
        Names of the parameters that some operation used without a rule.
    eps
        Machine precision of the coarsest result of any operation, as autocast may make it.
    """

    def __init__(self, parameters: dict[str, Tensor], n: int) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.unknown: set[str] = set()
        self.eps = 0.0
        self._n = n
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.eps = max(self.eps, _eps(output))
        touched = Counter(
            self._names[id(leaf)]
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and id(leaf) in self._names
        )
        if touched and _requires_grad(output):
            uses = list(self._uses(func, args, kwargs, output))
            self.uses += uses
            self.unknown |= set(touched - Counter(use.name for use in uses))
        return output

    def _uses(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> Iterator[Use]:
        for parameter, other, rule in match(func, args, kwargs):
            name = self._names.get(id(parameter))
            if name is not None and rule.fits(other, output, self._n):
                yield Use(name, rule, other.detach(), get_gradient_edge(output), func.__name__)


def _eps(output: Any) -> float:
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return max((torch.finfo(t.dtype).eps for t in leaves if t.is_floating_point()), default=0.0)


def _requires_grad(output: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of sums and squares: they would underflow or overflow in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Pulled:
    """One use together with the gradient of one output column at its operation."""

    use: Use
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> Pulled:
        """Convert to the precision of the sums, before anything is squared."""
        a = self.use.input
        a = a.to(dtype) if a.is_floating_point() else a
        return Pulled(replace(self.use, input=a), self.gradient.to(dtype))

    def gradients(self, part: slice = slice(None)) -> Tensor:
        """Gradient of the parameter for each observation of a part of the batch."""
        return self.use.rule.gradients(self.use.input[part], self.gradient[part])

    def total(self, weights: Tensor) -> Tensor:
        """Weighted sum of the gradients over observations."""
        weights = weights.to(self.gradient).reshape(-1, *[1] * (self.gradient.dim() - 1))
        return self.use.rule.total(self.use.input, self.gradient * weights)


def gradients(uses: list[Pulled], part: slice = slice(None)) -> Tensor:
    """Gradient of one parameter for each observation, summed over all its uses."""
    first, *others = uses
    total = first.gradients(part)
    for other in others:
        total = total + other.gradients(part)
    return total


def squares(uses: list[Pulled]) -> Tensor:
    """Sum over observations of the squared gradient of one parameter."""
    use, g = uses[0].use, uses[0].gradient
    if len(uses) == 1:
        return use.rule.squares(use.input, g)
    pieces = (gradients(uses, part) for part in chunks(g, use.rule.shape))
    return sum_of_squares(pieces, g.new_zeros(use.rule.shape))
