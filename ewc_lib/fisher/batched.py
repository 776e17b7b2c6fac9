r"""The diagonal from one gradient of each batch, without gradients of observations.

.. math:: \hat F = \frac1N \sum_b \Big( \sum_{n \in b} J_n^\top S_n v_n \Big)^2

with independent random signs :math:`v_n`: what different observations of a batch do to each other
is zero on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ewc_lib._batches import BATCH_SIZE, cut
from ewc_lib._forms import is_whole, pair
from ewc_lib._parameters import count
from ewc_lib._sharded import owner_of
from ewc_lib.fisher.output import columns
from ewc_lib.fisher.sums.base import ParameterSpace
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.score.forward_pass import ForwardPass
from ewc_lib.score.network import NetworkScores

MANY, FEWEST = 32, 2
"""Batches that one tuple of tensors is cut into, since each is one draw; and observations of each,
as long as there are so many, without which a model that mixes them would not be noticed."""


class BatchedSum(DiagonalSum):
    """Sums of the squared gradients of batches, one tensor a parameter.

    Parameters
    ----------
    space
        The parameters.

    Raises
    ------
    ValueError
        If parameters are sharded over processes.
    """

    def __init__(self, space: ParameterSpace) -> None:
        for name, parameter in space.parameters.items():
            if owner_of([parameter]):
                raise ValueError(
                    f"parameter {name!r} is shared by several processes, each with a batch of its "
                    "own; kind='sketch' takes it"
                )
        super().__init__(space)
        self.reached: set[str] = set()

    def add_batch(self, whole: ForwardPass, column: Tensor) -> None:
        """Add the square of the gradient along one output column, all observations together."""
        ends = self.space.parameters
        for name, g in whole.pull_to(ends, column).items():
            self._join(name, g.abs().square() if g.is_complex() else g.square())
            self.reached.add(name)

    def paths(self) -> dict[str, str]:
        """Say which parameters some output depends on."""
        return {name: "rule" if name in self.reached else "unused" for name in self.sums}


def in_many(data: Any) -> Any:
    """Cut one tuple of tensors into many batches; leave other data as they are."""
    if not is_whole(data):
        return data
    data = pair(data, "data")
    size = max(FEWEST, min(BATCH_SIZE, count(data) // MANY))
    return list(cut(data, size))


def add_batches(
    total: BatchedSum,
    network: NetworkScores,
    data: object,
    n_samples: int | None,
    draws: int,
    generator: torch.Generator,
    progress: bool | None,
) -> float:
    """Add all batches, as they come, and return the machine precision of their operations."""
    rounding = 0.0
    assert network.distribution is not None
    for batch, whole in network.whole_batches(data, n_samples, progress):
        output = whole.output_for_sums
        distribution, target = network.distribution, batch.target
        for block in columns("sketch", distribution, output, target, draws, generator):
            for column in block:
                total.add_batch(whole, column)
        total.n += len(batch)
        rounding = max(rounding, whole.graph.eps())
        del batch, whole  # and with them the graph, before the next one grows
    return rounding
