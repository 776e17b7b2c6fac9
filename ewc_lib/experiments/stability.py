"""The gradient of the penalty against the proximal step, over thirteen decades of the strength."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from ewc_lib.continual import permuted
from ewc_lib.data import Images
from ewc_lib.experiments.protocols import METHODS, Experiment, Protocol, play
from ewc_lib.experiments.store import Run
from ewc_lib.experiments.strengths import decades

__all__ = ["STABILITY"]

FORMS = ("gradient", "proximal")

_SHARED = {
    "tasks": 5,
    "grid": decades(-1, 12),
    "optimizers": {"SGD": 0.1, "Adam": 1e-3},
    "n_samples": 2000,
}


def _all(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    settings = product(range(seeds), protocol["optimizers"], FORMS, protocol["grid"])
    for seed, optimizer, form, strength in settings:
        yield {"optimizer": optimizer, "form": form, "strength": strength, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    algorithm = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[run["optimizer"]]
    make, seed = METHODS["online EWC"], run["seed"]
    rate = protocol["optimizers"][run["optimizer"]]
    try:
        found = play(
            permuted(images, protocol["tasks"], seed=seed),
            protocol,
            device,
            lambda model: make(model, run["strength"], seed),
            seed=seed,
            optimizer=partial(algorithm, lr=rate),
            proximal=run["form"] == "proximal",
            n_samples=protocol["n_samples"],
        )
    except ValueError as problem:  # the parameters are NaN when the Fisher information is due
        if "NaN" not in str(problem) and "not finite" not in str(problem):
            raise
        return {"accuracy": math.nan, "diverged": True}
    return {**found, "diverged": False}


STABILITY = Experiment(
    name="stability",
    summary="Five permuted tasks at strengths from 0.1 to 1e12, with SGD and with Adam.",
    protocols={
        "mnist": {**_SHARED, "hidden": [100, 100], "steps": 1000, "batch": 128},
        "digits": {**_SHARED, "hidden": [64, 64], "steps": 50, "batch": 64},
    },
    stages=(_all,),
    play=_play,
)
