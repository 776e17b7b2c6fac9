"""Forward and backward passes over batches, and which path each parameter takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib._batches import Batch
from ewc_lib._model import forward
from ewc_lib.distributions import OutputDistribution
from ewc_lib.fisher.capture import Pulled, Recorder, Use, sum_dtype
from ewc_lib.fisher.certificate import Challenge, check_alone
from ewc_lib.fisher.generic import GenericPath
from ewc_lib.fisher.structures import Vector


class Passes:
    """One model, batch after batch.

    Parameters
    ----------
    model
        The network, in eval mode.
    parameters
        The parameters whose gradients are wanted, by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self.generic = GenericPath(model, parameters)
        self.by_generic: set[str] = set()
        self.used: set[str] = set()
        self._certified: set[tuple[Any, ...]] = set()

    def run(self, batch: Batch, distribution: OutputDistribution) -> Tensor:
        """Run the model on one batch, check its output, and decide the paths."""
        self.batch = batch
        with Recorder(dict(self.parameters), len(batch)) as recorder:
            self.output = forward(self.model, batch.inputs)
        output = self.output.detach()
        if output.shape[:1] != (len(batch),):
            raise ValueError(
                f"the model must return one row per observation, got {tuple(output.shape)} for "
                f"a batch of {len(batch)}"
            )
        distribution.check(output, batch.target, batch.first)
        _check_output(output, distribution, batch)
        self.uses = []
        if self.output.requires_grad:  # else it was detached from all of them
            self.uses = recorder.uses
            self.by_generic |= recorder.unknown
        self._certify(recorder.eps)
        self.uses = [use for use in self.uses if use.name not in self.by_generic]
        self.used |= {use.name for use in self.uses} | self.by_generic
        return output.to(sum_dtype(output))

    def _certify(self, eps: float) -> None:
        """Put every parameter whose rules fail on the generic path, and check that too.

        A decision is kept for later batches in which the same operations use the parameters.
        With a single observation every layout looks right, and with a gradient of zero every
        rule does, so such a batch does not count.
        """
        signature = tuple(use.signature for use in self.uses), frozenset(self.by_generic)
        if signature in self._certified:
            return
        challenge = Challenge.pose(self.output, self.parameters, eps)
        by_rule = [use for use in self.uses if use.name not in self.by_generic]
        failed = challenge.failed_rules(self._pull(by_rule, challenge.direction))
        self.by_generic |= failed
        names = sorted(self.by_generic)
        sums: Vector = defaultdict(lambda: torch.zeros(()))
        for part, found in self._generic(challenge.direction.unsqueeze(0)):
            for name, g in found.items():
                g = g[0].to(sum_dtype(g))
                sums[name] = sums[name] + torch.tensordot(challenge.weights[part].to(g), g, dims=1)
        for name in names:
            challenge.check_generic(name, sums[name])
        if half := len(self.batch) // 2:
            inputs = tree_map(lambda leaf: leaf[:half], self.batch.inputs)
            check_alone(forward(self.model, inputs), self.output[:half], eps)
            if challenge.conclusive:
                self._certified.add((signature[0], frozenset(self.by_generic)))

    def pull(self, column: Tensor) -> dict[str, list[Pulled]]:
        """Bring one output column back to every use that goes by rule."""
        return self._pull(self.uses, column)

    def _pull(self, uses: list[Use], column: Tensor) -> dict[str, list[Pulled]]:
        pulled: dict[str, list[Pulled]] = defaultdict(list)
        edges = [use.edge for use in uses]
        if edges:
            arrived = torch.autograd.grad(
                self.output, edges, column.to(self.output), retain_graph=True, allow_unused=True
            )
            for use, g in zip(uses, arrived, strict=True):
                if g is not None:
                    pulled[use.name].append(Pulled(use, g))
        return pulled

    def generic_gradients(self, block: Tensor) -> Iterator[tuple[slice, Vector]]:
        """Gradients ``[K, n, *shape]`` of the parameters on the generic path, part by part."""
        return self._generic(block.to(self.output))

    def _generic(self, block: Tensor) -> Iterator[tuple[slice, Vector]]:
        names = sorted(self.by_generic)
        return self.generic.gradients(names, self.batch.inputs, block) if names else iter(())

    def paths(self) -> dict[str, str]:
        """Say how each parameter was computed."""

        def path(name: str) -> str:
            if name in self.generic.looped:
                return "loop"
            if name in self.by_generic:
                return "generic"
            return "rule" if name in self.used else "unused"

        return {name: path(name) for name in self.parameters}


def _check_output(output: Tensor, distribution: OutputDistribution, batch: Batch) -> None:
    invalid = distribution.invalid(output)
    if invalid.any():
        bad = invalid.reshape(len(output), -1).any(1).nonzero()[0]
        raise ValueError(f"the output of observation {batch.first + int(bad)} is not finite")
