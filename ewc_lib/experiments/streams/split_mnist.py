"""Split MNIST in three scenarios: what each method against forgetting reaches.

The protocol is that of van de Ven, Tuytelaars and Tolias (2022): five tasks of two digits each,
in an order that depends on the seed; a multilayer perceptron with two hidden layers of 400 units;
Adam with a learning rate of 1e-3, which is not reset between tasks; 2,000 updates for each task
with 128 images. The strengths of EWC and SI are theirs too (in our convention SI has twice their
factor): nothing is searched here. :mod:`.split_chosen` compares methods whose settings are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from ewc_lib.continual import split
from ewc_lib.data import Images
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.store import Run

__all__ = ["SPLIT_MNIST"]

SCENARIOS = ("task", "domain", "class")

_SHARED = {
    "tasks": 5,
    "strengths": {
        "task": {"EWC": 1e5, "online EWC": 1e5, "SI": 2 * 10.0},
        "domain": {"EWC": 1e10, "online EWC": 1e10, "SI": 2 * 5e4},
        "class": {"EWC": 1e9, "online EWC": 1e9, "SI": 2 * 5e3},
    },
    "without_strength": ["none", "joint", "replay", "LwF"],
}


def _all(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    """Yield the methods without a strength, and those whose strength is published."""
    for seed, scenario in product(range(seeds), SCENARIOS):
        for method in protocol["without_strength"]:
            yield _run(scenario, method, None, seed)
        for method, strength in protocol["strengths"][scenario].items():
            yield _run(scenario, method, strength, seed)


def _run(scenario: str, method: str, strength: float | None, seed: int) -> Run:
    return {"scenario": scenario, "method": method, "strength": strength, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    stream = split(images, protocol["tasks"], scenario=run["scenario"], seed=run["seed"])
    make, seed = METHODS[run["method"]], run["seed"]
    return play(
        stream,
        protocol,
        device,
        lambda model: make(model, run["strength"] or 0.0, seed),
        seed=seed,
    )


SPLIT_MNIST = Experiment(
    name="split-mnist",
    summary="Five tasks of two digits, in the task-, domain- and class-incremental scenario.",
    protocols={
        "mnist": {**_SHARED, "hidden": [400, 400], "rate": 1e-3, "steps": 2000, "batch": 128},
        "digits": {**_SHARED, "hidden": [64, 64], "rate": 1e-3, "steps": 100, "batch": 64},
    },
    stages=(_all,),
    play=_play,
)
