"""Which way the gradients of each parameter go, and the proof that they are right.

There are three ways. *By rule*: the operations that use the parameter are known, and the gradient
of each observation follows from what went into them and what came back. *By vmap*: the model is
differentiated as a function of one observation. *By loop*: it is run on one after the other. A
rule needs three things: every use of the parameter was seen, each by an operation with a rule; in
each use it is known along which axis the observations lie; and no observation has a part in the
gradient of another.

None of that is taken for granted. On a few observations, or on the whole batch, a random question
is put to autograd, `GradientCheck`. Its weights show along which axis the observations lie, or
which of them each row belongs to. Then the gradients of each parameter by rule are weighed and
added, and must be autograd's answer. A parameter that fails goes by vmap, which is asked the same
question, and then by loop. If even that fails, the model mixes observations, and an error says
so. So it does if an observation alone has another output than in its batch.

A plan is kept for later batches where it is known to hold: where the graph of the output is the
same, the same operations use the parameters in the same way, and every operation is one that
leaves each row in its place, whatever the values are. Elsewhere each batch is checked, with all
of its observations. Two things a check cannot tell. With a single observation every axis
looks right, so nothing is kept. Where a use adds nothing, or two axes look right, nothing is
settled; so it is looked at again in each batch. As a last resort, the last batch and a random
share of the others are checked in any case.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib._arguments import check_choice
from ewc_lib._batches import Batch
from ewc_lib._parameters import Vector
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.batch_axis import BatchAxis, Placement, RaggedRows
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.forward_pass import ForwardPass
from ewc_lib.score.gradcheck import NO_SCORES, GradientCheck, check_alone, norm, random_direction
from ewc_lib.score.gradients import selects_entries
from ewc_lib.score.memory import sum_dtype

Certify: TypeAlias = Literal["auto", "always"]
"""Whether batches are checked where a plan could fail to hold, or all of them."""

TRIAL_SIZE = 8
"""Observations on which rules are tried before they are used on the whole batch."""

SHARE = 1 / 16
"""Batches that are checked though their plan is known to hold."""


@dataclass(frozen=True)
class Plan:
    """How the gradient of each parameter is read from its uses.

    Attributes
    ----------
    axes
        For each parameter, the numbers of its uses and where the observations lie in them.
    selects_entries
        Parameters all of whose uses are of one tensor that holds their entries, none twice.
    unsettled
        Uses that added nothing when the plan was made, or that more than one axis fitted, so that
        it says nothing about them.
    """

    axes: dict[str, dict[int, Placement]]
    selects_entries: set[str]
    unsettled: list[int]

    @property
    def is_general(self) -> bool:
        """Whether it holds for the rows of other batches, too."""
        found = (axis for axes in self.axes.values() for axis in axes.values())
        return not any(isinstance(axis, RaggedRows) for axis in found)


class Planner:
    """The plans for one model, and what they have shown.

    Parameters
    ----------
    parameters
        The parameters whose gradients are wanted, by name.
    vmap_gradients
        The way for those that no rule is used for.
    run
        Runs the model on some inputs.
    certify
        Which batches are checked.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        vmap_gradients: VmapGradients,
        run: Callable[[Any], ForwardPass],
        certify: Certify = "auto",
    ) -> None:
        check_choice("certify", certify, get_args(Certify))
        self.parameters = parameters
        self.vmap_gradients = vmap_gradients
        self.by_vmap: set[str] = set()
        self.used: set[str] = set()
        self._run = run
        self._always = certify == "always"
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._random = random.Random(0)

    def scores(self, batch: Batch, whole: ForwardPass) -> BatchScores:
        """Return a batch with a plan for its backward passes."""
        plan = self._plans.get(whole.signature)
        if plan is None or not self._holds(plan, batch, whole):
            plan = self._make(batch, whole)
        self.used |= {name for name, axes in plan.axes.items() if axes} | self.by_vmap
        return self._follow(plan, batch, whole)

    def _follow(self, plan: Plan, batch: Batch, forward: ForwardPass) -> BatchScores:
        return BatchScores(batch, forward, plan, sorted(self.by_vmap), self.vmap_gradients)

    def _holds(self, plan: Plan, batch: Batch, whole: ForwardPass) -> bool:
        """Tell whether a plan that was kept may be followed, or has to be made again."""
        if self._always:
            return False
        if (batch.last or self._random.random() < SHARE) and not self._passes(plan, batch, whole):
            return False
        found = whole.pull(self._waiting(plan, whole), random_direction(whole.output))
        return all(whole.uses[i].is_silent(g) for i, g in found.items())

    def _passes(self, plan: Plan, batch: Batch, whole: ForwardPass) -> bool:
        """Check a plan that was kept on a few observations of another batch."""
        rows = _some_rows(whole)
        trial = self._run_alone(whole, rows)
        self._compare_outputs(whole, trial, rows)
        if len(rows) < TRIAL_SIZE or trial.way != whole.way:
            return False
        check = GradientCheck.pose(trial.output, self.parameters, trial.graph)
        found = self._follow(plan, batch, trial).by_rule(check.direction)
        by_rule = self.parameters.keys() - self.by_vmap
        return all(check.passes_rule(name, found.get(name)) for name in by_rule)

    def _make(self, batch: Batch, whole: ForwardPass) -> Plan:
        """Make a plan on a few observations, or on the whole batch, and keep it if it holds."""
        rows = _some_rows(whole)
        trial = self._run_alone(whole, rows)
        predictable = whole.is_predictable and trial.way == whole.way
        few_are_enough = predictable and len(rows) == TRIAL_SIZE and not self._always
        plan = self._try(batch, trial) if few_are_enough else None
        if plan is None or not plan.is_general or self._waiting(plan, whole):
            plan = self._try(batch, whole)
        self._check_outputs(whole, trial, rows)
        if len(whole) > 1 and whole.is_predictable and plan.is_general:
            self._plans[whole.signature] = plan
        return plan

    @staticmethod
    def _waiting(plan: Plan, whole: ForwardPass) -> list[int]:
        """Return the uses that a plan says nothing about and that could add something."""
        return [i for i in plan.unsettled if not whole.uses[i].is_blank]

    def _check_outputs(self, whole: ForwardPass, trial: ForwardPass, rows: Tensor) -> None:
        """Compare the outputs of observations that have run alone with those in their batch."""
        self._compare_outputs(whole, trial, rows)
        n, parts = len(whole), []
        if not whole.recorder.rows.in_place or len(rows) == 1:
            parts.append(torch.tensor([(n - 1) // 2]))
        if self._always and n > 1:
            parts += [torch.arange(0, n, 2), torch.arange(1, n, 2)]
        for part in parts:
            self._compare_outputs(whole, self._run_alone(whole, part), part)

    def _run_alone(self, whole: ForwardPass, rows: Tensor) -> ForwardPass:
        """Run some observations without the rest of their batch."""
        at = rows.to(whole.output.device)
        try:
            return self._run(tree_map(lambda leaf: leaf[at], whole.inputs))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the model mixes observations: it runs on a batch of {len(whole)} but not on "
                f"{len(rows)} of them, {NO_SCORES} ({error})"
            ) from error

    @staticmethod
    def _compare_outputs(whole: ForwardPass, alone: ForwardPass, rows: Tensor) -> None:
        together = whole.output[rows.to(whole.output.device)]
        check_alone(alone.output, together, whole.recorder.eps)

    def _try(self, batch: Batch, trial: ForwardPass) -> Plan:
        """Let every parameter whose rules fail go by vmap, and check that too."""
        check = GradientCheck.pose(trial.output, self.parameters, trial.graph)
        numbers = range(len(trial.uses))
        plain = trial.pull(numbers, check.direction)
        weighted = trial.pull(numbers, check.weighted)
        axes, unclear = self._placements(trial, check, plain, weighted)
        plan = self._choose(trial, axes, plain)
        found = self._follow(plan, batch, trial).by_rule(check.direction, plain)
        failed = [n for n in self.parameters if not check.passes_rule(n, found.get(n))]
        plan.unsettled.extend(unclear | self._without_effect(trial, plan, check, plain))
        self.by_vmap.update(failed)
        self._check_vmap(self._follow(plan, batch, trial), check)
        return plan

    @staticmethod
    def _placements(
        trial: ForwardPass,
        check: GradientCheck,
        plain: dict[int, Tensor],
        weighted: dict[int, Tensor],
    ) -> tuple[list[Placement | None], set[int]]:
        """Find where the observations lie in each use, and the uses that do not show it."""
        largest = max(map(norm, plain.values()), default=0.0)
        axes: list[Placement | None] = [BatchAxis()] * len(trial.uses)
        unclear = set()
        for i, g in plain.items():
            use = trial.uses[i]
            eps = trial.graph.eps(use.edge.node)
            found = check.placements(use.input, g, weighted[i], eps)
            axes[i] = found[0] if found else None
            if not found and norm(g) <= check.negligible(g, largest):
                axes[i] = check.any_axis(use.input, g)
                unclear.add(i)
            elif len(found) > 1:
                unclear.add(i)
        return axes, unclear

    def _without_effect(
        self, trial: ForwardPass, plan: Plan, check: GradientCheck, plain: dict[int, Tensor]
    ) -> set[int]:
        """Return the numbers of the uses that add nothing, or to a gradient that is nothing."""
        uses = {i for axes in plan.axes.values() for i in axes}
        silent = {i for i in uses if trial.uses[i].is_silent(plain[i])}
        return silent.union(*(axes for n, axes in plan.axes.items() if not check.has_answer(n)))

    def _choose(
        self, trial: ForwardPass, axes: list[Placement | None], plain: dict[int, Tensor]
    ) -> Plan:
        plan = Plan({}, set(), [])
        for name, parameter in self.parameters.items() if trial.uses else ():
            numbers = [i for i in trial.recorder.uses_of(name, axes) or [] if i in plain]
            plan.axes[name] = {i: found for i in numbers if (found := axes[i]) is not None}
            sources = {id(trial.uses[i].source): trial.uses[i].source for i in numbers}
            if len(sources) == 1 and selects_entries(next(iter(sources.values())), parameter):
                plan.selects_entries.add(name)
        return plan

    def _check_vmap(self, scores: BatchScores, check: GradientCheck) -> None:
        """Check the way by vmap too; observations taken one at a time have the last word."""
        try:
            self._compare(scores, check)
        except ValueError:
            if self.vmap_gradients.by_loop:
                raise
            self.vmap_gradients.by_loop = True
            self._compare(scores, check)
            self.vmap_gradients.warn("it gives other gradients than autograd")

    def _compare(self, scores: BatchScores, check: GradientCheck) -> None:
        sums: Vector = defaultdict(lambda: torch.zeros(()))
        for part, found in scores.by_function([check.direction]):
            for name, g in found.items():
                g = g[0].to(sum_dtype(g))
                sums[name] = sums[name] + torch.tensordot(check.weights[part].to(g), g, dims=1)
        for name in scores.by_vmap:
            check.check_vmap(name, self.parameters[name], sums[name], scores.forward.recorder.eps)

    def paths(self) -> dict[str, str]:
        """Say which way each parameter went."""

        def path(name: str) -> str:
            if name in self.vmap_gradients.looped:
                return "loop"
            if name in self.by_vmap:
                return "generic"
            return "rule" if name in self.used else "unused"

        return {name: path(name) for name in self.parameters}


def _some_rows(whole: ForwardPass) -> Tensor:
    """Return the numbers of some observations from the first to the last, half of them at most.

    They change places, so that a mixture shows that takes something from the first or the last
    row. Where values decide they keep their order, which lengths may have to be in.
    """
    n = len(whole)
    few = max(1, min(n // 2, TRIAL_SIZE))
    rows = torch.linspace(0, n - 1, max(few, 2)).long()[-few:]
    return rows.roll(few // 2) if whole.recorder.rows.in_place else rows
