"""Which way the gradients of each parameter go, and the proof that they are right.

There are three ways. *By rule*: the operations that use the parameter are known, and the gradient
of each observation follows from what went into them and what came back. *By vmap*: the model is
differentiated as a function of one observation. *By loop*: it is run on one after the other. A
rule needs three things: every use of the parameter was seen, each by an operation with a rule; in
each use it is known along which axis the observations lie; and no observation has a part in the
gradient of another.

None of that is taken for granted. On a few observations, which are run alone, or on the whole
batch, a random question is put to autograd, `GradientCheck`. Of the first batch, the last and
those drawn at random, the few are run before the whole batch takes memory. The weights of the
question show along which axis the observations lie, or which of them each row belongs to. Then
the gradients of each parameter by rule are weighed and added, and must be autograd's answer. A
parameter that fails goes by vmap, which is asked the same question, and then by loop. If even
that fails, the model mixes observations, and an error says so. So it does if an observation alone
has another output than in its batch.

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
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib._arguments import check_choice
from ewc_lib._batches import Batch
from ewc_lib._checking import Problem, settle
from ewc_lib._parameters import Vector
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.forward_pass import ForwardPass
from ewc_lib.score.gradcheck import NO_SCORES, GradientCheck, apart, random_direction
from ewc_lib.score.memory import sum_dtype
from ewc_lib.score.trial import Plan, Trial

Certify: TypeAlias = Literal["auto", "always"]
"""Whether batches are checked where a plan could fail to hold, or all of them."""

TRIAL_SIZE = 8
"""Observations at most on which rules are tried before they are used on the whole batch.

