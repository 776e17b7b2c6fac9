"""What learning needs to know of tasks: of a stream, and of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ewc_lib._calling import forward
from ewc_lib._forms import is_whole
from ewc_lib._restoring import evaluating
from ewc_lib.continual._checkpoint import plain
from ewc_lib.continual._reading import check_again, device_of
from ewc_lib.continual.tasks import Source, Stream, Task
from ewc_lib.heads import MultiHead, contains


class Course(Protocol):
    """Tasks in the order in which they are learned."""

    name: str

    @property
    def n_known(self) -> int:
        """Number of tasks whose test data are known now."""
        ...

    def numbers(self, start: int, names: Sequence[str]) -> Iterator[int]:
        """Yield the numbers of the tasks after those learned, when each is at hand."""
        ...

    def take(self, t: int) -> Task:
        """Return the task whose number came last, and keep nothing of its training data."""
        ...

    def test(self, t: int) -> Any:
        """Return the test data of a task, None if it has none."""
        ...

    def outputs(self, t: int, after: int) -> range | None:
        """Return the outputs that are read for a task when task ``after`` is the last learned."""
        ...

    def is_ahead(self, t: int, after: int) -> bool:
        """Tell whether a task cannot be judged yet, because its classes are not read."""
        ...

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint has to agree on."""
        ...


def course_of(tasks: Any, model: nn.Module) -> Course:
    """Return the tasks, after a look at whether the model can learn them.

    Raises
    ------
    TypeError
        If the model has no heads to choose from, or these are no tasks.
    ValueError
        If the network has too few outputs for a stream, or a task is of another form.
    """
    if isinstance(tasks, Stream):
        return OfStream(tasks, model)
    if isinstance(tasks, str | Tensor | nn.Module) or not isinstance(tasks, Iterable):
        raise TypeError(
            "tasks must be a Stream, or an iterable of (name, train, test), got "
            f"{type(tasks).__name__}"
        )
    return Own(tasks, model)


class OfStream:
    """The tasks of a stream, on the device of the model."""

    def __init__(self, stream: Stream, model: nn.Module) -> None:
        if stream.scenario != "domain":
            check_heads(model)
        self._stream, self._device = stream, device_of(model)
        self.name = stream.name
        self._check_outputs(model)

    def _check_outputs(self, model: nn.Module) -> None:
        net = model.net if isinstance(model, MultiHead) else model
        with evaluating(model), torch.no_grad():
            n = forward(net, self._stream.source.x_train[:1].to(self._device)).shape[1]
        if n < (wanted := self._stream.n_outputs):
            raise ValueError(f"the stream needs {wanted} outputs, the network has {n}")

    @property
    def n_known(self) -> int:
        return len(self._stream)

    def numbers(self, start: int, names: Sequence[str]) -> Iterator[int]:
        return iter(range(start, len(self._stream)))

    def take(self, t: int) -> Task:
        task = self._stream[t]
        return task._replace(train=self._here(task.train))

    def test(self, t: int) -> Any:
        return self._here(self._stream.test(t))

    def _here(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = data
        return x.to(self._device), y.to(self._device)

    def outputs(self, t: int, after: int) -> range | None:
        return self._stream.outputs(t, after)

    def is_ahead(self, t: int, after: int) -> bool:
        return self._stream.scenario == "class" and t > after

    def description(self) -> dict[str, Any]:
        stream = self._stream
        sizes = {"n_features": stream.n_features, "n_classes": stream.n_classes}
        names = {"name": stream.name, "scenario": stream.scenario, "tasks": list(stream.names)}
        return {**names, **sizes, "data": _digest(stream.source), **plain(stream.settings)}


class Own:
    """One's own tasks: a list, which is known as a whole, or what yields one after another.

    Nothing is moved or copied, and the training data of a task are let go when it is learned.
    """

    name = "tasks"

    def __init__(self, tasks: Iterable[Any], model: nn.Module) -> None:
        self._model = model
        self._all = isinstance(tasks, list | tuple)
        self._tasks = [self._checked(item) for item in tasks] if self._all else []
        self._rest = iter(self._tasks if self._all else tasks)
        self._current: Task | None = None

    @property
    def n_known(self) -> int:
        return len(self._tasks)

    def numbers(self, start: int, names: Sequence[str]) -> Iterator[int]:
        for t in count():
            self._current = self._next(t)
            if self._current is None:
                return
            if t >= start:
                yield t
            elif names[t] != self._current.name:
                raise ValueError(
                    f"the checkpoint is of another configuration: task {t} was {names[t]!r} and "
                    f"is {self._current.name!r}"
                )

    def _next(self, t: int) -> Task | None:
        if (item := next(self._rest, None)) is None:
            return None
        task = self._checked(item)
        if t == len(self._tasks):
            self._tasks.append(task._replace(train=None))
        return task

    def take(self, t: int) -> Task:
        task, self._current = self._current, None
        assert task is not None
        return task

    def test(self, t: int) -> Any:
        return self._tasks[t].test

    def outputs(self, t: int, after: int) -> range | None:
        own, now = self._tasks[t].outputs, self._tasks[after].outputs
        if own is None or now is None:
            return own
        return now if contains(now, own) else own

    def is_ahead(self, t: int, after: int) -> bool:
        own, now = self._tasks[t].outputs, self._tasks[after].outputs
        return own is not None and now is not None and own != now and contains(own, now)

    def description(self) -> dict[str, Any]:
        if not self._all:
            return {"name": self.name}
        shown = [f"{task.name}: {_shown(task.train)}, {_shown(task.test)}" for task in self._tasks]
        return {"name": self.name, "tasks": shown}

    def _checked(self, item: Any) -> Task:
        if not isinstance(item, tuple | list) or len(item) not in (3, 4) or isinstance(item, str):
            raise ValueError(
                "a task must be (name, train, test), or a Task that also says which outputs are "
                f"read, got {type(item).__name__}"
            )
        task = Task(*item)
        if task.outputs is not None:
            check_heads(self._model)
        check_again(task.train, f"training data of task {task.name!r}")
        check_again(task.test, f"test data of task {task.name!r}")
        return task


def check_heads(model: nn.Module) -> None:
    """Raise a TypeError if a model cannot read some of its outputs."""
    if not isinstance(model, MultiHead):
        raise TypeError(
            f"to read some of the outputs, the model must be a MultiHead, got "
            f"{type(model).__name__}"
        )


def _digest(source: Source, few: int = 100) -> str:
    """Tell data sets apart by all their labels and some of their images."""
    return _of_tensors(source.x_train[:few], source.y_train, source.x_test[:few], source.y_test)


def _shown(data: Any) -> str:
    """Return what is known of data without reading them."""
    if is_whole(data):
        inputs, target = tree_leaves(data[:-1]), data[-1]
        return _of_tensors(
            *(torch.as_tensor(leaf[:100]) for leaf in inputs), torch.as_tensor(target)
        )
    size = f" of {len(data)}" if hasattr(data, "__getitem__") and hasattr(data, "__len__") else ""
    return f"{type(data).__name__}{size}"


def _of_tensors(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
