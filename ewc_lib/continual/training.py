"""One training step, and one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_choice
from ewc_lib._forms import Pick, picked
from ewc_lib._progress import progress as show_progress
from ewc_lib.attaching import METRICS, Metric
from ewc_lib.continual._objective import Objective
from ewc_lib.continual._reading import Piece, Training, device_of, seeded
from ewc_lib.continual._suiting import check_is_for, check_knows
from ewc_lib.likelihood.agreement import Criterion

if TYPE_CHECKING:
    from ewc_lib.regularizers.protocol import Regularizer

__all__ = ["mlp", "train"]

Scheduler: TypeAlias = torch.optim.lr_scheduler.LRScheduler
Optimizer: TypeAlias = torch.optim.Optimizer
MakesOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
MakesScheduler: TypeAlias = Callable[[Optimizer], Scheduler]


class Proximal(Protocol):
    """A regularizer with a proximal step, as those with a quadratic penalty are."""

    def proximal_step_(self, optimizer: Optimizer, metric: Metric = "optimizer") -> None: ...


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
    with seeded(seed, None):
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    modules: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        modules += [nn.ReLU(), layer]
    return nn.Sequential(*modules)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Return Adam as it comes, but fused: one kernel makes an update."""
    return torch.optim.Adam(parameters, fused=True)


def proximal_metric(proximal: bool | Metric) -> Metric | None:
    """Return the metric of a proximal step, or None where there is no such step."""
    if isinstance(proximal, str):
        check_choice("proximal", proximal, METRICS, ", True or False")
        return proximal
    return "optimizer" if proximal else None


def train(
    model: nn.Module,
    data: Any,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    regularizer: Regularizer | None = None,
    criterion: Criterion | None = None,
    optimizer: Optimizer | MakesOptimizer | None = None,
    scheduler: Scheduler | MakesScheduler | None = None,
    proximal: bool | Metric = False,
    batch_size: int = 64,
    batch: Pick | None = None,
    on_step: Callable[[int], None] | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Train a model on one task, plus a penalty if there is one.

    Parameters
    ----------
    model
        Changed in place. One that is in eval mode is put into training mode, with all its
        modules. In one that is in training mode already, modules in eval mode stay so: somebody
        has frozen them, as the running statistics of a batch normalisation.
    data
        A tuple ``(inputs, targets)`` of all observations, or a data set with a length: they are
        shuffled before each pass. A data set without one is cut into batches in its own order. A
        DataLoader, or another iterable of batches, is read as it is, over and over; it is never
        in memory as a whole. Batches are pairs or dicts with ``"labels"``, and go to the device
        of the model.
    steps, epochs
        Number of updates, or of passes over the data: exactly one of them. A fixed number of
        updates makes data sets of different sizes cost the same. A pass over a tuple or a data
        set is rounded up to whole batches.
    seed
        Seed of the order of the data, and of what draws from the global random state of PyTorch,
        as dropout and a shuffling DataLoader do. That state is left as it was.
    regularizer
        What holds on to earlier tasks, as :class:`ewc_lib.EWC`.
    criterion
        The loss ``criterion(output, target)``, a mean. By default it is the criterion of the
        regularizer, if it has one; else the loss that the model returns for a dict with labels;
        else minus the mean log-likelihood of an observation, if the regularizer names a
        likelihood; else the cross-entropy of integer labels, a mean over labels.
    optimizer
        An optimizer, or what makes one from the parameters; by default a new Adam with its usual
        learning rate of 1e-3.
    scheduler
        A scheduler of the learning rate, or what makes one from the optimizer. It is stepped after
        each update, not after each pass.
    proximal
        Whether the regularizer makes a proximal step after the optimizer's instead of adding its
        gradient before it; or the metric of that step, which is the optimizer's own if it is True
        (:meth:`ewc_lib.EWC.proximal_step_`).
    batch_size
        Observations for each update, where the data are no batches yet.
    batch
        Picks ``(inputs, targets)`` from a batch that holds more, as ``lambda b: (b[0], b[2])``.
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
        or the number of steps negative, if the regularizer has no proximal step or was made for
        another model, if it would take the targets for classes and the criterion does not, or if
        nothing says what the loss of such targets is.

    Examples
    --------
    >>> from ewc_lib import data
    >>> digits = data.digits()
    >>> losses = train(mlp((64, 32, 10), seed=0), digits.train, steps=100, seed=0)
    >>> losses[-1] < losses[0]
    True
    """
    order = Training(
        picked(data, batch), steps=steps, epochs=epochs, batch_size=batch_size, seed=seed
    )
    metric = proximal_metric(proximal)
    if metric and regularizer is not None and not hasattr(regularizer, "proximal_step_"):
        raise ValueError(f"{type(regularizer).__name__} has no proximal step")
    check_is_for(model, regularizer)
    objective = Objective(model, regularizer, criterion)
    if not isinstance(optimizer, Optimizer):
        optimizer = (optimizer or adam)(model.parameters())
    rates = _made(scheduler, optimizer)
    if regularizer is not None:
        regularizer.before_task()
    losses: list[Any] = []
    if not model.training:
        model.train()
    device = device_of(model)
    with seeded(seed, device):
        bar = show_progress(order.pieces(device), "training", progress, total=order.steps)
        for done, piece in enumerate(bar, start=1):
            if done == 1:
                check_knows(regularizer, model, criterion, piece)
            loss = _step(objective, piece, optimizer, regularizer, metric)
            # A number: kept tensors tear the heap apart. An accelerator is not waited for.
            losses.append(loss.item() if loss.is_cpu else loss)
            if rates is not None:
                rates.step()
            if on_step is not None:
                on_step(done)
    return torch.stack(losses).tolist() if losses and isinstance(losses[0], Tensor) else losses


def _made(scheduler: Scheduler | MakesScheduler | None, optimizer: Optimizer) -> Scheduler | None:
    if scheduler is not None and not isinstance(scheduler, Scheduler):
        scheduler = scheduler(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a loss to be stepped with; a scheduler is stepped after each "
            "update here, without one. Step it from on_step"
        )
    return scheduler


def _step(
    objective: Objective,
    piece: Piece,
    optimizer: Optimizer,
    regularizer: Regularizer | None,
    metric: Metric | None,
) -> Float[Tensor, ""]:
    """Make one update and return the loss of the task before it."""
    loss = objective.loss(piece)
    optimizer.zero_grad()
    loss.backward()
    if regularizer is not None:
        regularizer.before_step(piece.inputs)
        if not metric:
            regularizer.add_gradient_()
    optimizer.step()
    if regularizer is not None:
        if metric:
            step = cast(Proximal, regularizer).proximal_step_
            step(optimizer) if metric == "optimizer" else step(optimizer, metric)
        regularizer.after_step()
    return loss.detach()
