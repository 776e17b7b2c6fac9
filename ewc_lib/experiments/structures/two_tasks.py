"""A network that has learned one task learns another, held by some penalty at many strengths."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib import data
from ewc_lib.continual import mlp, permute_pixels, train
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.structures.stacks import (
    HeldPredictions,
    Quadratic,
    kl,
    outputs,
    train_stack,
)
from ewc_lib.fisher import fisher_information
from ewc_lib.fisher.estimate import Structure

__all__ = ["OUTCOMES", "STRUCTURES", "play"]

STRUCTURES: tuple[Structure, ...] = (
    "diagonal",
    "module",
    "kronecker",
    "eigenkronecker",
    "lowrank",
    "dense",
)

OUTCOMES = (
    "valid",
    "accuracy_a",
    "accuracy_b",
    "loss_a",
    "loss_b",
    "divergence",
    "razor",
    "reverse",
    "diagonal",
    "kronecker",
    "whole",
    "distance",
)


@dataclass(frozen=True)
class _Start:
    """Both tasks of a seed, the network after the first, and what is known of it."""

    task_a: Images
    task_b: Images
    valid: tuple[tuple[Tensor, Tensor], ...]
    model: nn.Sequential
    matrices: dict[str, Tensor]


@lru_cache(maxsize=1)
def _start(seed: int, hidden: tuple[int, ...], steps: int, batch: int, share: float) -> _Start:
    """Learn task A, and compute its Fisher information in every structure."""
    task_a, valid = hold_out(data.digits(dtype=torch.float64), share, seed=seed)
    task_b, valid_b = (permute_pixels(images, seed + 1000) for images in (task_a, valid))
    model = mlp((task_a.n_features, *hidden, task_a.n_classes), seed).double()
    train(model, task_a.train, steps=steps, batch_size=batch, seed=seed, progress=False)
    matrices: dict[str, Tensor] = {}
    for structure in STRUCTURES:
        fisher = fisher_information(model, task_a.train, structure=structure, progress=False)
        matrices[structure] = fisher.to_dense()
    diagonal = matrices["diagonal"].diagonal().clone()
    matrices |= {"diagonal": diagonal, "L2": torch.full_like(diagonal, float(diagonal.mean()))}
    return _Start(task_a, task_b, (valid.test, valid_b.test), model, matrices)


def play(protocol: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Learn task B once for each setting, and measure where that has led.

    Parameters
    ----------
    protocol
        As :data:`.beyond_diagonal.PROTOCOL`.
    run
        ``optimizer``, ``form``, ``method`` and ``seed``.

    Returns
    -------
    dict
        ``settings``, and lists of all :data:`OUTCOMES` at these, NaN where training diverged.
        ``before``: accuracy and loss on the test images of task A before task B.
    """
    options = {"steps": protocol["steps"], "batch_size": protocol["batch"]}
    seed, method, rate = run["seed"], run["method"], protocol["optimizers"][run["optimizer"]]
    known = protocol["hidden"], protocol["steps"], protocol["batch"], protocol["validation"]
    start = _start(seed, tuple(known[0]), *known[1:])
    make = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[run["optimizer"]]
    options["seed"] = seed + 1
    anchor = nn.utils.parameters_to_vector(start.model.parameters()).detach()
    if run["form"] == "none":
        shares, rates = torch.tensor([[1.0]], dtype=anchor.dtype), protocol["rates"]
        if method == "averaging":
            shares, rates = torch.tensor(protocol["shares"]).to(anchor)[:, None], [1.0]
        ends = [_end(start, make, factor * rate, options) for factor in rates]
        stack = anchor + shares * (torch.stack(ends) - anchor)
        settings = protocol["shares"] if method == "averaging" else rates
    else:
        stack = train_stack(
            start.model,
            start.task_b.train,
            _penalty(start, method, anchor, protocol["damping"]),
            protocol["strengths"],
            optimizer=partial(make, lr=rate),
            form=run["form"],
            **options,
        )
        settings = protocol["strengths"]
    before = _measured(start, anchor[None], anchor)
    return {
        "before": [before[name][0] for name in ("accuracy_a", "loss_a")],
        "settings": list(settings),
        **_measured(start, stack, anchor),
    }


def _end(
    start: _Start, make: type[torch.optim.Optimizer], rate: float, options: Mapping[str, Any]
) -> Float[Tensor, " P"]:
    """Return where plain training ends."""
    model = copy.deepcopy(start.model)
    optimizer = make(model.parameters(), lr=rate)  # type: ignore[call-arg]
    train(model, start.task_b.train, optimizer=optimizer, progress=False, **options)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def _penalty(
    start: _Start, method: str, anchor: Float[Tensor, " P"], damping: float
) -> Quadratic | HeldPredictions:
    if method == "predictions":
        return HeldPredictions(start.model, start.task_a.x_train)
    if method != "damped":
        return Quadratic(start.matrices[method], anchor)
    matrix = start.matrices["dense"]
    return Quadratic(matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)), anchor)


@torch.no_grad()
def _measured(
    start: _Start, stack: Float[Tensor, "K P"], anchor: Float[Tensor, " P"]
) -> dict[str, list[float]]:
    """Return all outcomes of networks, given by the rows of a stack; see :func:`flat`."""
    moved = stack - anchor
    tests = [task.test for task in (start.task_a, start.task_b)]
    right = [_accuracies(start.model, stack, part) for part in (*tests, *start.valid)]
    losses = [_losses(start.model, stack, part) for part in tests]
    on_a, on_b = (
        (start.model(x), outputs(start.model, stack, x))
        for x in (start.task_a.x_train, start.task_b.x_train)
    )
    found = {
        "valid": (right[2] + right[3]) / 2,
        "accuracy_a": right[0],
        "accuracy_b": right[1],
        "loss_a": losses[0],
        "loss_b": losses[1],
        "divergence": kl(*on_a),
        "razor": kl(*on_b),
        "reverse": kl(*reversed(on_b)),
        "diagonal": (moved.square() @ start.matrices["diagonal"]) / 2,
        "kronecker": ((moved @ start.matrices["kronecker"]) * moved).sum(1) / 2,
        "whole": ((moved @ start.matrices["dense"]) * moved).sum(1) / 2,
        "distance": moved.square().sum(1),
    }
    sound = stack.isfinite().all(1)
    return {
        name: [float(f"{x:.5g}") if ok else math.nan for x, ok in zip(values, sound, strict=True)]
        for name, values in found.items()
    }


def _accuracies(
    model: nn.Module, stack: Float[Tensor, "K P"], part: tuple[Tensor, Tensor]
) -> Float[Tensor, " K"]:
    return (outputs(model, stack, part[0]).argmax(-1) == part[1]).double().mean(1)


def _losses(
    model: nn.Module, stack: Float[Tensor, "K P"], part: tuple[Tensor, Tensor]
) -> Float[Tensor, " K"]:
    logits = outputs(model, stack, part[0]).transpose(1, 2)
    return F.cross_entropy(logits, part[1].expand(len(stack), -1), reduction="none").mean(1)
