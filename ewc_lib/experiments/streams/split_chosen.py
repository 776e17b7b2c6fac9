"""Split images with every setting of every method chosen alike, on validation images.

Four streams are made of the same five tasks of two digits. Three are the scenarios of van de Ven,
Tuytelaars and Tolias (2022). In the fourth, ``"masked"``, the network is trained as if it were told
the task, with a softmax over the classes of that task, and is then asked for the class among all
ten, without the task: the "labels trick" of Zeno et al. (2018).

Each method has one search, with as many settings as every other: learning rates and, where there
is one, strengths (:func:`.propose`). What counts is the average accuracy on images that were held
out of the training images, over seeds that no table shows.

Where tasks share their outputs, plain training does best at low rates. A search that goes along one
setting at a time does not find its way there together with a strength. So there all methods without
old images go on: every starting strength at each of some low rates, then from the best of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from ewc_lib.continual import MultiHead, Scenario, split
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.runs.choosing import choose, propose
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.runs.strengths import decades
from ewc_lib.experiments.streams.all_classes import (
    ClippedPenalty,
    OfAllClasses,
    after_correction,
    among_all,
)
from ewc_lib.regularizers import LwF, Regularizer, Replay

__all__ = ["SPLIT_CHOSEN", "at_choice", "criteria", "flattery", "knobs_of", "searched"]

SEARCH_SEED = 1000
"""The first of the seeds on which settings are chosen."""

ROUNDS = 8
"""Of the search; each tries what the last one proposes, until the budget is spent."""

LOW_ROUNDS = 20
"""Of what follows at low rates."""

WITHOUT_STRENGTH = ("none", "joint")

_SHARES = [0.3, 1.0, 3.0, 10.0, 30.0]

_SHARED: dict[str, Any] = {
    "tasks": 5,
    "budget": 10,
    "search_seeds": 2,
    "rates": {"alone": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "beside": [3e-4, 1e-3, 3e-3]},
    "searched": {
        "L2": decades(-2, 2),
        "EWC": decades(1, 5),
        "EWC, all classes": decades(1, 5),
        "EWC, clipped": decades(2, 6),
        "SI": decades(1, 5),
        "MAS": decades(-2, 2),
        "EWC-DR": decades(-1, 3),
        "EWC-DR, clipped": decades(2, 6),
        "LwF": _SHARES,
        "replay": _SHARES,
    },
    "low": {
        "scenario": "domain",
        "methods": ["none", "L2", "EWC", "SI", "MAS", "EWC-DR", "LwF"],
        "rates": [1e-5, 3e-5, 1e-4],
        "budget": 30,
    },
}
"""``searched`` holds the strengths to begin with, ``rates`` the learning rates, for a method alone
and beside a strength, and ``low`` what some go on with. Replay and joint training do not: they are
best at high rates."""

_ALL_DATA = ("replay", "joint", "LwF")
"""Methods that see all images of a task at its end, of which the first two keep some."""

_METHODS = ["none", "L2", "EWC", "SI", "MAS", "EWC-DR", "LwF", "replay", "joint"]
_CLIPPED = ["EWC, clipped", "EWC-DR, clipped"]


def _made(model: MultiHead, run: Run, protocol: Protocol) -> Regularizer | None:
    """Make the method of a run."""
    method, strength, seed = run["method"], run["strength"], run["seed"]
    if method == "replay":
        own = torch.Generator().manual_seed(seed)
        return Replay(model, strength, protocol["kept"], protocol["batch"], own)
    if method == "LwF":
        return LwF(model, strength)
    if method == "EWC, all classes":
        return OfAllClasses(model, strength)
    if method.endswith(", clipped"):
        reverse = method.startswith("EWC-DR")
        return ClippedPenalty(model, strength, reverse=reverse, batch_size=protocol["batch"])
    return METHODS[method](model, strength or 0.0, seed)


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    masked = run["scenario"] == "masked"
    scenario: Scenario = "task" if masked else run["scenario"]
    parts = hold_out(images, protocol["held_out"])
    stream, valid = (
        split(p, protocol["tasks"], scenario=scenario, seed=run["seed"]) for p in parts
    )
    models: list[MultiHead] = []

    def regularizer(model: MultiHead) -> Regularizer | None:
        models.append(model)
        return _made(model, run, protocol)

    found = play(
        stream,
        {**protocol, "rate": run["rate"]},
        device,
        regularizer,
        seed=run["seed"],
        valid=valid,
        n_samples=None if run["method"] in _ALL_DATA else protocol["n_samples"],
        evaluate=among_all if masked else None,
        watch=() if run["search"] else protocol["watch"],
    )
    if masked or scenario == "class":
        found |= after_correction(models[0], stream, valid, protocol["kept"])
    return found


def _round(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield one round of the search."""
    for scenario, methods in protocol["methods"].items():
        for method in methods:
            tried = searched(finished, scenario, method)
            new = propose(tried, _knobs(protocol, method), protocol["budget"])
            yield from _tries(protocol, scenario, method, [*_begun(tried, method), *new])


