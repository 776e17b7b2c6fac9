"""Split CIFAR-10: which Fisher information for EWC, in a convolutional network with batch norms.

The protocol is that of van de Ven (2025): five tasks of two classes in the task-incremental
scenario, a residual network of 18 layers with 20 channels in the first stage, 2,000 updates of
256 images a task by Adam, images standardised colour by colour, online EWC without decay, nothing
trained before. There the running statistics of the norms go on moving; here two rows show what it
changes to freeze them after the first task. Strengths are searched on validation images and on a
seed that is not used again, with as many runs for each row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib.continual import MultiHead, learn, split
from ewc_lib.data import Images, hold_out
from ewc_lib.experiments.cost.models import resnet
from ewc_lib.experiments.runs.choosing import choose, propose
from ewc_lib.experiments.runs.protocols import Experiment, Protocol, outcome
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.streams.fisher_variants import (
    RANDOM,
    SIZES,
    VARIANTS,
    Importance,
    OnlinePenalty,
)
from ewc_lib.fisher import Diagonal
from ewc_lib.norms import freeze_norms

__all__ = ["SPLIT_CIFAR10", "FreezingPenalty", "standardised"]

SEARCH_SEED = 1000
"""The seed on which strengths are chosen."""

ROUNDS = 5
"""Of the search: the starting values, and then what lies beyond or beside the best."""

_SHARED = {
    "tasks": 5,
    "variants": [*VARIANTS, "exact, frozen norms"],
    "knobs": {"strength": [1e2, 1e4, 1e6, 1e8, 1e10, 1e12]},
    "budget": 10,
}


class FreezingPenalty(OnlinePenalty):
    """Online EWC that freezes the running statistics of norms when the first task is learned."""

    def consolidate(self, data: tuple[Tensor, Tensor]) -> None:
        if self.precision is None:
            freeze_norms(self.model)
        super().consolidate(data)


def _alike(model: nn.Module, data: Any) -> Diagonal:
    """Return an importance for those who hold nothing, and so need none."""
    ones = {name: torch.ones_like(p).detach() for name, p in model.named_parameters()}
    return Diagonal(0, "identity", dict.fromkeys(ones, "rule"), ones)


def standardised(images: Images) -> Images:
    """Shift and scale each colour, so that over training images its mean is 0 and its variance 1.

    Parameters
    ----------
    images
        Square images of one or three colours.
    """
    colours = _colours(images)
    x = images.x_train.unflatten(1, (colours, -1))
    mean, deviation = x.mean((0, 2), keepdim=True), x.std((0, 2), correction=0, keepdim=True)
    x_train, x_test = (
        ((part.unflatten(1, (colours, -1)) - mean) / deviation).flatten(1)
        for part in (images.x_train, images.x_test)
    )
    return images._replace(x_train=x_train, x_test=x_test)


def _colours(images: Images) -> int:
    return 1 if math.isqrt(images.n_features) ** 2 == images.n_features else 3


def _network(images: Images, protocol: Protocol, seed: int) -> nn.Sequential:
    colours = _colours(images)
    side = math.isqrt(images.n_features // colours)
    blocks, width = protocol["blocks"], protocol["width"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = resnet(blocks, width, images.n_classes, colours=colours, norm=nn.BatchNorm2d)
    return nn.Sequential(nn.Unflatten(1, (colours, side, side)), net)


def _search(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield the next round of the search."""
    for variant in protocol["variants"]:
        tried = _tried(finished, variant)
        for settings in propose(tried, protocol["knobs"], protocol["budget"], "accuracy"):
            yield _run(variant, settings, SEARCH_SEED, search=True)


def _at_the_best(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    nothing = {"strength": 0.0}
    best = {"none": nothing, "none, frozen norms": nothing} | {
        variant: choose(_tried(finished, variant), protocol["knobs"], "accuracy").settings
        for variant in protocol["variants"]
    }
    for seed, (variant, settings) in product(range(seeds), best.items()):
        yield _run(variant, settings, seed)


def _tried(finished: Sequence[Run], variant: str) -> list[Run]:
    return [run for run in finished if run["search"] and run["variant"] == variant]


def _run(variant: str, settings: Mapping[str, float], seed: int, search: bool = False) -> Run:
    return {"variant": variant, **settings, "search": search, "seed": seed}


def _regularizer(model: nn.Module, run: Run, device: str) -> OnlinePenalty | None:
    variant, frozen = run["variant"].removesuffix(", frozen norms"), "frozen" in run["variant"]
    if variant == "none":
        return FreezingPenalty(model, 0.0, _alike) if frozen else None
    importance: Importance = VARIANTS[variant]
    if variant in RANDOM:
        generator = torch.Generator(device).manual_seed(run["seed"])
        importance = partial(importance, generator=generator)
    kind = FreezingPenalty if frozen else OnlinePenalty
    return kind(model, run["strength"], importance)


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    """Judge a run of the search by validation images, any other by test images."""
    shown = standardised(hold_out(images)[1] if run["search"] else images)
    stream = split(shown, protocol["tasks"], scenario="task", seed=run["seed"])
    model = MultiHead(_network(shown, protocol, run["seed"])).to(device)
    with warnings.catch_warnings():  # they are right: here it is wanted, to compare
        warnings.filterwarnings("ignore", "the running statistics .* will follow the data")
        learned = learn(
            stream,
            model,
            _regularizer(model, run, device),
            steps=protocol["steps"],
            batch_size=protocol["batch"],
            optimizer=partial(torch.optim.Adam, lr=protocol["rate"], fused=True),
            n_samples=SIZES.get(run["variant"]),
            seed=run["seed"],
            progress=False,
        )
    return outcome(learned)


SPLIT_CIFAR10 = Experiment(
    name="split-cifar10",
    summary="Task-incremental split CIFAR-10 with six importances, norms moving or frozen.",
    protocols={
        "cifar10": {
            **_SHARED,
            "blocks": [2, 2, 2, 2],
            "width": 20,
            "rate": 1e-3,
            "steps": 2000,
            "batch": 256,
        },
        "digits": {
            **_SHARED,
            "blocks": [1, 1],
            "width": 4,
            "rate": 1e-3,
            "steps": 20,
            "batch": 64,
        },
    },
    stages=(*[_search] * ROUNDS, _at_the_best),
    play=_play,
    images=("cifar10",),
)
