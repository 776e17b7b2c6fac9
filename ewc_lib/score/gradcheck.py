r"""The gradient check: every result is compared with autograd on the user's own model.

Reading per-observation gradients off an operation needs a guess of which axis holds the
observations, and that every use of a parameter was seen. For random weights :math:`w_n` and a
random output direction :math:`s_n`, compare

.. math:: \nabla_\theta \sum_n w_n\, s_n^\top f(x_n)
          \quad\text{with}\quad \sum_n w_n\, G_n ,

where plain autograd gives the left side and the per-observation gradients :math:`G_n`, built
from *unweighted* output gradients, give the right one. The two sides are polynomials in the
random numbers. If every use was seen, every axis was guessed right and no observation leaks into
another, they are the same. Otherwise they differ with probability one in exact arithmetic, as
two products of matrices do that are compared on a random vector (Freivalds 1977).

A computer rounds. So two gradients count as the same if they differ by less than
:math:`\sqrt\varepsilon` of their length, with the machine precision :math:`\varepsilon` of the
coarsest operation between the output and the parameter:

========  ==========  =======================
dtype     tolerance   mistakes always seen
========  ==========  =======================
float64   1.5e-8      1.5e-7 of the gradient
float32   3.5e-4      0.0035
float16   0.03        0.3
bfloat16  0.09        0.9
========  ==========  =======================

A mistake of relative size :math:`r` changes the random sum by :math:`r` times a random number of
order one. The tests measure what the last column says: over many inputs, each mistake of ten
times the tolerance is seen, and none of a tenth of it. With float32, then, a use that makes up a
ten-thousandth of a gradient can hide; in doubt, run the model in double precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score.batch_axis import BatchAxis, Placement, RaggedRows, batch_axes, weigh
from ewc_lib.score.forward_pass import pull_through
from ewc_lib.score.gradients import ParameterGradients
from ewc_lib.score.graph import NOTHING, Graph
from ewc_lib.score.memory import sum_dtype


@dataclass(frozen=True, eq=False)
class GradientCheck:
    """A random question about one batch, and autograd's answer.

    Attributes
    ----------
    direction
        The output direction ``s``, in the shape of the output.
    weights
        One weight for each observation, no two of which are close to each other.
    answer
        The weighted gradient of each parameter, by autograd. A parameter that the output does
        not depend on is left out.
    graph
        The graph of the output, which tells how precise each gradient is.
    """

    direction: Float[Tensor, "N ..."]
    weights: Float[Tensor, " N"]
    answer: dict[str, Tensor]
    graph: Graph = NOTHING
    unsettled: set[str] = field(default_factory=set)
    """Parameters that have passed because their gradient is but rounding of larger ones."""

    @classmethod
    def pose(
        cls, output: Tensor, parameters: dict[str, torch.nn.Parameter], graph: Graph | None = None
    ) -> GradientCheck:
        """Draw the random numbers and ask autograd."""
        generator, graph = torch.Generator().manual_seed(0), graph or Graph.of(output)
        direction = random_direction(output)
        weights = random_weights(len(output), generator).to(output)
        if not output.requires_grad:  # it depends on none of the parameters
            return cls(direction, weights, {}, graph)
        gradients = pull_through(output, list(parameters.values()), weigh(direction, weights))
        answer = {
            name: g.to_dense() if g.is_sparse else g
            for name, g in zip(parameters, gradients, strict=True)
            if g is not None
        }
        return cls(direction, weights, answer, graph)

    @property
    def weighted(self) -> Float[Tensor, "N ..."]:
        """The direction, with the weight of each observation."""
        return weigh(self.direction, self.weights)

    def placements(
        self, input: Tensor, plain: Tensor, weighted: Tensor, eps: float = 0.0
    ) -> list[Placement]:
        """Find where the observations may lie, from output gradients without and with the weights.

        Along the right axis, each observation of the second is that of the first times its
        weight. If there is no such axis, rows may still have one owner each.
        """
        n = len(self.weights)
        found: list[Placement] = []
        for axis in batch_axes(plain.shape, n):
            if axis.fits(input.shape, n):
                expected = weigh(axis.split(plain, n), self.weights)
                if _agree(axis.split(weighted, n), expected, eps):
                    found.append(axis)
        rows = None if found else self._owners(plain, weighted, eps)
        return [rows] if rows is not None and rows.fits(input.shape, n) else found

    def any_axis(self, input: Tensor, plain: Tensor) -> BatchAxis | None:
        """Return an axis that the shapes allow, for what is too small to show one."""
        n = len(self.weights)
        return next((a for a in batch_axes(plain.shape, n) if a.fits(input.shape, n)), None)

    def _owners(self, plain: Tensor, weighted: Tensor, eps: float) -> RaggedRows | None:
        """Tell by its weight which observation each row belongs to, if all belong to one."""
        if not plain.dim():
            return None
        n, rows = len(self.weights), plain.unsqueeze(1).flatten(1).to(sum_dtype(plain))
        rows_weighted = weighted.reshape(rows.shape).to(rows)
        size = torch.linalg.vector_norm(rows, dim=1)
        found = (rows * rows_weighted).sum(1) / size.square().where(size > 0, 1)
        ordered, order = self.weights.to(rows).sort()
        after = torch.searchsorted(ordered, found).clamp(1, n - 1) if n > 1 else found.long() * 0
        before = (after - 1).clamp(0)
        nearest = torch.where(found - ordered[before] < ordered[after] - found, before, after)
        error = torch.linalg.vector_norm(rows_weighted - ordered[nearest, None] * rows, dim=1)
        noise = 4 * _unit(plain, eps) * size.amax() if len(size) else 0.0
        if (error > _tolerance(plain, eps) * size + noise).any():
            return None
        return RaggedRows(order[nearest].where(size > 0, n), n)

    def passes_rule(self, name: str, gradients: ParameterGradients | None) -> bool:
        """Whether the sum of the gradients by rule is autograd's, up to rounding of its terms."""
        expected = self.answer.get(name)
        if gradients is None or expected is None:
            return expected is None
        weighted, eps = gradients.weighted(self.weights), self.graph.eps_of(gradients.parameter)
        try:
            found = self._total(weighted, expected)
        except RuntimeError:  # the tensors have other shapes than the rule expects
            return False
        unit = _unit(expected, eps)
        if _agree(found, expected, eps, min(4 * unit, math.sqrt(unit) / 50) * self._largest):
            return True
        if any(use.source is not gradients.parameter for use in gradients.uses):
            return False  # the signs of what was computed from the parameter are not known
        # Terms may cancel, as in the bias of the keys of attention: then both are but rounding.
        size = max(norm(found), norm(expected))
        terms = norm(self._total(weighted.absolute(), expected))
        if size <= _noise(unit) * terms:
            return True
        if size <= self.negligible(expected, self._largest):
            self.unsettled.add(name)
        return name in self.unsettled

    def negligible(self, like: Tensor, largest: float) -> float:
        """Return the size of what may be rounding of gradients of the largest size."""
        return _noise(_unit(like, self.graph.eps())) * largest

    @cached_property
    def _largest(self) -> float:
        return max((norm(g) for g in self.answer.values()), default=0.0)

    @staticmethod
    def _total(gradients: ParameterGradients, like: Tensor) -> Tensor:
        total = torch.zeros(like.shape, dtype=sum_dtype(like), device=like.device)
        gradients.add_total(total)
        return total

    def check_vmap(
        self, name: str, parameter: Tensor, weighted: Tensor, forward_eps: float = 0.0
    ) -> None:
        """Raise a ValueError if observations taken one by one give another answer.

        They have a forward pass of their own, which rounds in another way than that of the batch.
        """
        expected = self.answer.get(name, torch.zeros_like(weighted))
        eps = max(forward_eps, self.graph.eps_of(parameter))
        if not _agree(weighted, expected, eps, 100 * _unit(expected, eps) * self._largest):
            if parameter._backward_hooks:
                hooks = ", ".join(_name(hook) for hook in parameter._backward_hooks.values())
                raise ValueError(
                    f"parameter {name!r} has hooks that change its gradient ({hooks}), and what "
                    "they make of a sum is not the sum of what they make of each observation; "
                    "remove them while the scores are taken"
                )
            raise ValueError(
                f"the model mixes observations: the gradient of parameter {name!r} is not a sum "
                f"of contributions of single observations, {NO_SCORES}"
            )

    def has_answer(self, name: str) -> bool:
        """Whether the gradient of a parameter tells right from wrong, or can only be zero."""
        if name not in self.answer:
            return True
        return name not in self.unsettled and bool(self.answer[name].any())


