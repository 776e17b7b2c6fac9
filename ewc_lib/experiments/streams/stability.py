"""The gradient of the penalty against the proximal step, over thirteen decades of the strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from ewc_lib.attaching import Metric
from ewc_lib.continual import Stream, permuted
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.runs.protocols import (
    METHODS,
    Experiment,
    Protocol,
    play,
)
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.runs.strengths import decades

__all__ = ["STABILITY"]

FORMS: dict[str, bool | Metric] = {
    "gradient": False,
    "proximal": True,
    "euclidean": "euclidean",
}
"""The penalty in the gradient, as a proximal step, and as one in the metric of no optimizer."""

_SHARED = {
    "tasks": 5,
    "grid": decades(-1, 12),
    "optimizers": {"SGD": 0.1, "Adam": 1e-3},
    "n_samples": 2000,
    "held_out": None,
}


def _all(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    for seed, optimizer in product(range(seeds), protocol["optimizers"]):
        for form, strength in product(FORMS, protocol["grid"]):
            if (optimizer, form) != ("SGD", "euclidean"):  # which is its own metric
                yield {"optimizer": optimizer, "form": form, "strength": strength, "seed": seed}


def _optimizer(protocol: Protocol, name: str) -> Callable[..., torch.optim.Optimizer]:
    algorithm = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name]
    return partial(algorithm, lr=protocol["optimizers"][name])


def _held_out(images: Images, protocol: Protocol, seed: int) -> tuple[Images, Stream | None]:
    """Return the images without those for validation, and a stream of these if there are any."""
    if not protocol["held_out"]:
        return images, None
    rest, valid = hold_out(images, protocol["held_out"])
    return rest, permuted(valid, protocol["tasks"], seed=seed)


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    make, seed = METHODS["online EWC"], run["seed"]
    images, valid = _held_out(images, protocol, seed)
    found = play(
        permuted(images, protocol["tasks"], seed=seed),
        protocol,
        device,
        lambda model: make(model, run["strength"], seed),
        seed=seed,
        valid=valid,
        optimizer=_optimizer(protocol, run["optimizer"]),
        proximal=FORMS[run["form"]],
        n_samples=protocol["n_samples"],
    )
    return {"diverged": False, **found}


STABILITY = Experiment(
    name="stability",
    summary="Five permuted tasks at strengths from 0.1 to 1e12, with SGD and with Adam.",
    protocols={
        "mnist": {**_SHARED, "hidden": [100, 100], "steps": 1000, "batch": 128},
        "digits": {
            **_SHARED,
            "tasks": 3,
            "hidden": [64, 64],
            "steps": 200,
            "batch": 64,
            "held_out": 0.2,
        },
    },
    stages=(_all,),
    play=_play,
)
