"""Forward and backward passes over batches, and which path each parameter takes."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib._batches import Batch, batches, join
from ewc_lib._model import check_finite_parameters, check_modules, forward, untouched
from ewc_lib._progress import progress as show_progress
from ewc_lib.distributions import OutputDistribution
from ewc_lib.fisher.capture import Recorder, Use
from ewc_lib.fisher.certificate import Challenge, check_alone
from ewc_lib.fisher.generic import GenericPath
from ewc_lib.fisher.layout import Layout
from ewc_lib.fisher.output import Kind, columns
from ewc_lib.fisher.pulled import Pulled, Reading, is_rearranged, pull_through, sum_dtype
from ewc_lib.fisher.structures import Vector

TRIAL_SIZE = 8
"""Observations on which rules are tried before they are used on the whole batch."""

WINDOW_BYTES = 2**26
"""Memory for copies of convolution windows that are kept for all columns of a batch."""


ENOUGH_BYTES = 2**24
"""Batches are joined until the results of all operations take so much: a pass has fixed costs."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass: the output, and every use of a parameter on the way."""

    inputs: Any
    output: Tensor
    recorder: Recorder

    def __len__(self) -> int:
        return len(self.output)

    @property
    def uses(self) -> list[Use]:
        """Uses by operations with a rule; none if the output depends on no parameter."""
        return self.recorder.uses if self.output.requires_grad else []

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same for a decision to be kept."""
        return self.recorder.steps, *(use.signature(len(self)) for use in self.uses)

    @property
    def operations(self) -> list[tuple[Any, ...]]:
        """The operations that use parameters, in order."""
        return [use.kind for use in self.uses]

    def pull(self, numbers: Sequence[int], column: Tensor) -> dict[int, Tensor]:
        """Bring an output column back to the uses of these numbers, where it reaches them."""
        if not numbers:
            return {}
        edges = [self.uses[i].edge for i in numbers]
        unit = self.unit(column)
        column = (column / unit).to(self.output)
        arrived = pull_through(self.output, edges, column)
        found = {i: g for i, g in zip(numbers, arrived, strict=True) if g is not None}
        return {i: in_units(g, unit) for i, g in found.items()}

    def unit(self, columns: Tensor) -> Tensor | float:
        """Return a power of two in whose units columns are neither small nor large.

        Operations in half precision need it: what is far from one underflows or overflows there.
        """
        if self.recorder.eps <= torch.finfo(torch.float32).eps:
            return 1.0
        return torch.ldexp(columns.new_ones(()), torch.frexp(columns.abs().amax()).exponent)


def in_units(gradient: Tensor, unit: Tensor | float) -> Tensor:
    """Multiply by a unit other than one, in the precision of the sums."""
    return gradient.to(sum_dtype(gradient)) * unit if isinstance(unit, Tensor) else gradient


@dataclass(frozen=True)
class Decision:
    """How the gradient of each parameter is read from its uses.

    Attributes
    ----------
    uses
        For each parameter, the numbers of its uses and where the observations lie in them.
    rearranged
        Parameters all of whose uses are of one tensor that holds their entries, none twice.
    """

    uses: dict[str, dict[int, Layout]]
    rearranged: set[str]


@dataclass(frozen=True, eq=False)
class Run:
    """One batch, ready for backward passes."""

    batch: Batch
    distribution: OutputDistribution
    forward: Forward
    decision: Decision
    by_generic: list[str]
    generic: GenericPath

    def __len__(self) -> int:
        return len(self.forward)

    @property
    def output(self) -> Tensor:
        """The output of the model, in the precision of the sums."""
        output = self.forward.output.detach()
        return output.to(sum_dtype(output))

    def columns(self, kind: Kind, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the columns of a root of the Fisher information of the output."""
        target = self.batch.target
        return columns(kind, self.distribution, self.output, target, draws, generator)

    @cached_property
    def readings(self) -> dict[str, dict[int, Reading]]:
        """The uses of each parameter that goes by rule, cut into observations."""
        readings: dict[str, dict[int, Reading]] = {}
        room = WINDOW_BYTES
        for name, uses in self.decision.uses.items():
            if uses and name not in self.by_generic:
                dtype, readings[name] = sum_dtype(self.generic.parameters[name]), {}
                for i, layout in uses.items():
                    use = self.forward.uses[i]
                    reading = Reading.of(use, layout, len(self), dtype, room)
                    room -= reading.copied
                    readings[name][i] = reading
        return readings

    def pull(self, column: Tensor) -> dict[str, Pulled]:
        """Bring one output column back to every parameter that goes by rule."""
        numbers = sorted({i for readings in self.readings.values() for i in readings})
        arrived = self.forward.pull(numbers, column)
        found: dict[str, Pulled] = {}
        for name, readings in self.readings.items():
            if reached := {i: reading for i, reading in readings.items() if i in arrived}:
                found[name] = Pulled(
                    self.generic.parameters[name],
                    list(reached.values()),
                    [reading.cut(arrived[i]) for i, reading in reached.items()],
                    name in self.decision.rearranged,
                )
        return found

    def generic_gradients(self, block: list[Tensor]) -> Iterator[tuple[slice, Vector]]:
        """Gradients ``[K, n, *shape]`` of the parameters on the generic path, part by part."""
        if not self.by_generic:
            return iter(())
        columns = torch.stack(block)
        unit = self.forward.unit(columns)
        columns = (columns / unit).to(self.forward.output)
        parts = self.generic.gradients(self.by_generic, self.forward.inputs, columns)
        return (
            (part, {name: in_units(g, unit) for name, g in found.items()}) for part, found in parts
        )