def _low_round(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield all strengths at low rates, and one round of a search that goes on from there."""
    low = protocol["low"]
    scenario = low["scenario"]
    for method in protocol["methods"].get(scenario, ()):
        if method in low["methods"]:
            knobs = _knobs(protocol, method)
            values = product(*({**knobs, "rate": low["rates"]}.values()))
            grid = [dict(zip(knobs, place, strict=True)) for place in values]
            tried = searched(finished, scenario, method)
            there = [{name: run[name] for name in knobs} for run in tried]
            missing = [place for place in grid if place not in there]
            new = missing or propose(tried, knobs, low["budget"])
            yield from _tries(protocol, scenario, method, [*_begun(tried, method), *new])


def _begun(tried: Sequence[Run], method: str) -> list[dict[str, Any]]:
    """Return the settings tried so far, whose seeds a stopped round may lack."""
    names = knobs_of(method)
    places = dict.fromkeys(tuple(run[name] for name in names) for run in tried)
    return [dict(zip(names, place, strict=True)) for place in places]


def _knobs(protocol: Protocol, method: str) -> dict[str, list[float]]:
    """Return the starting values of what is searched."""
    if method in WITHOUT_STRENGTH:
        return {"rate": protocol["rates"]["alone"]}
    return {"strength": protocol["searched"][method], "rate": protocol["rates"]["beside"]}


def _tries(
    protocol: Protocol, scenario: str, method: str, settings: Iterable[Mapping[str, float]]
) -> Iterable[Run]:
    """Yield a run of the search for each setting and seed."""
    own = range(SEARCH_SEED, SEARCH_SEED + protocol["search_seeds"])
    for found, seed in product(settings, own):
        yield _run(scenario, method, found, seed, search=True)


def _shown(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield what validation images have chosen, for the seeds of the tables."""
    for seed, scenario in product(range(seeds), protocol["methods"]):
        wanted: dict[tuple[Any, ...], Run] = {}
        for method, by in product(protocol["methods"][scenario], criteria(scenario)):
            if tried := searched(finished, scenario, method):
                run = _run(scenario, method, choose(tried, knobs_of(method), by).settings, seed)
                wanted[tuple(run.values())] = run
        yield from wanted.values()


def criteria(scenario: str) -> tuple[str, ...]:
    """Return what settings may be chosen by: without and, for new classes, with a correction."""
    return ("valid", "corrected_valid") if scenario in ("class", "masked") else ("valid",)


def knobs_of(method: str) -> tuple[str, ...]:
    """Return which settings of a method are searched."""
    return ("rate",) if method in WITHOUT_STRENGTH else ("strength", "rate")


def searched(runs: Iterable[Run], scenario: str, method: str) -> list[Run]:
    """Return the runs of one search."""
    return [r for r in runs if r["search"] and (r["scenario"], r["method"]) == (scenario, method)]


def at_choice(runs: Iterable[Run], scenario: str, method: str, by: str = "valid") -> dict[int, Run]:
    """Return the runs of the tables at the settings that were chosen, by seed.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    scenario, method
        Which ones.
    by
        What the settings were chosen by, one of :func:`criteria`.
    """
    runs = list(runs)
    best = choose(searched(runs, scenario, method), knobs_of(method), by).settings
    wanted = {"scenario": scenario, "method": method, "search": False, **best}
    own = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    return {run["seed"]: run for run in sorted(own, key=lambda run: run["seed"])}


def flattery(runs: Iterable[Run], scenario: str, method: str) -> float:
    """Return how much better a method looks if its settings are chosen on the test images.

    It is the mean test accuracy at the settings that are best in the test, less that at those which
    are best in validation, both over the seeds of the search.

    Parameters
    ----------
    runs, scenario, method
        As for :func:`at_choice`.
    """
    own = searched(runs, scenario, method)
    honest = choose(own, knobs_of(method)).settings
    at = [r["accuracy"] for r in own if all(r[name] == value for name, value in honest.items())]
    return choose(own, knobs_of(method), "accuracy").value - math.fsum(at) / len(at)


def _run(
    scenario: str, method: str, found: Mapping[str, float], seed: int, search: bool = False
) -> Run:
    settings = {"scenario": scenario, "method": method, "strength": None, **found}
    return {**settings, "search": search, "seed": seed}


SPLIT_CHOSEN = Experiment(
    name="split-chosen",
    summary="Five tasks of two digits; every method's settings chosen alike, on validation images.",
    protocols={
        "mnist": {
            **_SHARED,
            "hidden": [100],
            "steps": 200,
            "batch": 64,
            "held_out": 0.1,
            "kept": 5,
            "n_samples": 1000,
            "watch": [1, 2, 5, 10, 20, 50, 100],
            "methods": {
                "domain": _METHODS,
                "masked": ["none", "EWC", "EWC-DR", *_CLIPPED],
            },
        },
        "digits": {
            **_SHARED,
            "hidden": [256],
            "steps": 100,
            "batch": 64,
            "held_out": 0.2,
            "kept": 5,
            "n_samples": None,
            "watch": [1, 2, 5, 10, 20, 50],
            "methods": {
                "task": _METHODS,
                "domain": _METHODS,
                "class": ["none", "L2", "EWC", "EWC-DR", *_CLIPPED, "LwF", "replay", "joint"],
                "masked": ["none", "L2", "EWC", "EWC, all classes", "EWC-DR", *_CLIPPED, "LwF"],
            },
        },
    },
    stages=(*[_round] * ROUNDS, *[_low_round] * LOW_ROUNDS, _shown),
    play=_play,
)
