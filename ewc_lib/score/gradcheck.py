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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ewc_lib._checking import Problem
from ewc_lib._parameters import Vector
from ewc_lib._sharded import owner_of
from ewc_lib.score import lengths, memory
from ewc_lib.score.batch_axis import BatchAxis, Placement, RaggedRows, batch_axes, weigh
from ewc_lib.score.forward_pass import pull_through
from ewc_lib.score.gradients import ParameterGradients
from ewc_lib.score.graph import NOTHING, Graph
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.record import ParameterUse


class Placements(NamedTuple):
    """Where the observations may lie in some uses.

    Attributes
    ----------
    found
        For each use, all places that fit.
    sizes
        The length of each output gradient.
    silent
        Uses that add nothing to the gradient of any observation, wherever these lie.
    """

    found: dict[int, list[Placement]]
    sizes: dict[int, float]
    silent: set[int]


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
    later
        The output, and parameters whose values come and go with their layer. All their gradients
        at once would be as large as the model, so each is compared when it arrives.
    graph
        The graph of the output, which tells how precise each gradient is.
    at_edges
        The weighted gradients at some edges of the graph.
    sizes
        The length of each answer, once a rule has been judged.
    unsettled
        Parameters that have passed because their gradient is but rounding of larger ones.
    """

    direction: Float[Tensor, "N ..."]
    weights: Float[Tensor, " N"]
    answer: dict[str, Tensor]
    graph: Graph = NOTHING
    at_edges: dict[GradientEdge, Tensor | None] = field(default_factory=dict)
    later: tuple[Tensor, dict[str, Tensor]] | None = None
    sizes: dict[str, float] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)

    @classmethod
    def pose(
        cls,
        output: Tensor,
        parameters: dict[str, torch.nn.Parameter],
        graph: Graph | None = None,
        edges: Sequence[GradientEdge] = (),
    ) -> GradientCheck:
        """Draw the random numbers and ask autograd, for the gradients at some edges, too."""
        graph = graph or Graph.of(output)
        direction = random_direction(output)
        weights = random_weights(len(output)).to(output)
        if not output.requires_grad:  # it depends on none of the parameters
            return cls(direction, weights, {}, graph)
        later: dict[str, Tensor] = {
            n: p for n, p in parameters.items() if owner_of([p]) and graph.reaches(p)
        }
        at_once = {name: p for name, p in parameters.items() if not owner_of([p])}
        places = [*map(get_gradient_edge, at_once.values()), *edges]
        gradients = pull_through(output, places, weigh(direction, weights)) if places else ()
        answer = {
            name: g.to_dense() if g.is_sparse else g
            for name, g in zip(at_once, gradients, strict=False)
            if g is not None
        }
        at_edges = dict(zip(edges, gradients[len(at_once) :], strict=True))
        waiting = (output, later) if later else None
        return cls(direction, weights, answer, graph, at_edges, waiting)

    @property
    def weighted(self) -> Float[Tensor, "N ..."]:
        """The direction, with the weight of each observation."""
        return weigh(self.direction, self.weights)

    def placements(
        self, uses: Sequence[ParameterUse], plain: dict[int, Tensor], weighted: dict[int, Tensor]
    ) -> Placements:
        """Find where the observations lie, from output gradients without and with the weights.

        Along the right axis, each observation of the second is that of the first times its
        weight. If there is no such axis, rows may still have one owner each.
        """
        candidates = [(i, axis) for i, g in plain.items() for axis in self._axes(uses[i].input, g)]
        inputs = {i: uses[i].operand() for i in plain if uses[i].rule.multiplies}
        apart, sizes, of_inputs = lengths.read(
            self._compared(candidates, plain, weighted),
            lengths.of(list(plain.values())),
            lengths.of(list(inputs.values())),
        )
        places: dict[int, list[Placement]] = {i: [] for i in plain}
        for (i, axis), distance, length in zip(candidates, apart[::2], apart[1::2], strict=True):
            if distance <= _tolerance(plain[i], self.graph.eps(uses[i].edge.node)) * length:
                places[i].append(axis)
        for i in (i for i, axes in places.items() if not axes):
            rows = self._owners(plain[i], weighted[i], self.graph.eps(uses[i].edge.node))
            if rows is not None and rows.fits(uses[i].input.shape, len(self.weights)):
                places[i].append(rows)
        blank = dict(zip(inputs, of_inputs, strict=True))
        of_plain = dict(zip(plain, sizes, strict=True))
        silent = {i for i, size in of_plain.items() if 0 in (size, blank.get(i))}
        return Placements(places, of_plain, silent)

    def _axes(self, input: Tensor, plain: Tensor) -> Iterator[BatchAxis]:
        n = len(self.weights)
        return (axis for axis in batch_axes(plain.shape, n) if axis.fits(input.shape, n))

    def _compared(
        self,
        candidates: list[tuple[int, BatchAxis]],
        plain: dict[int, Tensor],
        weighted: dict[int, Tensor],
    ) -> list[Tensor]:
        """Return for each candidate how far it is from right, and how long what is right is.

        Uses by one operation share output gradients, which are compared once.
        """
        n, known = len(self.weights), dict[tuple[BatchAxis, int], tuple[Tensor, Tensor]]()
        keys = {(axis, id(plain[i])): (i, axis) for i, axis in candidates}
        nbytes = {key: plain[i].nbytes for key, (i, _) in keys.items()}
        for some in lengths.in_pieces(list(keys.items()), lambda item: nbytes[item[0]], self._room):
            expected = self.weigh([axis.split(plain[i], n) for _, (i, axis) in some])
            arrived = [axis.split(weighted[i], n) for _, (i, axis) in some]
            distances = lengths.of(lengths.differences(arrived, expected))
            pairs = zip(distances, lengths.of(expected), strict=True)
            known |= dict(zip((key for key, _ in some), pairs, strict=True))
        return [number for i, axis in candidates for number in known[axis, id(plain[i])]]

    def weigh(self, tensors: Sequence[Float[Tensor, "N ..."]]) -> list[Float[Tensor, "N ..."]]:
        """Multiply the observations of each tensor by their weights."""
        if not tensors:
            return []
        weights = {(t.dtype, t.device): self.weights.to(t) for t in tensors}
        shaped = [weights[t.dtype, t.device].reshape(-1, *[1] * (t.dim() - 1)) for t in tensors]
        return list(torch._foreach_mul(list(tensors), shaped))

    def any_axis(self, input: Tensor, plain: Tensor) -> BatchAxis | None:
        """Return an axis that the shapes allow, for what is too small to show one."""
        return next(self._axes(input, plain), None)

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
        if not (error <= _tolerance(plain, eps) * size + noise).all():  # nor is NaN of anybody
            return None
        return RaggedRows(order[nearest].where(size > 0, n), n)

    def failures(self, found: dict[str, ParameterGradients]) -> set[str]:
        """Return the parameters of which the sum of the gradients by rule is not autograd's.

        They may differ by the rounding of their terms.
        """
        compared = self._compared_totals(found)
        own = dict(zip(self.answer, lengths.of(list(self.answer.values())), strict=True))
        own |= self._compare_later(found, compared)
        sizes, distances, found_sizes = lengths.read(
            list(own.values()),
            [distance for distance, _ in compared.values()],
            [length for _, length in compared.values()],
        )
        self.sizes.update(zip(own, sizes, strict=True))
        failed = own.keys() - compared.keys()
        for name, distance, length in zip(compared, distances, found_sizes, strict=True):
            agrees = self._agrees(name, distance, found[name].parameter)
            if not agrees and not self._cancels(name, length, found[name]):
                failed.add(name)
        return failed

    def _compared_totals(
        self, found: dict[str, ParameterGradients]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each parameter how far its sum is from the answer, and how long it is.

        Those whose tensors have other shapes than the rule expects are left out.
        """

        def nbytes(name: str) -> int:
            arrived = sum(g.nbytes for g in found[name].output_gradients)
            return max(self.answer[name].nbytes, arrived)

        compared: dict[str, tuple[Tensor, Tensor]] = {}
        for some in lengths.in_pieces([n for n in found if n in self.answer], nbytes, self._room):
            totals = lengths.zeros({name: self.answer[name] for name in some})
            for name, gradients in self._weighted({n: found[n] for n in some}).items():
                try:
                    gradients.add_total(totals[name])
                except RuntimeError:
                    del totals[name]
            answers = [self.answer[name] for name in totals]
            apart = lengths.of(lengths.differences(list(totals.values()), answers))
            pairs = zip(apart, lengths.of(list(totals.values())), strict=True)
            compared |= dict(zip(totals, pairs, strict=True))
        return compared

    def _compare_later(
        self, found: dict[str, ParameterGradients], compared: dict[str, tuple[Tensor, Tensor]]
    ) -> Vector:
        """Go back once more, compare each gradient when it arrives, and return their lengths."""
        if self.later is None:
            return {}
        output, parameters = self.later
        own: Vector = {}

        def arrive(name: str, answer: Tensor) -> None:
            own[name] = lengths.of([answer])[0]
            total = lengths.zeros({name: answer})[name]
            if name in found:
                with suppress(RuntimeError):  # of another shape than the rule expects
                    self._weighted({name: found[name]})[name].add_total(total)
                    apart = lengths.of(lengths.differences([total], [answer]))[0]
                    compared[name] = apart, lengths.of([total])[0]

        with torch.enable_grad():
            number = (output * self.weighted).sum()
        visit_gradients(number, parameters, arrive)
        return own

    @property
    def _room(self) -> int:
        """What the pieces of a comparison may take."""
        return memory.budget(self.direction.device).rows

    def _agrees(self, name: str, distance: float, parameter: Tensor) -> bool:
        unit = _unit(parameter, self.graph.eps_of(parameter))
        noise = min(4 * unit, math.sqrt(unit) / 50) * self._largest
        return distance <= math.sqrt(unit) * self.sizes[name] + noise

    def _cancels(self, name: str, length: float, gradients: ParameterGradients) -> bool:
        """Whether the terms cancel, as in the bias of the keys of attention.

        Then the answer is but rounding, and what was found, too.
        """
        if any(use.source is not gradients.parameter for use in gradients.uses):
            return False  # the signs of what was computed from the parameter are not known
        if math.isnan(self.sizes[name]):
            return False
        expected, size = gradients.parameter, max(length, self.sizes[name])
        unit = _unit(expected, self.graph.eps_of(gradients.parameter))
        total = lengths.zeros({name: expected})[name]
        self._weighted({name: gradients})[name].absolute().add_total(total)
        if size <= _noise(unit) * lengths.norm(total):
            return True
        if size <= self.negligible(expected, self._largest):
            self.unsettled.add(name)
        return name in self.unsettled

    def _weighted(self, found: dict[str, ParameterGradients]) -> dict[str, ParameterGradients]:
        """Weigh the observations in the gradients of all parameters, along the only column."""
        every = [g[0] for gradients in found.values() for g in gradients.output_gradients]
        weighted = iter(self.weigh(every))
        return {
            name: replace(
                gradients,
                output_gradients=[next(weighted).unsqueeze(0) for _ in gradients.uses],
            )
            for name, gradients in found.items()
        }

    def negligible(self, like: Tensor, largest: float) -> float:
        """Return the size of what may be rounding of gradients of the largest size."""
        return _noise(_unit(like, self.graph.eps())) * largest

    @property
    def _largest(self) -> float:
        return max(self.sizes.values(), default=0.0)

    def check_vmap(
        self, name: str, parameter: Tensor, weighted: Tensor, forward_eps: float = 0.0
    ) -> None:
        """Raise a ValueError if observations taken one by one give another answer.

        They have a forward pass of their own, which rounds in another way than that of the batch.
        """
        expected = self._answer(name, torch.zeros_like(weighted))
        eps = max(forward_eps, self.graph.eps_of(parameter))
        if expected.isnan().any():
            raise ValueError(
                f"the gradient of parameter {name!r} is NaN for some observation, as that of a "
                "square root or a norm is at zero"
            )
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

    def _answer(self, name: str, default: Tensor) -> Tensor:
        if self.later is None or name not in self.later[1]:
            return self.answer.get(name, default)
        output, parameters = self.later
        edge = get_gradient_edge(parameters[name])
        found = pull_through(output, [edge], self.weighted)[0]
        return default if found is None else found.to_dense() if found.is_sparse else found

    def has_answer(self, name: str) -> bool:
        """Whether the gradient of a parameter tells right from wrong, or can only be zero."""
        if name not in self.answer and (self.later is None or name not in self.later[1]):
            return True
        return name not in self.unsettled and self.sizes[name] > 0


