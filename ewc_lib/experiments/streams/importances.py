"""Which importance of ten classes: permuted MNIST, each variant at a strength of its own.

With two classes a task the sketch has no noise and a network is soon sure; here are ten. Every
method has the same search for its strength, with one seed that is not used again, and on training
images that are held out. The result is that of other seeds, on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib.continual import permuted
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.runs.choosing import Choice, choose, propose
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.report import Row, rows
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.runs.strengths import decades
from ewc_lib.experiments.streams.fisher_variants import (
    Importance,
    OnlinePenalty,
    of_batch_means,
    of_drawn_labels,
)
from ewc_lib.fisher import Diagonal, fisher_information
from ewc_lib.regularizers import Regularizer

__all__ = ["IMPORTANCES", "SEARCHED", "SEARCH_SEED", "choices", "results"]

SEARCH_SEED = 1000
"""The seed with which strengths are chosen."""

_fisher = partial(fisher_information, progress=False)


def _first(n: int, model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> Diagonal:
    """Return the exact diagonal of the first observations; their order is random."""
    x, y = data
    found = _fisher(model, (x[:n], y[:n]), **options)
    assert isinstance(found, Diagonal)
    return found


def _root(model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> Diagonal:
    """Return the square root of the exact diagonal."""
    found = _first(len(data[0]), model, data, **options)
    roots = {name: d.sqrt() for name, d in found.values.items()}
    return replace(found, kind="root", values=roots)


def _of_adam(
    model: nn.Module, data: Any, *, optimizer: torch.optim.Optimizer, batch_size: int
) -> Diagonal:
    """Return the second moments that Adam has at the end of the task."""
    return Diagonal.from_optimizer(optimizer, model, batch_size=batch_size, n_samples=len(data[0]))


VARIANTS: dict[str, Importance] = {
    "exact": _fisher,
    "exact, n = 500": partial(_first, 500),
    "sketch": partial(_fisher, kind="sketch"),
    "sampled": partial(_fisher, kind="sampled"),
    "empirical": partial(_fisher, kind="empirical"),
    "batch means": of_batch_means,
    "batched": of_drawn_labels,
    "second moments": _of_adam,
    "root of exact": _root,
}
"""The importances of online EWC, by the name that tables show."""

RANDOM = ("sketch", "sampled", "batched")
"""Variants that draw random numbers."""

SEARCHED = (*VARIANTS, "SI", "MAS", "L2", "EWC-DR")
"""All methods that have a strength."""


def _search(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterator[Run]:
    """Yield the strengths that each method tries next."""
    knobs, budget = {"strength": protocol["grid"]}, protocol["budget"]
    for method in SEARCHED:
        for settings in propose(_tried(finished, method), knobs, budget):
            yield _run(method, settings["strength"], SEARCH_SEED)


def _at_the_best(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterator[Run]:
    """Yield plain training, and each method at its strength, for all seeds."""
    strengths = {m: c.settings["strength"] for m, c in choices(finished).items()}
    for seed in range(seeds):
        yield _run("none", 0.0, seed)
        yield from (_run(method, strength, seed) for method, strength in strengths.items())


def _run(method: str, strength: float, seed: int) -> Run:
    return {"method": method, "strength": strength, "seed": seed}


def _tried(runs: Iterable[Run], method: str) -> list[Run]:
    """Return the search of a method."""
    return [run for run in runs if run["method"] == method and run["seed"] == SEARCH_SEED]


def choices(runs: Iterable[Run]) -> dict[str, Choice]:
    """Return the strength of each method that is best on held-out images.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    """
    runs = list(runs)
    return {method: choose(_tried(runs, method), ["strength"]) for method in SEARCHED}


def results(runs: Iterable[Run]) -> dict[str, Row]:
    """Return plain training and each method at its strength, by name, without the search.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    """
    runs = list(runs)
    strengths = {method: c.settings["strength"] for method, c in choices(runs).items()}
    final = [
        run
        for run in runs
        if run["seed"] != SEARCH_SEED and run["strength"] == strengths.get(run["method"], 0.0)
    ]
    return {row.settings["method"]: row for row in rows(final)}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    method, seed, made = run["method"], run["seed"], _Made(protocol["rate"])
    rest, valid = (_smaller(part, protocol["images"]) for part in hold_out(images, seed=seed))

    def regularizer(model: nn.Module) -> Regularizer | None:
        if method not in VARIANTS:
            return METHODS[method](model, run["strength"], seed)
        return OnlinePenalty(model, run["strength"], _importance(method, protocol, made, seed))

    return play(
        permuted(rest, protocol["tasks"], seed=seed),
        protocol,
        device,
        regularizer,
        seed=seed,
        valid=permuted(valid, protocol["tasks"], seed=seed),
        optimizer=made,
        reset_optimizer=True,
        n_samples=protocol["n_samples"],
    )


def _smaller(images: Images, n: int) -> Images:
    """Keep some of the training images, whose order is random, and every second test image."""
    return images._replace(
        x_train=images.x_train[:n],
        y_train=images.y_train[:n],
        x_test=images.x_test[::2],
        y_test=images.y_test[::2],
    )


class _Made:
    """Makes optimizers, and keeps the latest."""

    optimizer: torch.optim.Optimizer

    def __init__(self, rate: float) -> None:
        self.make: Callable[..., torch.optim.Optimizer] = partial(
            torch.optim.Adam, lr=rate, fused=True
        )

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        self.optimizer = self.make(parameters)
        return self.optimizer


def _importance(method: str, protocol: Protocol, made: _Made, seed: int) -> Importance:
    """Give a variant what it needs beside model and data."""
    generator = torch.Generator().manual_seed(seed)

    def importance(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
        options: dict[str, Any] = {"generator": generator} if method in RANDOM else {}
        if method == "second moments":
            options = {"optimizer": made.optimizer, "batch_size": protocol["batch"]}
        return VARIANTS[method](model, data, **options)

    return importance


_SHARED = {"tasks": 5, "rate": 1e-3, "grid": decades(-1, 5, step=2), "budget": 8}

IMPORTANCES = Experiment(
    name="importances",
    summary="Permuted MNIST with thirteen importances, the strength of each chosen on held-out "
    "images.",
    protocols={
        "mnist": {
            **_SHARED,
            "hidden": [100, 100],
            "steps": 500,
            "batch": 64,
            "images": 10_000,
            "n_samples": 5000,
        },
        "digits": {
            **_SHARED,
            "hidden": [32],
            "steps": 100,
            "batch": 64,
            "images": 1000,
            "n_samples": 500,
        },
    },
    stages=(*[_search] * 6, _at_the_best),
    play=_play,
)
