"""One training step, one task, and a whole stream of tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ewc_lib._heads import MultiHead
from ewc_lib._progress import progress as show_progress
from ewc_lib.continual._checkpoint import plain, restore, save
from ewc_lib.continual.metrics import accuracy
from ewc_lib.continual.streams import Stream
from ewc_lib.regularizers.protocol import Regularizer

__all__ = ["Learned", "learn", "mlp", "train"]


class Proximal(Protocol):
    """A regularizer with a proximal step, as those with a quadratic penalty are."""

    def proximal_step_(self, optimizer: torch.optim.Optimizer) -> None: ...


def mlp(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between its linear layers.

    Parameters
    ----------
    sizes
        Numbers of inputs, of units of each hidden layer, and of outputs.
    seed
        Seed of the initial weights; the global random state is not used.

    Examples
    --------
    >>> sum(p.numel() for p in mlp((64, 64, 64, 10), seed=0).parameters())
    8970
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    modules: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        modules += [nn.ReLU(), layer]
    return nn.Sequential(*modules)


def train(
    model: nn.Module,
    data: tuple[Float[Tensor, "N D"], Int[Tensor, " N"]],
    *,
    steps: int,
    seed: int,
    regularizer: Regularizer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    proximal: bool = False,
    batch_size: int = 64,
    on_step: Callable[[int], None] | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Train a classifier on the mean cross-entropy, plus a penalty if there is one.

    Parameters
    ----------
    model
        Changed in place.
    data
        Inputs ``[N, D]`` and labels ``[N]``. They are shuffled before each pass.
    steps
        Number of updates. A fixed number of updates, not of passes, makes data sets of
        different sizes cost the same.
    seed
        Seed of the order of the data; the global random state is not used.
    regularizer
        What holds on to earlier tasks, as :class:`ewc_lib.EWC`.
    optimizer
        By default a new Adam with its usual learning rate of 1e-3.
    proximal
        Whether the regularizer makes a proximal step after the optimizer's instead of adding its
        gradient before it.
    batch_size
        Observations for each update.
    on_step
        Called with the number of updates done, after each of them; to watch the training.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    list of float
        The loss of the task, without the penalty, before each update.

    Examples
    --------
    >>> from ewc_lib import data
    >>> digits = data.digits()
    >>> losses = train(mlp((64, 32, 10), seed=0), digits.train, steps=100, seed=0)
    >>> losses[-1] < losses[0]
    True
    """
    x, y = data
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters())
    if regularizer is not None:
        regularizer.before_task()
    losses = []
    model.train()
    drawn = _batches(len(x), batch_size, steps, seed)
    bar = show_progress(drawn, "training", progress, total=steps)
    for done, rows in enumerate(bar, start=1):
        rows = rows.to(x.device)
        losses.append(_step(model, x[rows], y[rows], optimizer, regularizer, proximal))
        if on_step is not None:
            on_step(done)
    return torch.stack(losses).tolist() if losses else []


def _batches(n: int, size: int, steps: int, seed: int) -> Iterator[Int[Tensor, " B"]]:
    """Yield the rows of each batch; all rows come once before one comes again."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:size]
        order = order[size:]


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    proximal: bool,
) -> Float[Tensor, ""]:
    """Make one update and return the loss of the task before it."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    if regularizer is not None:
        regularizer.before_step(x)
        if not proximal:
            regularizer.add_gradient_()
    optimizer.step()
    if regularizer is not None:
        if proximal:
            cast(Proximal, regularizer).proximal_step_(optimizer)
        regularizer.after_step()
    return loss.detach()


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
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
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
        Updates, or passes over the data, for each task: exactly one of them.
    optimizer
        Makes the optimizer from the parameters.
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
        same results as if it had never stopped.
    settings
        Whatever else has to be the same when learning goes on.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    Learned
        Accuracies and times.

    Raises
    ------
    ValueError
        If not exactly one of steps and epochs is given, if a task has no data, or if the
        checkpoint is damaged or of another configuration.

    Examples
    --------
    >>> from ewc_lib import EWC, data
    >>> from ewc_lib.continual import average_accuracy, permuted
    >>> stream = permuted(data.digits(), 2, seed=0)
    >>> model = MultiHead(mlp((64, 64, 10), seed=0))
    >>> learned = learn(stream, model, EWC(model, strength=30.0), steps=100)
    >>> average_accuracy(learned.accuracies) > 0.7
    True
    """
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    device = next(model.parameters()).device
    current = optimizer(model.parameters())
    found = _untrained(stream, model, device)
    configuration = {
        "stream": [stream.name, stream.scenario, len(stream), stream.n_features, stream.n_classes],
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "regularizer": [type(regularizer).__name__, getattr(regularizer, "strength", None)],
        "optimizer": [type(current).__name__, plain(current.defaults)],
        "training": [steps, epochs, batch_size, reset_optimizer, proximal, n_samples, seed],
        "settings": plain(settings or {}),
    }
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        restore(path, configuration, model, current, regularizer, vars(found))
    start = len(found.seconds_training)
    for t in show_progress(range(start, len(stream)), stream.name, progress):
        if reset_optimizer and t:
            current = optimizer(model.parameters())
        task, own_seed = stream[t], 1_000_003 * seed + t
        x, y = (tensor.to(device) for tensor in task.train)
        model.outputs = task.outputs
        begin = time.perf_counter()
        with _seeded(own_seed, device):
            train(
                model,
                (x, y),
                steps=steps if steps is not None else cast(int, epochs) * -(-len(x) // batch_size),
                seed=own_seed,
                regularizer=regularizer,
                optimizer=current,
                proximal=proximal,
                batch_size=batch_size,
                progress=False,
            )
        trained = time.perf_counter()
        if regularizer is not None:
            regularizer.consolidate(_some(x, y, n_samples, own_seed))
        found.seconds_training.append(trained - begin)
        found.seconds_consolidation.append(time.perf_counter() - trained)
        _test(stream, model, t, found.accuracies, device)
        if path is not None:
            save(path, configuration, model, current, regularizer, vars(found))
    return found


def _some(x: Tensor, y: Tensor, n: int | None, seed: int) -> tuple[Tensor, Tensor]:
    if n is None or n >= len(x):
        return x, y
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n].to(x.device)
    return x[rows], y[rows]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Use a seed for what draws from the global random state, as dropout does, and restore it."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _untrained(stream: Stream, model: MultiHead, device: torch.device) -> Learned:
    T = len(stream)
    nothing = torch.full((T + 1, T), math.nan, dtype=torch.float64)
    found = Learned(nothing[1:].clone(), nothing[0].clone())
    for t in range(T if stream.scenario != "class" else 1):
        found.initial[t] = _accuracy(stream, model, t, t, device)
    return found


def _test(
    stream: Stream, model: MultiHead, after: int, R: Float[Tensor, "T T"], device: torch.device
) -> None:
    """Fill a row of the matrix."""
    for t in range(min(len(stream), after + 2)):
        if t <= after or stream.scenario != "class":
            R[after, t] = _accuracy(stream, model, t, after, device)


def _accuracy(stream: Stream, model: MultiHead, t: int, after: int, device: torch.device) -> float:
    model.outputs = stream.outputs(t, after)
    x, y = (tensor.to(device) for tensor in stream.test(t))
    return accuracy(model, (x, y))
