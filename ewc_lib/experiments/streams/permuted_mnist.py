"""Permuted MNIST: ten tasks with the pixels in another order each.

``small`` is a budget for two cores. The other presets follow publications: van de Ven and Tolias
(2019, domain-incremental), Kirkpatrick et al. (2017, figure 2B; the learning rate and the
strength of EWC are not given there, so these are ours), and Zenke et al. (2017). In our convention
SI has twice their factor. A second strength was found by trying in ``small``; in
``three-scenarios`` it is that of the authors' code, whose online EWC decays by 0.9 beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from ewc_lib.continual import permuted
from ewc_lib.data import Images
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.runs.store import Run

__all__ = ["PERMUTED_MNIST"]

_METHODS = {"none": [None], "EWC": [30.0], "online EWC": [30.0], "SI": [0.2, 2.0], "joint": [None]}

_SMALL = {"hidden": [400, 400], "rate": 1e-3, "steps": 2000, "batch": 128}

PROTOCOLS: dict[str, Protocol] = {
    "small": {"tasks": 10, "optimizer": "adam", "n_samples": None, "methods": _METHODS, **_SMALL},
    "three-scenarios": {
        "tasks": 10,
        "optimizer": "adam",
        "hidden": [1000, 1000],
        "rate": 1e-4,
        "steps": 5000,
        "batch": 128,
        "n_samples": 1000,
        "methods": {
            "none": [None],
            "EWC": [100.0, 500.0],
            "online EWC": [100.0, 1000.0],
            "SI": [0.2, 10.0],
            "joint": [None],
        },
    },
    "kirkpatrick": {
        "tasks": 10,
        "optimizer": "sgd",
        "hidden": [400, 400],
        "rate": 0.1,
        "steps": 9380,  # 20 epochs
        "batch": 128,
        "n_samples": None,
        "methods": {"none": [None], "EWC": [30.0, 100.0]},
    },
    "zenke": {
        "tasks": 10,
        "optimizer": "adam",
        "hidden": [2000, 2000],
        "rate": 1e-3,
        "steps": 4700,  # 20 epochs
        "batch": 256,
        "n_samples": None,
        "methods": {"none": [None], "SI": [0.2]},
    },
    "digits": {
        "tasks": 5,
        "optimizer": "adam",
        "hidden": [64, 64],
        "rate": 1e-3,
        "steps": 300,
        "batch": 64,
        "n_samples": None,
        "methods": _METHODS,
    },
}


def _all(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    for seed, (method, strengths) in product(range(seeds), protocol["methods"].items()):
        for strength in strengths:
            yield {"method": method, "strength": strength, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    make, seed = METHODS[run["method"]], run["seed"]
    algorithm = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[protocol["optimizer"]]
    # Replay keeps everything for joint training, whatever the others look at.
    n_samples = None if run["method"] == "joint" else protocol["n_samples"]
    return play(
        permuted(images, protocol["tasks"], seed=seed),
        protocol,
        device,
        lambda model: make(model, run["strength"] or 0.0, seed),
        seed=seed,
        optimizer=partial(algorithm, lr=protocol["rate"], fused=True),
        n_samples=n_samples,
    )


PERMUTED_MNIST = Experiment(
    name="permuted-mnist",
    summary="Ten tasks with permuted pixels; presets of several publications.",
    protocols=PROTOCOLS,
    stages=(_all,),
    play=_play,
)