class Passes:
    """One model, batch after batch.

    Parameters
    ----------
    model
        The network.
    parameters
        The parameters whose gradients are wanted, by name.
    distribution
        How its output is read.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        distribution: OutputDistribution,
    ) -> None:
        check_finite_parameters(dict(model.named_parameters()))
        check_modules(model)
        self.model = model
        self.parameters = parameters
        self.distribution = distribution
        self.device = next(iter(parameters.values())).device
        self.generic = GenericPath(model, parameters)
        self.by_generic: set[str] = set()
        self.used: set[str] = set()
        self._enough = 0
        self._constants = [*model.parameters(), *model.buffers()]
        self._decisions: dict[tuple[Any, ...], Decision] = {}

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Run in eval mode, without autocast or compiled code, and leave all as it was."""
        with untouched(self.model), torch.autocast(self.device.type, enabled=False), _eager():
            yield

    def over(self, data: Any, n_samples: int | None, progress: bool | None) -> Iterator[Run]:
        """Run the model on all batches, small ones joined."""
        pieces = show_progress(batches(data, self.device, n_samples), "Fisher", progress)
        return map(self.run, join(pieces, lambda: self._enough))

    def run(self, batch: Batch) -> Run:
        """Run the model on one batch, check its output, and decide the paths."""
        whole = self._forward(batch.inputs)
        output = whole.output.detach()
        if output.shape[:1] != (len(batch),):
            raise ValueError(
                f"the model must return one row per observation, got {tuple(output.shape)} for "
                f"a batch of {len(batch)}"
            )
        self.distribution.check(output, batch.target, batch.first)
        _check_output(output, self.distribution, batch)
        decision = self._decisions.get(whole.signature) or self._decide(batch, whole)
        self._enough = ENOUGH_BYTES * len(batch) // max(1, whole.recorder.nbytes)
        self.used |= {name for name, uses in decision.uses.items() if uses} | self.by_generic
        return self._read(batch, whole, decision)

    def _forward(self, inputs: Any) -> Forward:
        with Recorder(dict(self.parameters), self._constants) as recorder:
            output = forward(self.model, inputs)
        return Forward(inputs, output, recorder)

    def _decide(self, batch: Batch, whole: Forward) -> Decision:
        """Decide on a few observations, or on the whole batch if some use has no part in them.

        The decision is kept for later batches in which the same operations use the parameters.
        With a single observation every layout looks right, and with a gradient of zero every
        rule does, so such a batch does not count.
        """
        n = len(whole)
        few = min(n // 2, TRIAL_SIZE)
        first = self._forward(tree_map(lambda leaf: leaf[:few], whole.inputs)) if few else whole
        enough = few == TRIAL_SIZE and first.operations == whole.operations
        decision, conclusive = self._judge(batch, first if enough else whole)
        if enough and not conclusive:
            decision, conclusive = self._judge(batch, whole)
        check_alone(first.output, whole.output[: len(first)], whole.recorder.eps)
        if conclusive and n > 1:
            self._decisions[whole.signature] = decision
        return decision

    def _judge(self, batch: Batch, trial: Forward) -> tuple[Decision, bool]:
        """Put every parameter whose rules fail on the generic path, and check that too."""
        challenge = Challenge.pose(trial.output, self.parameters, trial.recorder.eps)
        numbers = range(len(trial.uses))
        plain = trial.pull(numbers, challenge.direction)
        weighted = trial.pull(numbers, challenge.weighted)
        layouts = [
            challenge.layout(use.input, plain.get(i), weighted.get(i))
            for i, use in enumerate(trial.uses)
        ]
        decision = self._choose(trial, layouts)
        run = self._read(batch, trial, decision)
        pulled = run.pull(challenge.direction)
        failed = [n for n in self.parameters if not challenge.passes_rule(n, pulled.get(n))]
        self.by_generic.update(failed)
        self._check_generic(self._read(batch, trial, decision), challenge)
        silent = {i for i, g in plain.items() if not g.any()}
        return decision, challenge.conclusive and not any(
            silent & readings.keys() for readings in run.readings.values()
        )

    def _choose(self, trial: Forward, layouts: list[Layout | None]) -> Decision:
        decision = Decision({}, set())
        for name, parameter in self.parameters.items() if trial.uses else ():
            numbers = trial.recorder.uses_of(name, layouts) or []
            decision.uses[name] = {i: found for i in numbers if (found := layouts[i]) is not None}
            sources = {id(trial.uses[i].source): trial.uses[i].source for i in numbers}
            if len(sources) == 1 and is_rearranged(next(iter(sources.values())), parameter):
                decision.rearranged.add(name)
        return decision

    def _check_generic(self, run: Run, challenge: Challenge) -> None:
        """Check the generic path too; observations taken one at a time have the last word."""
        try:
            self._compare(run, challenge)
        except ValueError:
            if self.generic.by_loop:
                raise
            self.generic.by_loop = True
            self._compare(run, challenge)
            self.generic.warn("it gives other gradients than autograd")

    @staticmethod
    def _compare(run: Run, challenge: Challenge) -> None:
        sums: Vector = defaultdict(lambda: torch.zeros(()))
        for part, found in run.generic_gradients([challenge.direction]):
            for name, g in found.items():
                g = g[0].to(sum_dtype(g))
                sums[name] = sums[name] + torch.tensordot(challenge.weights[part].to(g), g, dims=1)
        for name in run.by_generic:
            challenge.check_generic(name, sums[name])

    def _read(self, batch: Batch, forward: Forward, decision: Decision) -> Run:
        by_generic = sorted(self.by_generic)
        return Run(batch, self.distribution, forward, decision, by_generic, self.generic)

    def paths(self) -> dict[str, str]:
        """Say how each parameter was computed."""

        def path(name: str) -> str:
            if name in self.generic.looped:
                return "loop"
            if name in self.by_generic:
                return "generic"
            return "rule" if name in self.used else "unused"

        return {name: path(name) for name in self.parameters}


def _eager() -> AbstractContextManager[Any]:
    """Run what was compiled operation by operation, so that all of them are seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def _check_output(output: Tensor, distribution: OutputDistribution, batch: Batch) -> None:
    if output.sum().isfinite():  # then all are
        return
    invalid = distribution.invalid(output)
    if invalid.any():
        bad = invalid.reshape(len(output), -1).any(1).nonzero()[0]
        raise ValueError(f"the output of observation {batch.first + int(bad)} is not finite")
