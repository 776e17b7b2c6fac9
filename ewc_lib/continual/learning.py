"""Tasks that are learned one after another."""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ewc_lib._forms import Pick, picked
from ewc_lib._progress import progress as show_progress
from ewc_lib.attaching import Metric
from ewc_lib.continual._checkpoint import described, description, plain, restore, save
from ewc_lib.continual._course import Course, course_of
from ewc_lib.continual._measuring import Evaluate, Learned, Measure
from ewc_lib.continual._objective import Objective
from ewc_lib.continual._reading import device_of, seeded, some
from ewc_lib.continual._suiting import check_is_for
from ewc_lib.continual.tasks import Stream, Task
from ewc_lib.continual.training import (
    MakesOptimizer,
    MakesScheduler,
    Optimizer,
    Scheduler,
    adam,
    train,
)
from ewc_lib.likelihood.agreement import Criterion

if TYPE_CHECKING:
    from ewc_lib.regularizers.protocol import Regularizer

__all__ = ["Learned", "learn"]


def learn(
    tasks: Stream | Iterable[tuple[str, Any, Any] | Task],
    model: nn.Module,
    regularizer: Regularizer | None = None,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    criterion: Criterion | None = None,
    optimizer: MakesOptimizer = adam,
    scheduler: MakesScheduler | None = None,
    reset_optimizer: bool = False,
    batch_size: int = 128,
    batch: Pick | None = None,
    proximal: bool | Metric = False,
    n_samples: int | None = None,
    evaluate: Evaluate | None = None,
    watch: Iterable[int] = (),
    seed: int = 0,
    checkpoint: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Learned:
    """Learn tasks one after another, and test on all of them after each.

    Parameters
    ----------
    tasks
        A stream, or any iterable of ``(name, train, test)`` or :class:`Task`: a list, or a
        generator that makes one task when the last one is done. Data are as in :func:`train`.
    model
        Changed in place, and runs on the device where it is. A :class:`MultiHead` where tasks
        read some of the outputs.
    regularizer
        What holds on to earlier tasks; it was made for this model. None is plain training.
    steps, epochs
        Updates, or passes over the data, for each task: exactly one of them. A pass is rounded
        up to whole batches.
    criterion, batch_size, batch
        As in :func:`train`; a regularizer sees what ``batch`` picks.
    optimizer
        Makes the optimizer from the parameters; by default Adam with its usual learning rate
        of 1e-3.
    scheduler
        Makes a scheduler from the optimizer at the beginning of each task, at the learning rate
        of its own; it is stepped after each update.
    reset_optimizer
        Whether each task begins with a new optimizer. By default its moments are kept, as van de
        Ven (2025) does.
    proximal
        As in :func:`train`.
    n_samples
        Observations of each task, drawn at random, that the regularizer sees at its end; by
        default all. Of a loader in an order of its own they are the first.
    evaluate
        Returns how well a model does on the test data of a task, as they were given; the model is
        in eval mode. By default the accuracy, if targets are classes; for other likelihoods the
        mean log-likelihood of an observation; else minus the mean loss, also where a criterion
        or the model itself computes that of a sequence: more is always better.
    watch
        Numbers of updates of each task after which the earlier tasks are tested, too. The lowest
        value of each goes into ``Learned.lowest``: right after a switch an accuracy may fall
        and come back (De Lange et al. 2023). The fall is early, so the first updates matter most:
        ``[1, 2, 5, 10, 20, 50, ...]``.
    seed
        Of the order of the data and of those observations, and, as in :func:`train`, of what
        draws from the global random state, which is left as it was.
    checkpoint
        A file that is written after each task. If it is there, learning goes on from it, with the
        same results as if it had never stopped, if the tasks and their order are the same: a
        loader with a generator of its own has to be new for each task, and what is drawn outside
        of PyTorch is not known here. It is refused if the data set, the stream, the names of the
        tasks, the sizes of the network, the plain settings of the regularizer, or an argument
        differ. What loaders read is not compared.
    settings
        Whatever else has to be the same when learning goes on, such as the seed of the network.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    Learned
        Accuracies and times.

    Raises
    ------
    ValueError
        If not exactly one of steps and epochs is given, if a number (or one of ``watch``) is not
        positive, if the
        regularizer was made for another model or would take targets for classes where the
        criterion does not, if the network has too few outputs, if a task has no data or data of
        another form, if nothing says what the loss is, or if the checkpoint is damaged or of
        another configuration.
    TypeError
        If the model has no heads to choose from, if these are no tasks, or if an optimizer or a
        scheduler is not a function that makes one.

    Examples
    --------
    >>> from ewc_lib import EWC, data
    >>> from ewc_lib.continual import MultiHead, average_accuracy, mlp, permuted
    >>> stream = permuted(data.digits(), 2, seed=0)
    >>> model = MultiHead(mlp((64, 64, 10), seed=0))
    >>> learned = learn(stream, model, EWC(model, strength=30.0), steps=100)
    >>> average_accuracy(learned.accuracies) > 0.7
    True

    Tasks of one's own, here a regression:

    >>> import torch
    >>> x = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    >>> tasks = [(f"task {t}", (x[t], x[t].sum(1, True)), None) for t in (0, 1)]
    >>> line = torch.nn.Linear(3, 1)
    >>> ewc = EWC(line, strength=1.0, likelihood="gaussian")
    >>> learn(tasks, line, ewc, epochs=2).names
    ['task 0', 'task 1']
    """
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be positive, or None for all, got {n_samples}")
    if isinstance(optimizer, Optimizer) or isinstance(scheduler, Scheduler):
        raise TypeError(
            "learn makes the optimizer and the scheduler: give functions, such as "
            "functools.partial(torch.optim.SGD, lr=0.1)"
        )
    check_is_for(model, regularizer)
    course = course_of(tasks, model)
    measure = Measure(
        course, model, evaluate or _scores(model, regularizer, criterion, batch), seed
    )
    options: dict[str, Any] = {
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "proximal": proximal,
        "n_samples": n_samples,
        "seed": seed,
    }
    watched = _updates(watch)
    named = described(criterion=criterion, scheduler=scheduler, evaluate=evaluate)
    current = optimizer(model.parameters())
    configuration = {
        "stream": course.description(),
        **description(model, regularizer, current),
        "training": {**options, "reset_optimizer": reset_optimizer, **named, **_plan(watched)},
        "settings": plain(settings or {}),
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        found = Learned(**restore(path, configuration, model, current, regularizer))
    else:
        found = measure.untrained()
    options |= {"criterion": criterion, "scheduler": scheduler, "batch": batch}
    numbers = course.numbers(len(found.seconds_training), found.names)
    total = course.n_known - len(found.seconds_training)
    for t in show_progress(numbers, course.name, progress, total=total if total > 0 else None):
        if reset_optimizer and t:
            current = optimizer(model.parameters())
        measure.before(t, found)
        options["on_step"] = _watching(measure, t, found, watched)
        _learn_task(course, t, found, model, regularizer, current, **options)
        measure.after(t, found)
        if path is not None:
            save(path, configuration, model, current, regularizer, vars(found))
    measure.end(found)
    return found


def _updates(watch: Iterable[int]) -> frozenset[int]:
    found = frozenset(operator.index(number) for number in watch)
    if any(number < 1 for number in found):
        raise ValueError(f"watch counts updates from 1, got {min(found)}")
    return found


def _plan(watched: Collection[int]) -> dict[str, list[int]]:
    return {"watch": sorted(watched)} if watched else {}


def _watching(
    measure: Measure, t: int, found: Learned, watched: Collection[int]
) -> Callable[[int], None] | None:
    """Return what tests the earlier tasks after some updates, if there is something to test."""
    if not (t and watched):
        return None
    return lambda done: measure.during(t, found) if done in watched else None


def _scores(
    model: nn.Module,
    regularizer: Regularizer | None,
    criterion: Criterion | None,
    batch: Pick | None,
) -> Evaluate:
    """Return what measures a model if nothing else is wanted."""
    objective = Objective(model, regularizer, criterion)
    return lambda _, test: objective.score(picked(test, batch))


def _learn_task(
    course: Course,
    t: int,
    found: Learned,
    model: nn.Module,
    regularizer: Regularizer | None,
    optimizer: torch.optim.Optimizer,
    *,
    batch: Pick | None,
    n_samples: int | None,
    seed: int,
    **options: Any,
) -> None:
    """Train and consolidate; the training data of the task are let go."""
    task, own_seed = course.take(t), task_seed(seed, t)
    data = picked(task.train, batch)
    begin = time.perf_counter()
    with nullcontext() if options["scheduler"] is None else _same_rates(optimizer):
        train(
            model,
            data,
            seed=own_seed,
            regularizer=regularizer,
            optimizer=optimizer,
            progress=False,
            **options,
        )
    trained = time.perf_counter()
    if regularizer is not None:
        with seeded(own_seed, device_of(model)):
            regularizer.consolidate(some(data, n_samples, own_seed))
    found.names.append(task.name)
    found.seconds_training.append(trained - begin)
    found.seconds_consolidation.append(time.perf_counter() - trained)


@contextmanager
def _same_rates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give an optimizer the learning rates back that it had, and all else that is scheduled."""
    plain = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    before = copy.deepcopy(plain)
    try:
        yield
    finally:
        for group, own in zip(optimizer.param_groups, before, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(own, params=parameters)


def task_seed(seed: int, t: int) -> int:
    """Return the seed of a task, another for each."""
    return 1_000_003 * seed + t
