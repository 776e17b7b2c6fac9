"""What the methods with one importance for each parameter share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ewc_lib._foreach import each
from ewc_lib._parameters import Vector, check_real
from ewc_lib._selecting import Selection
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.quadratic import QuadraticPenalty
from ewc_lib.score.memory import sum_dtype


class ImportancePenalty(QuadraticPenalty):
    """A quadratic penalty whose precision is a diagonal, but need not be a Fisher information."""

    importance: ClassVar[str]
    """What the precision is; kept in the state, so that one of another method is refused."""

    def __init__(self, model: nn.Module, strength: float, *, params: Selection = None) -> None:
        super().__init__(model, strength, params=params)
        name = type(self).__name__
        check_real(self._parameters(), f"{name} knows real ones only; choose others by params=")

    @property
    def _structure(self) -> str:
        return self.importance

    def _diagonal(self, values: Vector, n_samples: int, why_zero: str) -> Diagonal:
        """Return the importance of one task; the caller's caller is warned if it is zero.

        Raise a ValueError if there is nothing to hold.
        """
        self._of_task()
        found = Diagonal(n_samples, self.importance, dict.fromkeys(values, "rule"), values)
        warn_if_zero(found.trace(), self.importance, why_zero, stacklevel=4)
        return found

    def _accumulate(self, task: Diagonal) -> None:
        """Add the importance of a task, around the present parameters."""
        self._replace(self._joined(task))

    def _exchange(self, task: Diagonal) -> None:
        """Take an importance around the present parameters; what it lacks keeps its old one."""
        precision: Fisher = task
        if self._precision is not None:
            self._held()
            if others := [name for name in self._precision.shapes if name not in task.values]:
                precision = self._in_order(self._precision._within(others), task)
        self._replace(precision)

    def _zeros(self) -> Vector:
        """Return one zero for each parameter, in float32 where the parameter has half of it."""
        return {name: torch.zeros_like(p, dtype=sum_dtype(p)) for name, p in self._detached()}

    def _copy(self) -> Vector:
        """Copy the parameters, in the precision of sums."""
        return copies(dict(self._detached()))

    def _detached(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self._parameters().items()]


@torch.no_grad()
def copies(values: Mapping[str, Tensor]) -> Vector:
    """Copy tensors, in the precision of sums."""
    empty = {name: torch.empty_like(v, dtype=sum_dtype(v)) for name, v in values.items()}
    return each("copy_", empty, values)


def warn_if_zero(trace: Tensor, importance: str, why: str, stacklevel: int) -> None:
    """Say that nothing would be protected."""
    if not trace > 0:
        warnings.warn(
            f"the importance of this task ({importance}) is zero everywhere: the penalty "
            f"protects nothing of it. {why}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