Batches of less than twice as many are tried as a whole.
"""

SHARE = 1 / 16
"""Of the batches whose plan is known to hold, those that are checked nevertheless."""


class Ahead(NamedTuple):
    """What some observations of a batch have shown.

    Attributes
    ----------
    rows
        Their numbers.
    output
        Their outputs without the rest of the batch.
    way
        What was computed.
    plan
        What holds for them.
    failed
        Parameters for which it does not hold.
    judged
        What judged it, if it does not hold for all.
    """

    rows: Tensor
    output: Tensor
    way: tuple[Any, ...]
    plan: Plan
    failed: set[str]
    judged: tuple[ForwardPass, GradientCheck] | None


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
        self._is_first = True
        self._due = False
        self._ahead: Ahead | None = None

    def look_ahead(self, batch: Batch) -> None:
        """Check some observations of a batch, before all of them take memory.

        What is found there holds if the whole batch then goes the same way. Where something is
        wrong, nothing is said: the whole batch will tell what it is.
        """
        share = self._random.random() < SHARE
        self._due = self._is_first or (bool(self._plans) and (batch.last or share))
        self._is_first, self._ahead = False, None
        if self._due and len(batch) >= 2 * TRIAL_SIZE and not self._always:
            with suppress(Exception):  # one of the model's own, too, as of lengths out of order
                self._ahead = self._try_ahead(batch)

    def _try_ahead(self, batch: Batch) -> Ahead | None:
        """Run some observations alone, and check the plan for them or make one."""
        rows = _some_rows(len(batch), in_place=True)
        trial = self._run_some(batch.inputs, rows)
        if not trial.is_predictable:
            return None
        plan = self._plans.get(trial.signature)
        if plan is None:
            plan, check, failed = self._plan_for(batch, trial)
        else:
            check = GradientCheck.pose(trial.output, self.parameters, trial.graph)
            found = self._follow(plan, batch, trial).by_rule(check.direction[None])
            failed = check.failures(found) - self.by_vmap
            if failed:
                return None
        judged = (trial, check) if failed else None  # else their graph is let go
        return Ahead(rows, trial.output.detach(), trial.way, plan, failed, judged)

    def problems(self, whole: ForwardPass) -> list[Problem]:
        """Return what may be wrong with the outputs, if some were looked at ahead."""
        if not self._went_as(whole):
            return []
        assert self._ahead is not None
        return [self._apart(whole, self._ahead.output, self._ahead.rows)]

    def check_apart(self, whole: ForwardPass) -> None:
        """Compare the outputs of some observations alone with those in the batch, if it is due.

        That is so for the first batch, and with ``certify="always"`` for every one.
        """
        due, self._is_first = self._is_first or self._always, False
        if due and len(whole) > 1:
            rows = _some_rows(len(whole), whole.recorder.rows.in_place)
            self._check_outputs(whole, self._run_alone(whole, rows), rows)

    def _went_as(self, whole: ForwardPass) -> bool:
        """Whether what was looked at ahead went the same way as the whole batch."""
        ahead = self._ahead
        return ahead is not None and whole.is_predictable and ahead.way == whole.way

    def scores(self, batch: Batch, whole: ForwardPass) -> BatchScores:
        """Return a batch with a plan for its backward passes."""
        plan, went = self._plans.get(whole.signature), self._went_as(whole)
        if plan is None and went and self._ahead is not None and self._ahead.plan.is_general:
            plan = self._plans[whole.signature] = self._accept(batch, self._ahead)
        if plan is None or self._always or (self._due and not went) or self._speaks(plan, whole):
            plan = self._make(batch, whole, went)
        self._ahead = None
        self.used |= {name for name, axes in plan.axes.items() if axes} | self.by_vmap
        return self._follow(plan, batch, whole)

    def _accept(self, batch: Batch, ahead: Ahead) -> Plan:
        """Take the plan that was made ahead; what it does not hold for goes by vmap."""
        if ahead.judged is not None:
            trial, check = ahead.judged
            self.by_vmap.update(ahead.failed)
            self._check_vmap(self._follow(ahead.plan, batch, trial), check)
        return ahead.plan

    def _plan_for(self, batch: Batch, trial: ForwardPass) -> tuple[Plan, GradientCheck, set[str]]:
        return Trial(self.parameters, trial, partial(self._follow, batch=batch)).plan()

    def _follow(self, plan: Plan, batch: Batch, forward: ForwardPass) -> BatchScores:
        return BatchScores(batch, forward, plan, sorted(self.by_vmap), self.vmap_gradients)

    def _speaks(self, plan: Plan, whole: ForwardPass) -> bool:
        """Whether a use of which a plan says nothing adds something now."""
        if not (waiting := self._waiting(plan, whole)):
            return False
        found = whole.pull(waiting, random_direction(whole.output)[None])
        return not all(whole.uses[i].is_silent(g) for i, g in found.items())

    def _make(self, batch: Batch, whole: ForwardPass, went: bool) -> Plan:
        """Make a plan on a few observations, or on the whole batch, and keep it if it holds."""
        plan = self._try(batch, whole) if went else self._try_some_or_all(batch, whole)
        if len(whole) > 1 and whole.is_predictable and plan.is_general:
            self._plans[whole.signature] = plan
        return plan

    def _try_some_or_all(self, batch: Batch, whole: ForwardPass) -> Plan:
        """Make a plan where no observations were looked at ahead."""
        rows = _some_rows(len(whole), whole.recorder.rows.in_place)
        trial = self._run_alone(whole, rows)
        predictable = whole.is_predictable and trial.way == whole.way
        few_are_enough = predictable and len(whole) >= 2 * TRIAL_SIZE and not self._always
        plan = self._try(batch, trial) if few_are_enough else None
        if plan is None or not plan.is_general or self._waiting(plan, whole):
            plan = self._try(batch, whole)
        self._check_outputs(whole, trial, rows)
        return plan

    @staticmethod
    def _waiting(plan: Plan, whole: ForwardPass) -> list[int]:
        """Return the uses that a plan says nothing about and that could add something."""
        return [i for i in plan.unsettled if not whole.uses[i].is_blank]

    def _check_outputs(self, whole: ForwardPass, trial: ForwardPass, rows: Tensor) -> None:
        """Compare the outputs of observations that have run alone with those in their batch."""
        settle([self._apart(whole, trial.output, rows)])
        n, parts = len(whole), []
        if not whole.recorder.rows.in_place or len(rows) == 1:
            parts.append(torch.tensor([(n - 1) // 2]))
        if self._always and n > 1:
            parts += [torch.arange(0, n, 2), torch.arange(1, n, 2)]
        for part in parts:
            settle([self._apart(whole, self._run_alone(whole, part).output, part)])

    def _run_alone(self, whole: ForwardPass, rows: Tensor) -> ForwardPass:
        """Run some observations without the rest of their batch."""
        try:
            return self._run_some(whole.inputs, rows)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the model mixes observations: it runs on a batch of {len(whole)} but not on "
                f"{len(rows)} of them, {NO_SCORES} ({error})"
            ) from error

    def _run_some(self, inputs: Any, rows: Tensor) -> ForwardPass:
        return self._run(tree_map(lambda leaf: leaf[rows.to(leaf.device)], inputs))

    @staticmethod
    def _apart(whole: ForwardPass, alone: Tensor, rows: Tensor) -> Problem:
        together = whole.output[rows.to(whole.output.device)]
        return apart(alone, together, whole.recorder.eps)

    def _try(self, batch: Batch, trial: ForwardPass) -> Plan:
        """Let every parameter whose rules fail go by vmap, and check that too."""
        plan, check, failed = self._plan_for(batch, trial)
        self.by_vmap.update(failed)
        self._check_vmap(self._follow(plan, batch, trial), check)
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
        for part, found in scores.by_function(check.direction.unsqueeze(0)):
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


@lru_cache(64)
def _some_rows(n: int, in_place: bool) -> Tensor:
    """Return the numbers of some observations from the first to the last.

    They are a quarter at most, since their gradients take memory, or half of a small batch.
    They change places, so that a mixture shows that takes something from the first or the last
    row, or from the one as far from the other end. Two rows could be a pair that is mixed, so
    there are three. Where values decide they keep their order, which lengths may have to be in.
    """
    few = min(n // 4 if n >= 2 * TRIAL_SIZE else n // 2, TRIAL_SIZE)
    few = max(few, 3) if n > 3 else 1
    rows = torch.linspace(0, n - 1, max(few, 2)).long()[-few:]
    return rows.roll(1) if in_place else rows
