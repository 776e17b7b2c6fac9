"""One pass through the model, from which a plan is made and on which it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.batch_axis import BatchAxis, Placement, RaggedRows
from ewc_lib.score.forward_pass import ForwardPass
from ewc_lib.score.gradcheck import GradientCheck, Placements
from ewc_lib.score.gradients import selects_entries


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
    together
        Whether several output columns may go back at once, and give what each gives alone.
    """

    axes: dict[str, dict[int, Placement]]
    selects_entries: set[str]
    unsettled: list[int]
    together: bool = False

    @property
    def is_general(self) -> bool:
        """Whether it holds for the rows of other batches, too."""
        found = (axis for axes in self.axes.values() for axis in axes.values())
        return not any(isinstance(axis, RaggedRows) for axis in found)


@dataclass(frozen=True, eq=False)
class Trial:
    """A pass through the model on which rules are tried.

    Attributes
    ----------
    parameters
        The parameters whose gradients are wanted, by name.
    forward
        The pass.
    follow
        From a plan and this pass (``forward=``) to its backward passes.
    """

    parameters: dict[str, nn.Parameter]
    forward: ForwardPass
    follow: Callable[..., BatchScores]

    def plan(self) -> tuple[Plan, GradientCheck, set[str]]:
        """Return a plan, what judged it, and the parameters for which it does not hold."""
        trial = self.forward
        together = memory.budget(trial.output.device).columns > 0
        if together:  # what goes back at once may be wrong, or not work at all
            check = GradientCheck.pose(trial.output, self.parameters, trial.graph)
            try:
                plan, failed = self._judged(check, *_at_once(trial, check))
            except RuntimeError:
                together = False
            else:
                together = not failed
        if not together:
            check, plain, weighted = self._apart_from_each_other()
            plan, failed = self._judged(check, plain, weighted)
        return replace(plan, together=together), check, failed

    def _apart_from_each_other(
        self,
    ) -> tuple[GradientCheck, dict[int, Tensor], dict[int, Tensor]]:
        """Bring back the direction, and with the answer of autograd the weighted direction."""
        trial = self.forward
        edges = trial.edges(range(len(trial.uses)))
        check = GradientCheck.pose(trial.output, self.parameters, trial.graph, list(edges))
        found = check.at_edges.items()
        weighted = {i: g for edge, g in found if g is not None for i in edges[edge]}
        check.at_edges.clear()
        return check, _single(trial.pull(sorted(weighted), check.direction[None])), weighted

    def _judged(
        self, check: GradientCheck, plain: dict[int, Tensor], weighted: dict[int, Tensor]
    ) -> tuple[Plan, set[str]]:
        """Make a plan from output gradients without and with weights, and judge it."""
        places = check.placements(self.forward.uses, plain, weighted)
        weighted.clear()  # of a large model they take as much as its results
        axes, unclear = self._placements(check, plain, places)
        plan = self._choose(axes, plain)
        columns = {i: g.unsqueeze(0) for i, g in plain.items()}
        scores = self.follow(plan, forward=self.forward)
        by_rule = scores.by_rule(check.direction[None], columns)
        failed = check.failures(by_rule)
        plan.unsettled.extend(unclear | self._without_effect(plan, check, places))
        return plan, failed

    def _placements(
        self, check: GradientCheck, plain: dict[int, Tensor], places: Placements
    ) -> tuple[list[Placement | None], set[int]]:
        """Choose where the observations lie in each use, and tell which do not show it."""
        uses, largest = self.forward.uses, max(places.sizes.values(), default=0.0)
        axes: list[Placement | None] = [BatchAxis()] * len(uses)
        unclear = set()
        for i, found in places.found.items():
            axes[i] = found[0] if found else None
            if not found and places.sizes[i] <= check.negligible(plain[i], largest):
                axes[i] = check.any_axis(uses[i].input, plain[i])
                unclear.add(i)
            elif len(found) > 1:
                unclear.add(i)
        return axes, unclear

    @staticmethod
    def _without_effect(plan: Plan, check: GradientCheck, places: Placements) -> set[int]:
        """Return the numbers of the uses that add nothing, or to a gradient that is nothing."""
        uses = {i for axes in plan.axes.values() for i in axes}
        of_nothing = (axes for n, axes in plan.axes.items() if not check.has_answer(n))
        return (uses & places.silent).union(*of_nothing)

    def _choose(self, axes: list[Placement | None], plain: dict[int, Tensor]) -> Plan:
        plan, trial = Plan({}, set(), []), self.forward
        for name, parameter in self.parameters.items() if trial.uses else ():
            numbers = [i for i in trial.recorder.uses_of(name, axes) or [] if i in plain]
            plan.axes[name] = {i: found for i in numbers if (found := axes[i]) is not None}
            sources = {id(trial.uses[i].source): trial.uses[i].source for i in numbers}
            if len(sources) == 1 and selects_entries(next(iter(sources.values())), parameter):
                plan.selects_entries.add(name)
        return plan


def _at_once(
    trial: ForwardPass, check: GradientCheck
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Bring back the direction and the weighted direction together."""
    found = trial.pull(range(len(trial.uses)), torch.stack([check.direction, check.weighted]))
    cut = {id(g): g.unbind() for g in found.values()}  # uses share output gradients
    plain = {i: cut[id(g)][0] for i, g in found.items()}
    return plain, {i: cut[id(g)][1] for i, g in found.items()}


def _single(found: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the gradients along the only column; uses that share one still do."""
    alone = {id(g): g[0] for g in found.values()}
    return {i: alone[id(g)] for i, g in found.items()}
