"""A whole stream of tasks, learned one after another."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._progress import progress as show_progress
from ewc_lib._restoring import evaluating
from ewc_lib.continual._checkpoint import plain, restore, save
from ewc_lib.continual.metrics import accuracy
from ewc_lib.continual.streams import Source, Stream
from ewc_lib.continual.training import adam, train
from ewc_lib.heads import MultiHead, all_outputs

if TYPE_CHECKING:
    from ewc_lib.regularizers.protocol import Regularizer

__all__ = ["Learned", "learn"]


@dataclass
class Learned:
    """What came of learning a stream.

    Attributes
    ----------
    accuracies
        ``[T, T]``: row ``t`` after task ``t``, column ``j`` for task ``j``. It is measured for the
        tasks so far and for the next one, before it is learned; all else is NaN. In the class
        scenario the next one is NaN too, because its classes are not read yet.
    initial
        ``[T]``: accuracies of the network before any training; NaN in the class scenario but for
        the first.
    seconds_training, seconds_consolidation
        Of each task.
    """

    accuracies: Float[Tensor, "T T"]
    initial: Float[Tensor, " T"]
    seconds_training: list[float] = field(default_factory=list)
    seconds_consolidation: list[float] = field(default_factory=list)


def learn(
    stream: Stream,
    model: MultiHead,
    regularizer: Regularizer | None = None,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adam,
    reset_optimizer: bool = False,
    batch_size: int = 128,
    proximal: bool = False,
    n_samples: int | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Learned:
    """Learn the tasks of a stream, one after another, and test on all of them after each.

    Parameters
    ----------
    stream
        The tasks.
    model
        Changed in place, and runs on the device where it is.
    regularizer
        What holds on to earlier tasks; it was made for this model. None is plain training.
    steps, epochs
        Updates, or passes over the data, for each task: exactly one of them. A pass is rounded
        up to whole batches.
    optimizer
        Makes the optimizer from the parameters; by default Adam with its usual learning rate
        of 1e-3.
    reset_optimizer
        Whether each task begins with a new optimizer. By default its moments are kept, as van de
        Ven (2025) does.
    batch_size
        Observations for each update.
    proximal
        As in :func:`train`.
    n_samples
        Observations of each task, drawn at random, that the regularizer sees at its end; by
        default all.
    seed
        Of the order of the data and of those observations. The global random state is not used.
    checkpoint
        A file that is written after each task. If it is there, learning goes on from it, with the
        same results as if it had never stopped. It is refused if the data set, the stream, the
        sizes of the network, the plain settings of the regularizer, or an argument differ.
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
        If not exactly one of steps and epochs is given, if a number is not positive, if the
        network has too few outputs, if a task has no data, or if the checkpoint is damaged or of
        another configuration.
    TypeError
        If the model has no heads to choose from.

    Examples
    --------
    >>> from ewc_lib import EWC, data
    >>> from ewc_lib.continual import average_accuracy, mlp, permuted
    >>> stream = permuted(data.digits(), 2, seed=0)
    >>> model = MultiHead(mlp((64, 64, 10), seed=0))
    >>> learned = learn(stream, model, EWC(model, strength=30.0), steps=100)
    >>> average_accuracy(learned.accuracies) > 0.7
    True
    """
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be positive, or None for all, got {n_samples}")
    _check_model(stream, model)
    current = optimizer(model.parameters())
    options: dict[str, Any] = {
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "proximal": proximal,
        "n_samples": n_samples,
        "seed": seed,
    }
    configuration = {
        "stream": _description(stream),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "regularizer": _settings(regularizer),
        "optimizer": {"type": type(current).__name__, **plain(current.defaults)},
        "training": {**options, "reset_optimizer": reset_optimizer},
        "settings": plain(settings or {}),
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        found = Learned(**restore(path, configuration, model, current, regularizer))
    else:
        found = untrained(stream, model)
    start = len(found.seconds_training)
    for t in show_progress(range(start, len(stream)), stream.name, progress):
        if reset_optimizer and t:
            current = optimizer(model.parameters())
        training, consolidation = _learn_task(stream, t, model, regularizer, current, **options)
        found.seconds_training.append(training)
        found.seconds_consolidation.append(consolidation)
        fill_row(stream, model, t, found.accuracies)
        if path is not None:
            save(path, configuration, model, current, regularizer, vars(found))
    model.outputs = stream.outputs(len(stream) - 1, after=len(stream) - 1)
    return found


def _check_model(stream: Stream, model: MultiHead) -> None:
    if not isinstance(model, MultiHead):
        raise TypeError(f"the model must be a MultiHead, got {type(model).__name__}")
    with evaluating(model), torch.no_grad():
        n = all_outputs(model, stream.source.x_train[:1].to(_device(model))).shape[1]
    if n < stream.n_outputs:
        raise ValueError(f"the stream needs {stream.n_outputs} outputs, the network has {n}")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _description(stream: Stream) -> dict[str, Any]:
    """Return what a checkpoint has to agree on about its stream."""
    sizes = {"n_features": stream.n_features, "n_classes": stream.n_classes}
    names = {"name": stream.name, "scenario": stream.scenario, "tasks": list(stream.names)}
    return {**names, **sizes, "data": _digest(stream.source), **plain(stream.settings)}


def _digest(source: Source, few: int = 100) -> str:
    """Tell data sets apart by all their labels and some of their images."""
    digest = hashlib.sha256()
    for tensor in (source.x_train[:few], source.y_train, source.x_test[:few], source.y_test):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _settings(regularizer: Regularizer | None) -> dict[str, Any]:
    """Return the public arguments of a regularizer that are plain values."""
    if regularizer is None:
        return {"type": None}
    public = {k: v for k, v in vars(regularizer).items() if not k.startswith("_")}
    simple = {k: v for k, v in public.items() if isinstance(v, bool | int | float | str | None)}
    strength = getattr(regularizer, "strength", None)  # a property of most
    return {"type": type(regularizer).__name__, **simple, "strength": strength}


def _learn_task(
    stream: Stream,
    t: int,
    model: MultiHead,
    regularizer: Regularizer | None,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None,
    epochs: int | None,
    batch_size: int,
    proximal: bool,
    n_samples: int | None,
    seed: int,
) -> tuple[float, float]:
    """Return the seconds of training and consolidation; the data of the task are let go."""
    task, own_seed = stream[t], task_seed(seed, t)
    x, y = (tensor.to(_device(model)) for tensor in task.train)
    if steps is None:
        assert epochs is not None
        steps = epochs * math.ceil(len(x) / max(batch_size, 1))
    model.outputs = task.outputs
    begin = time.perf_counter()
    train(
        model,
        (x, y),
        steps=steps,
        seed=own_seed,
        regularizer=regularizer,
        optimizer=optimizer,
        proximal=proximal,
        batch_size=batch_size,
        progress=False,
    )
    trained = time.perf_counter()
    if regularizer is not None:
        regularizer.consolidate(some(x, y, n_samples, own_seed))
    return trained - begin, time.perf_counter() - trained


def task_seed(seed: int, t: int) -> int:
    """Return the seed of a task of a stream, another for each."""
    return 1_000_003 * seed + t


def some(x: Tensor, y: Tensor, n: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return all observations, or as many drawn at random."""
    if n is None or n >= len(x):
        return x, y
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n].to(x.device)
    return x[rows], y[rows]


def untrained(stream: Stream, model: MultiHead) -> Learned:
    """Return what is known before the first task."""
    T = len(stream)
    nothing = torch.full((T + 1, T), math.nan, dtype=torch.float64)
    found = Learned(nothing[1:].clone(), nothing[0].clone())
    for t in range(T if stream.scenario != "class" else 1):
        found.initial[t] = _accuracy(stream, model, t, t)
    return found


def fill_row(stream: Stream, model: MultiHead, after: int, R: Float[Tensor, "T T"]) -> None:
    """Test on the tasks so far and on the next one."""
    for t in range(min(len(stream), after + 2)):
        if t <= after or stream.scenario != "class":
            R[after, t] = _accuracy(stream, model, t, after)


def _accuracy(stream: Stream, model: MultiHead, t: int, after: int) -> float:
    model.outputs = stream.outputs(t, after)
    x, y = (tensor.to(_device(model)) for tensor in stream.test(t))
    return accuracy(model, (x, y))
