"""Split MNIST in three scenarios: what each method against forgetting reaches.

The protocol is that of van de Ven, Tuytelaars and Tolias (2022): five tasks of two digits each,
in an order that depends on the seed; a multilayer perceptron with two hidden layers of 400 units;
Adam with a learning rate of 1e-3, which is not reset between tasks; 2,000 updates for each task
with 128 images. The strengths of EWC and SI are theirs too (in our convention SI has twice their
factor). Those of MAS and L2, which they do not report, are chosen by the accuracy on one seed
that is not used again. MAS looks at 1,000 images of each task, all others at every image: its
absolute values cost a gradient for each image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from ewc_lib.continual import split
from ewc_lib.data import Images
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.runs.strengths import best, points

__all__ = ["SPLIT_MNIST"]

SEARCH_SEED = 1000
"""The seed on which strengths are chosen."""

SCENARIOS = ("task", "domain", "class")

_SHARED = {
    "tasks": 5,
    "strengths": {
        "task": {"EWC": 1e5, "online EWC": 1e5, "SI": 2 * 10.0},
        "domain": {"EWC": 1e10, "online EWC": 1e10, "SI": 2 * 5e4},
        "class": {"EWC": 1e9, "online EWC": 1e9, "SI": 2 * 5e3},
    },
    "searched": {"MAS": [1e-2, 1e0, 1e2, 1e4], "L2": [1e-3, 1e-1, 1e1, 1e3]},
    "without_strength": ["none", "joint", "replay", "LwF"],
    "n_samples": {"MAS": 1000},
}


def _known(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    """Yield the methods without a strength, and those whose strength is published."""
    for seed, scenario in product(range(seeds), SCENARIOS):
        for method in protocol["without_strength"]:
            yield _run(scenario, method, None, seed)
        for method, strength in protocol["strengths"][scenario].items():
            yield _run(scenario, method, strength, seed)


def _search(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    for scenario, (method, grid) in product(SCENARIOS, protocol["searched"].items()):
        for strength in grid:
            yield _run(scenario, method, strength, SEARCH_SEED, search=True)


def _found(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield the methods whose strength was searched, at the best one."""
    for seed, scenario, method in product(range(seeds), SCENARIOS, protocol["searched"]):
        tried = [
            run
            for run in finished
            if run["search"] and (run["scenario"], run["method"]) == (scenario, method)
        ]
        yield _run(scenario, method, best(points(tried, "accuracy")).strength, seed)


def _run(
    scenario: str, method: str, strength: float | None, seed: int, search: bool = False
) -> Run:
    settings = {"scenario": scenario, "method": method, "strength": strength}
    return {**settings, "search": search, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    stream = split(images, protocol["tasks"], scenario=run["scenario"], seed=run["seed"])
    make, seed = METHODS[run["method"]], run["seed"]
    return play(
        stream,
        protocol,
        device,
        lambda model: make(model, run["strength"] or 0.0, seed),
        seed=seed,
        n_samples=protocol["n_samples"].get(run["method"]),
    )


SPLIT_MNIST = Experiment(
    name="split-mnist",
    summary="Five tasks of two digits, in the task-, domain- and class-incremental scenario.",
    protocols={
        "mnist": {**_SHARED, "hidden": [400, 400], "rate": 1e-3, "steps": 2000, "batch": 128},
        "digits": {**_SHARED, "hidden": [64, 64], "rate": 1e-3, "steps": 100, "batch": 64},
    },
    stages=(_known, _search, _found),
    play=_play,
)
