"""Fifty permuted tasks: a diagonal against a Kronecker-factored Laplace approximation.

Ritter et al. (2018) report more than 90 % for the latter on a network with two hidden layers of
100 units. Strengths, and the learning rate of plain training, are searched on validation images
and on a seed that is not used again, with as many runs for each. ``longer`` asks whether more
training and factors from all images reach what is published: three times the updates, at a third of
the rate. ``ten`` searches the rate of plain training on the small network and the ten tasks of
:mod:`.permuted_mnist`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from ewc_lib.continual import permuted
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.runs.choosing import choose, propose
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.streams.permuted_mnist import PROTOCOLS as PERMUTED

__all__ = ["LAPLACE_50"]

SEARCH_SEED = 1000
"""The seed on which settings are chosen."""

ROUNDS = 5
"""Of the search: the starting values, and four times what lies beyond or beside the best."""

STRENGTHS = {"strength": [1.0, 10.0, 100.0]}

_SHARED = {
    "knobs": {
        "none": {"rate": [3e-4, 1e-3, 3e-3]},
        "online EWC": STRENGTHS,
        "Kronecker Laplace": STRENGTHS,
    },
    "budget": 7,
}


def _search(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield the next round of the search."""
    for method, knobs in protocol["knobs"].items():
        for settings in propose(_tried(finished, method), knobs, protocol["budget"], "accuracy"):
            yield _run(protocol, method, settings, SEARCH_SEED, search=True)


def _at_the_best(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    best = {
        method: choose(_tried(finished, method), knobs, "accuracy").settings
        for method, knobs in protocol["knobs"].items()
    }
    for seed, (method, settings) in product(range(seeds), best.items()):
        yield _run(protocol, method, settings, seed)


def _tried(finished: Sequence[Run], method: str) -> list[Run]:
    return [run for run in finished if run["search"] and run["method"] == method]


def _run(
    protocol: Protocol, method: str, settings: Mapping[str, float], seed: int, search: bool = False
) -> Run:
    every = {"strength": 0.0, "rate": protocol["rate"], **settings}
    return {"method": method, **every, "search": search, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    """Judge a run of the search by validation images, any other by test images."""
    make, seed = METHODS[run["method"]], run["seed"]
    return play(
        permuted(hold_out(images)[1] if run["search"] else images, protocol["tasks"], seed=seed),
        protocol,
        device,
        lambda model: make(model, run["strength"], seed),
        seed=seed,
        optimizer=partial(torch.optim.Adam, lr=run["rate"], fused=True),
        n_samples=protocol["n_samples"],
    )


LAPLACE_50 = Experiment(
    name="laplace-50",
    summary="Fifty permuted tasks: diagonal against Kronecker-factored precision.",
    protocols={
        "mnist": {
            **_SHARED,
            "tasks": 50,
            "hidden": [100, 100],
            "rate": 1e-3,
            "steps": 1000,
            "batch": 128,
            "n_samples": 5000,
        },
        "longer": {
            "knobs": {"Kronecker Laplace": {"strength": [1.0, 3.2, 10.0]}},
            "budget": 3,
            "tasks": 50,
            "hidden": [100, 100],
            "rate": 3e-4,
            "steps": 3000,
            "batch": 128,
            "n_samples": None,
        },
        "ten": {
            "knobs": {"none": {"rate": [3e-5, 1e-4, 3e-4]}},
            "budget": 6,
            **{k: v for k, v in PERMUTED["small"].items() if k not in ("methods", "optimizer")},
        },
        "digits": {
            **_SHARED,
            "tasks": 10,
            "hidden": [32, 32],
            "rate": 1e-3,
            "steps": 50,
            "batch": 64,
            "n_samples": None,
        },
    },
    stages=(*[_search] * ROUNDS, _at_the_best),
    play=_play,
)
