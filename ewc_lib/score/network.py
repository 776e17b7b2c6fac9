"""The scores of a network, batch after batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib._batches import Batch, batches, join
from ewc_lib._calling import forward, untouched
from ewc_lib._checking import check_finite_parameters, check_modules
from ewc_lib._progress import progress as show_progress
from ewc_lib.likelihood.outputs import OutputDistribution
from ewc_lib.score import memory
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.by_vmap import VmapGradients
from ewc_lib.score.plan import Planner
from ewc_lib.score.record import ForwardPass, Recorder


class NetworkScores:
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
        self.planner = Planner(parameters, VmapGradients(model, parameters), self._forward)
        self._enough = 0
        self._constants = [*model.parameters(), *model.buffers()]

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Run in eval mode, without autocast or compiled code, and leave all as it was."""
        with untouched(self.model), torch.autocast(self.device.type, enabled=False), _eager():
            yield

    def over(
        self, data: Any, n_samples: int | None, progress: bool | None
    ) -> Iterator[BatchScores]:
        """Run the model on all batches, small ones joined."""
        pieces = show_progress(batches(data, self.device, n_samples), "Fisher", progress)
        return map(self.run, join(pieces, lambda: self._enough))

    def run(self, batch: Batch) -> BatchScores:
        """Run the model on one batch, check its output, and plan its backward passes."""
        whole = self._forward(batch.inputs)
        output = whole.output.detach()
        if output.shape[:1] != (len(batch),):
            raise ValueError(
                f"the model must return one row per observation, got {tuple(output.shape)} for "
                f"a batch of {len(batch)}"
            )
        self.distribution.check(output, batch.target, batch.first)
        _check_output(output, self.distribution, batch)
        scores = self.planner.scores(batch, whole)
        self._enough = memory.BATCH_BYTES * len(batch) // max(1, whole.recorder.nbytes)
        return scores

    def _forward(self, inputs: Any) -> ForwardPass:
        with Recorder(dict(self.parameters), self._constants) as recorder:
            output = forward(self.model, inputs)
        return ForwardPass(inputs, output, recorder)

    def paths(self) -> dict[str, str]:
        """Say how each parameter was computed."""
        return self.planner.paths()


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