def visit_gradients(
    number: Tensor, parameters: Mapping[str, Tensor], arrive: Callable[[str, Tensor], None]
) -> None:
    """Hand out the gradient of each parameter as soon as it is known, and keep none of them."""

    def hand_out(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                arrive(name, gradient.to_dense() if gradient.is_sparse else gradient)

    handles = [
        p.register_post_accumulate_grad_hook(partial(hand_out, name))
        for name, p in parameters.items()
    ]
    try:
        torch.autograd.backward(number, inputs=list(parameters.values()), retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None


def random_direction(output: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
    """Draw an output direction, the same for the same shape."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)


@lru_cache(64)
def random_weights(n: int) -> Float[Tensor, " N"]:
    """Draw one weight an observation, between 1/2 and 2 in size and evenly spread.

    They are the same for the same number.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(n, generator=generator, dtype=torch.float64)
    within = torch.rand(n, generator=generator, dtype=torch.float64)
    signs = 2 * torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) - 1
    return signs * (0.5 + 1.5 * (places + 0.25 + within / 2) / n)


NO_SCORES = (
    "so they have no scores of their own. Batch statistics, contrastive terms and random numbers "
    "drawn in eval mode do that"
)


def apart(alone: Tensor, together: Tensor, eps: float = 0.0) -> Problem:
    """Tell whether observations have another output without the rest of their batch.

    No gradient shows a mixture of the inputs, before the first parameter.
    """

    def explain() -> None:
        raise ValueError(
            "the model mixes observations: the output of some of them is another without the "
            f"rest of their batch, {NO_SCORES}"
        )

    if alone.numel() != together.numel():
        explain()
    both = torch.stack([alone.detach().reshape(together.shape), together.detach()])
    a, b = lengths.wide(both.nan_to_num(neginf=0.0))
    distance, length = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
    return Problem(distance > _tolerance(together, eps) * length, explain)


def _agree(a: Tensor, b: Tensor, eps: float, noise: float = 0.0) -> bool:
    """Compare up to rounding, which is far below any wrong axis or missed use."""
    return bool(
        lengths.norm(a.to(sum_dtype(b)) - b) <= _tolerance(b, eps) * lengths.norm(b) + noise
    )


def _tolerance(values: Tensor, eps: float) -> float:
    return math.sqrt(_unit(values, eps))


def _noise(unit: float) -> float:
    """Return the rounding errors left where large terms cancel, relative to their size."""
    return min(32 * unit, math.sqrt(unit) / 2)


def _unit(values: Tensor, eps: float) -> float:
    return max(eps, float(torch.finfo(values.dtype).eps))


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