def random_direction(output: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
    """Draw an output direction, the same for the same shape."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)


def random_weights(n: int, generator: torch.Generator) -> Float[Tensor, " N"]:
    """Draw one weight an observation, between 1/2 and 2 in size and evenly spread."""
    places = torch.randperm(n, generator=generator, dtype=torch.float64)
    within = torch.rand(n, generator=generator, dtype=torch.float64)
    signs = 2 * torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) - 1
    return signs * (0.5 + 1.5 * (places + 0.25 + within / 2) / n)


NO_SCORES = (
    "so they have no scores of their own. Batch statistics, contrastive terms and random numbers "
    "drawn in eval mode do that"
)


def check_alone(alone: Tensor, together: Tensor, eps: float = 0.0) -> None:
    """Raise a ValueError if observations have another output without the rest of their batch.

    No gradient shows a mixture of the inputs, before the first parameter.
    """
    a, b = (output.detach().nan_to_num(neginf=0.0) for output in (alone, together))
    if a.numel() != b.numel() or not _agree(a.reshape(b.shape), b, eps):
        raise ValueError(
            "the model mixes observations: the output of some of them is another without the "
            f"rest of their batch, {NO_SCORES}"
        )


def _agree(a: Tensor, b: Tensor, eps: float, noise: float = 0.0) -> bool:
    """Compare up to rounding, which is far below any wrong axis or missed use."""
    return bool(norm(a.to(sum_dtype(b)) - b) <= _tolerance(b, eps) * norm(b) + noise)


def _tolerance(values: Tensor, eps: float) -> float:
    return math.sqrt(_unit(values, eps))


def _noise(unit: float) -> float:
    """Return the rounding errors left where large terms cancel, relative to their size."""
    return min(32 * unit, math.sqrt(unit) / 2)


def _unit(values: Tensor, eps: float) -> float:
    return max(eps, float(torch.finfo(values.dtype).eps))


def norm(values: Tensor) -> float:
    """Return the length of a vector, in the precision of sums."""
    return float(torch.linalg.vector_norm(values, dtype=sum_dtype(values)))


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
