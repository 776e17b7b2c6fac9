"""Two tasks, one after the other: what is left of the first, without and with EWC."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from ewc_lib.continual import Together, accuracy, mlp, permute_pixels
from ewc_lib.data import Images
from ewc_lib.ewc import EWC
from ewc_lib.fisher.estimate import Structure, fisher_information

__all__ = ["Outcome", "Summary", "forgetting", "summarise"]


class Outcome(NamedTuple):
    """Test accuracies after training on task A and then on task B."""

    structure: str
    strength: float
    seed: int
    accuracy_a: float
    accuracy_b: float


class Summary(NamedTuple):
    """Mean and standard error of the mean over seeds."""

    structure: str
    strength: float
    accuracy_a: float
    error_a: float
    accuracy_b: float
    error_b: float


def forgetting(
    images: Images,
    *,
    hidden: Sequence[int] = (64, 64),
    strengths: Iterable[float],
    seeds: Iterable[int],
    structures: Iterable[Structure] = ("diagonal",),
    steps: int = 460,
    progress: bool | None = None,
) -> list[Outcome]:
    """Train on a task, then on the same images with permuted pixels, for each strength and seed.

    Parameters
    ----------
    images
        Task A. Task B has its pixels permuted, by another permutation for each seed.
    hidden
        Units of each hidden layer.
    strengths
        Values of the strength; 0 is plain training.
    seeds
        Each sets the initial weights, the order of the data and the permutation. The networks of
        all seeds, and then those of all seeds and strengths, are trained at once.
    structures
        Structures of the Fisher information to try.
    steps
        Updates on each task, by Adam with batches of 64. The default is 20 passes over the
        training part of the digits.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    list of Outcome
        One for each structure, strength and seed.

    Examples
    --------
    >>> from ewc_lib import data
    >>> runs = forgetting(data.digits(), strengths=[0.0, 100.0], seeds=[0], steps=50)
    >>> [run.strength for run in runs]
    [0.0, 100.0]
    """
    strengths, seeds, outcomes = list(strengths), list(seeds), []
    sizes = (images.n_features, *hidden, images.n_classes)
    learned_a = [mlp(sizes, seed) for seed in seeds]
    options: dict[str, Any] = {"steps": steps, "progress": progress}
    Together(learned_a).train([images.train] * len(seeds), seeds=seeds, **options)
    permuted = {seed: permute_pixels(images, seed + 1000) for seed in seeds}
    for structure in structures:
        penalties = [
            penalty
            for model in learned_a
            for penalty in _penalties(model, images, structure, strengths)
        ]
        runs = list(zip(product(seeds, strengths), penalties, strict=True))
        Together([penalty.model for penalty in penalties], penalties).train(
            [permuted[seed].train for (seed, _), _ in runs],
            seeds=[seed + 1 for (seed, _), _ in runs],
            **options,
        )
        for (seed, strength), penalty in runs:
            scores = [accuracy(penalty.model, task.test) for task in (images, permuted[seed])]
            outcomes.append(Outcome(structure, strength, seed, *scores))
    return outcomes


def _penalties(
    model: nn.Module, images: Images, structure: Structure, strengths: Iterable[float]
) -> Iterator[EWC]:
    """Yield a penalty for each strength, all with one precision and each with its own network."""
    fisher = fisher_information(model, images.train, structure=structure, progress=False)
    for strength in strengths:
        ewc = EWC(copy.deepcopy(model), strength, structure=structure)
        ewc.remember(fisher)
        yield ewc


def summarise(outcomes: Iterable[Outcome]) -> list[Summary]:
    """Average over seeds, for each structure and strength in the order of their appearance.

    Examples
    --------
    >>> runs = [Outcome("diagonal", 1.0, 0, 0.5, 0.9), Outcome("diagonal", 1.0, 1, 0.7, 0.9)]
    >>> row = summarise(runs)[0]
    >>> round(row.accuracy_a, 3), round(row.error_a, 3), row.error_b
    (0.6, 0.1, 0.0)
    """
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for run in outcomes:
        groups.setdefault((run.structure, run.strength), []).append(run)
    return [
        Summary(
            structure,
            strength,
            *_mean_and_error([run.accuracy_a for run in runs]),
            *_mean_and_error([run.accuracy_b for run in runs]),
        )
        for (structure, strength), runs in groups.items()
    ]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), spread / math.sqrt(len(values))
