"""What is measured of tasks while they are learned one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._restoring import evaluating
from ewc_lib.continual._course import Course
from ewc_lib.continual._reading import device_of, seeded
from ewc_lib.heads import MultiHead

Evaluate = Callable[[nn.Module, Any], float]
"""Returns how well a model does on test data; more is better."""


def _nothing() -> Float[Tensor, "0 0"]:
    return torch.zeros(0, 0, dtype=torch.float64)


@dataclass
class Learned:
    """What came of learning tasks one after another.

    Attributes
    ----------
    accuracies
        ``[T, T]``: row ``t`` after task ``t``, column ``j`` for task ``j``: what ``evaluate``
        returns, accuracies by default. It is measured for the tasks so far and for the next one,
        before it is learned; all else is NaN. Where the next one adds classes it is NaN too,
        because these are not read yet.
    initial
        ``[T]``: the same of the model before any training; NaN where the next task would be, and,
        but for the first, where tasks are made one after another, as by a generator.
    seconds_training, seconds_consolidation
        Of each task.
    names
        Of the tasks.
    lowest
        ``[T, T]``: in row ``t`` the lowest value on an earlier task among those that were measured
        while task ``t`` was learned, after the updates in ``watch``; NaN where there is none.
    """

    accuracies: Float[Tensor, "T T"]
    initial: Float[Tensor, " T"]
    seconds_training: list[float] = field(default_factory=list)
    seconds_consolidation: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lowest: Float[Tensor, "T T"] = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if len(self.lowest) < len(self.accuracies):
            self.lowest = torch.full_like(self.accuracies, math.nan)


class Measure:
    """Tests a model on the tasks of a course.

    Parameters
    ----------
    course, model
        What is learned, and by whom.
    evaluate
        Of one task.
    seed
        Of what evaluation draws from the global random state.
    """

    def __init__(self, course: Course, model: nn.Module, evaluate: Evaluate, seed: int = 0) -> None:
        self._course, self._model = course, model
        self._evaluate, self._seed = evaluate, seed

    def untrained(self) -> Learned:
        """Test before any training, on the tasks that are known."""
        found = Learned(_nothing(), torch.zeros(0, dtype=torch.float64))
        _widen(found, self._course.n_known)
        for t in range(self._course.n_known):
            if t == 0 or not self._course.is_ahead(t, 0):
                found.initial[t] = self._value(t, t)
        return found

    def before(self, t: int, found: Learned) -> None:
        """Test on a task that will be learned now."""
        is_new = t == len(found.initial)
        _widen(found, t + 1)
        if t and not self._course.is_ahead(t, t - 1):
            found.accuracies[t - 1, t] = self._value(t, t - 1)
        elif is_new and t == 0:
            found.initial[0] = self._value(0, 0)
        self._read(t, t)

    def during(self, t: int, found: Learned) -> None:
        """Test on the tasks before the one that is being learned, and keep what is lowest."""
        for j in range(t):
            value = torch.tensor(self._value(j, t), dtype=torch.float64)
            found.lowest[t, j] = torch.fmin(found.lowest[t, j], value)
        self._read(t, t)

    def after(self, t: int, found: Learned) -> None:
        """Test on the tasks so far."""
        for j in range(t + 1):
            found.accuracies[t, j] = self._value(j, t)

    def end(self, found: Learned) -> None:
        """Read the outputs of the last task.

        Raises
        ------
        ValueError
            If there was none.
        """
        if not (n := len(found.seconds_training)):
            raise ValueError("there is no task to learn (was a generator used up?)")
        self._read(n - 1, n - 1)

    def _value(self, t: int, after: int) -> float:
        test = self._course.test(t)
        if test is None:
            return math.nan
        self._read(t, after)
        with seeded(self._seed, device_of(self._model)), evaluating(self._model):
            return float(self._evaluate(self._model, test))

    def _read(self, t: int, after: int) -> None:
        outputs = self._course.outputs(t, after)
        if outputs is not None and isinstance(self._model, MultiHead):
            self._model.outputs = outputs


def _widen(found: Learned, n: int) -> None:
    """Make room for as many tasks."""
    if (more := n - len(found.initial)) > 0:
        found.initial = F.pad(found.initial, (0, more), value=math.nan)
        for name in ("accuracies", "lowest"):
            setattr(found, name, F.pad(getattr(found, name), (0, more, 0, more), value=math.nan))
