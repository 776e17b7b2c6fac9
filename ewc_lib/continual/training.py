"""One training step, and one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ewc_lib._progress import progress as show_progress

if TYPE_CHECKING:
    from ewc_lib.regularizers.protocol import Regularizer

__all__ = ["mlp", "train"]


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
    with _seeded(seed, torch.device("cpu")):
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    modules: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        modules += [nn.ReLU(), layer]
    return nn.Sequential(*modules)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Return Adam as it comes, but fused: one kernel makes an update."""
    return torch.optim.Adam(parameters, fused=True)


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
        Seed of the order of the data, and of what the model draws, as dropout does. The global
        random state is left as it was.
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

    Raises
    ------
    ValueError
        If there are no data or not one label for each input, if the batch size is not positive
        or the number of steps negative, or if the regularizer has no proximal step.

    Examples
    --------
    >>> from ewc_lib import data
    >>> digits = data.digits()
    >>> losses = train(mlp((64, 32, 10), seed=0), digits.train, steps=100, seed=0)
    >>> losses[-1] < losses[0]
    True
    """
    x, y = data
    _check(x, y, steps, batch_size)
    if proximal and regularizer is not None and not hasattr(regularizer, "proximal_step_"):
        raise ValueError(f"{type(regularizer).__name__} has no proximal step")
    if optimizer is None:
        optimizer = adam(model.parameters())
    if regularizer is not None:
        regularizer.before_task()
    losses = []
    model.train()
    drawn = batches(len(x), batch_size, steps, seed)
    bar = show_progress(drawn, "training", progress, total=steps)
    with _seeded(seed, x.device):
        for done, rows in enumerate(bar, start=1):
            rows = rows.to(x.device)
            losses.append(_step(model, x[rows], y[rows], optimizer, regularizer, proximal))
            if on_step is not None:
                on_step(done)
    return torch.stack(losses).tolist() if losses else []


def _check(x: Tensor, y: Tensor, steps: int, batch_size: int) -> None:
    if not len(x) or len(x) != len(y):
        raise ValueError(f"data must have one label for each input, got {len(x)} and {len(y)}")
    if steps < 0 or batch_size < 1:
        raise ValueError(
            f"steps must not be negative and batch_size be positive, got {steps} and {batch_size}"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Use a seed for what draws from the global random state, as dropout does, and restore it."""
    everywhere = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices=everywhere):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the accelerators keep their states
        else:
            torch.manual_seed(seed)
        yield


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[Int[Tensor, " B"]]:
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
