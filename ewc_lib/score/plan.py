"""Which way the gradients of each parameter go, and the proof that they are right.

There are three ways. *By rule*: the operations that use the parameter are known, and the gradient
of each observation follows from what went into them and what came back. *By vmap*: the model is
differentiated as a function of one observation. *By loop*: it is run on one after the other. A
rule needs three things: every use of the parameter was seen, each by an operation with a rule; in
each use it is known along which axis the observations lie; and no observation has a part in the
gradient of another.

None of that is taken for granted. On a few observations (or the whole batch, where some operation
has no part in them) a random question is put to autograd, `GradientCheck`. Its weights show along
which axis the observations lie. Then the gradients of each parameter by rule are weighed and
added, and must be autograd's answer. A parameter that fails goes by vmap, which is asked the same
question, and then by loop. If even that fails, the model mixes observations, and an error says
so. A plan is kept for later batches in which the same operations use the parameters in the same
way, if the answer could tell right from wrong: with a single observation every axis looks right,
and with a gradient of zero every rule does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ewc_lib._batches import Batch
from ewc_lib._parameters import Vector
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.gradcheck import GradientCheck, check_alone
from ewc_lib.score.gradients import selects_entries
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.record import ForwardPass

TRIAL_SIZE = 8
"""Observations on which rules are tried before they are used on the whole batch."""


@dataclass(frozen=True)
class Plan:
    """How the gradient of each parameter is read from its uses.

    Attributes
    ----------
    axes
        For each parameter, the numbers of its uses and where the observations lie in them.
    selects_entries
        Parameters all of whose uses are of one tensor that holds their entries, none twice.
    """

    axes: dict[str, dict[int, BatchAxis]]
    selects_entries: set[str]


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
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        vmap_gradients: VmapGradients,
        run: Callable[[Any], ForwardPass],
    ) -> None:
        self.parameters = parameters
        self.vmap_gradients = vmap_gradients
        self.by_vmap: set[str] = set()
        self.used: set[str] = set()
        self._run = run
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def scores(self, batch: Batch, whole: ForwardPass) -> BatchScores:
        """Return a batch with a plan for its backward passes."""
        plan = self._plans.get(whole.signature) or self._make(batch, whole)
        self.used |= {name for name, axes in plan.axes.items() if axes} | self.by_vmap
        return self._follow(plan, batch, whole)

    def _follow(self, plan: Plan, batch: Batch, forward: ForwardPass) -> BatchScores:
        return BatchScores(batch, forward, plan, sorted(self.by_vmap), self.vmap_gradients)

    def _make(self, batch: Batch, whole: ForwardPass) -> Plan:
        """Make a plan on a few observations, or on the whole batch, and keep it if it is proved."""
        n = len(whole)
        few = min(n // 2, TRIAL_SIZE)
        first = self._run(tree_map(lambda leaf: leaf[:few], whole.inputs)) if few else whole
        enough = few == TRIAL_SIZE and first.operations == whole.operations
        plan, proved = self._try(batch, first if enough else whole)
        if enough and not proved:
            plan, proved = self._try(batch, whole)
        check_alone(first.output, whole.output[: len(first)], whole.recorder.eps)
        if proved and n > 1:
            self._plans[whole.signature] = plan
        return plan

    def _try(self, batch: Batch, trial: ForwardPass) -> tuple[Plan, bool]:
        """Let every parameter whose rules fail go by vmap, and check that too."""
        check = GradientCheck.pose(trial.output, self.parameters, trial.recorder.eps)
        numbers = range(len(trial.uses))
        plain = trial.pull(numbers, check.direction)
        weighted = trial.pull(numbers, check.weighted)
        axes = [
            check.batch_axis(use.input, plain.get(i), weighted.get(i))
            for i, use in enumerate(trial.uses)
        ]
        plan = self._choose(trial, axes)
        scores = self._follow(plan, batch, trial)
        found = scores.by_rule(check.direction)
        failed = [n for n in self.parameters if not check.passes_rule(n, found.get(n))]
        self.by_vmap.update(failed)
        self._check_vmap(self._follow(plan, batch, trial), check)
        silent = {i for i, g in plain.items() if not g.any()}
        return plan, check.conclusive and not any(
            silent & uses.keys() for uses in scores.uses.values()
        )

    def _choose(self, trial: ForwardPass, axes: list[BatchAxis | None]) -> Plan:
        plan = Plan({}, set())
        for name, parameter in self.parameters.items() if trial.uses else ():
            numbers = trial.recorder.uses_of(name, axes) or []
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

    @staticmethod
    def _compare(scores: BatchScores, check: GradientCheck) -> None:
        sums: Vector = defaultdict(lambda: torch.zeros(()))
        for part, found in scores.by_function([check.direction]):
            for name, g in found.items():
                g = g[0].to(sum_dtype(g))
                sums[name] = sums[name] + torch.tensordot(check.weights[part].to(g), g, dims=1)
        for name in scores.by_vmap:
            check.check_vmap(name, sums[name])

    def paths(self) -> dict[str, str]:
        """Say which way each parameter went."""

        def path(name: str) -> str:
            if name in self.vmap_gradients.looped:
                return "loop"
            if name in self.by_vmap:
                return "generic"
            return "rule" if name in self.used else "unused"

        return {name: path(name) for name in self.parameters}
