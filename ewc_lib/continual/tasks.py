"""Tasks, one after another.

A stream makes its tasks from one data set that has images, labels, and a training and a test part;
a task is a part of it, or all of it with its pixels in another order or its images turned. What a
network has to know about a task is the *scenario* (van de Ven and Tolias 2019): with ``"task"`` it
is told which task an image belongs to and has one head for each; with ``"domain"`` all tasks share
one head; with ``"class"`` the classes of all tasks so far have to be told apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Scenario", "Stream", "Task"]

Scenario: TypeAlias = Literal["task", "domain", "class"]
Labelled: TypeAlias = tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]


class Source(Protocol):
    """A data set: :class:`ewc_lib.data.Images`, or anything with these tensors."""

    @property
    def x_train(self) -> Float[Tensor, "N D"]: ...
    @property
    def y_train(self) -> Int[Tensor, " N"]: ...
    @property
    def x_test(self) -> Float[Tensor, "M D"]: ...
    @property
    def y_test(self) -> Int[Tensor, " M"]: ...


class Task(NamedTuple):
    """One task.

    Parameters
    ----------
    name
        For tables and figures.
    train, test
        Data, as :func:`train` and :func:`accuracy` take them; those of a stream are inputs
        ``[N, D]`` and labels ``[N]``. Without test data, None, nothing is measured. Labels count
        from the first of the outputs.
    outputs
        The outputs of a :class:`MultiHead` that are read while it learns the task; None for all.
    """

    name: str
    train: Any
    test: Any
    outputs: range | None = None


@dataclass(frozen=True, eq=False)
class Stream(Sequence[Task]):
    """Tasks in their order. Each is made when it is asked for, so only one is in memory.

    Attributes
    ----------
    name
        For tables and files.
    source
        The data set that all tasks are made from.
    scenario
        ``"task"``, ``"domain"`` or ``"class"``.
    n_classes
        Number of classes of one task.
    names
        Of the tasks.
    change
        Turns inputs and labels of the data set into those of a task, by its number. Labels are
        then from 0 to ``n_classes - 1``.
    settings
        What the tasks depend on beside the data set, such as a seed. A checkpoint of another
        stream is told by them.
    """

    name: str
    source: Source
    scenario: Scenario
    n_classes: int
    names: tuple[str, ...]
    change: Callable[[int, Tensor, Tensor], Labelled]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """Size of an input."""
        return self.source.x_train.shape[1]

    @property
    def n_outputs(self) -> int:
        """Number of outputs that the network needs."""
        return self.n_classes if self.scenario == "domain" else self.n_classes * len(self)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Task]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Task:  # type: ignore[override]
        t = range(len(self))[operator.index(t)]
        train = self._part(t, self.source.x_train, self.source.y_train, "training")
        test = self.test(t)
        check_classes(f"task {self.names[t]!r}", train[1], test[1])
        return Task(self.names[t], train, test, self.outputs(t, after=t))

    def test(self, t: int) -> Labelled:
        """Return the test part of a task alone, which is smaller than the whole task."""
        return self._part(t, self.source.x_test, self.source.y_test, "test")

    def _part(self, t: int, x: Tensor, y: Tensor, which: str) -> Labelled:
        x, y = self.change(t, x, y)
        if not len(x):
            raise ValueError(f"task {self.names[t]!r} has no {which} data")
        return x, y + (self.n_classes * t if self.scenario == "class" else 0)

    def outputs(self, task: int, after: int) -> range:
        """Return the outputs that are read for a task when task ``after`` is the last learned.

        They differ with ``after`` in the class scenario only, where all classes so far compete.
        """
        k = self.n_classes
        if self.scenario == "domain":
            return range(k)
        if self.scenario == "task":
            return range(k * task, k * (task + 1))
        return range(k * (after + 1))


def check_classes(name: str, train: Tensor, test: Tensor) -> None:
    if unseen := sorted(set(test.unique().tolist()) - set(train.unique().tolist())):
        raise ValueError(f"the test data of {name} hold classes {unseen} without training data")
