"""Which Fisher information for EWC: accuracy, plateau of the strength, and time.

The protocol is that of van de Ven (2025): split MNIST in the task-incremental scenario, online
EWC without decay, each variant at many strengths. One row is new, the sketch; and one is no
Fisher information at all, the squared gradient of a batch mean, which is computed here because
many implementations do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib._restoring import evaluating
from ewc_lib.continual import split
from ewc_lib.data import Images
from ewc_lib.experiments.runs.protocols import Experiment, Protocol, play
from ewc_lib.experiments.runs.report import Row, rows
from ewc_lib.experiments.runs.store import Run
from ewc_lib.experiments.runs.strengths import best, decades, points
from ewc_lib.fisher import Diagonal, fisher_information
from ewc_lib.quadratic import QuadraticPenalty

__all__ = [
    "FISHER_VARIANTS",
    "VARIANTS",
    "Importance",
    "OnlinePenalty",
    "at_their_best",
    "of_batch_means",
    "of_drawn_labels",
]

Importance = Callable[..., Any]
"""Of a model and the data of a task, inputs and labels."""


class OnlinePenalty(QuadraticPenalty):
    """Online EWC without decay, with any diagonal importance.

    Parameters
    ----------
    model, strength
        As in :class:`ewc_lib.EWC`.
    importance
        Computes the importance of each parameter from the model and the data of a task.
    """

    def __init__(self, model: nn.Module, strength: float, importance: Importance) -> None:
        super().__init__(model, strength)
        self.importance = importance

    def consolidate(self, data: tuple[Tensor, Tensor]) -> None:
        """Add the importance of a task and take the present parameters as the anchor."""
        new = self.importance(self.model, data)
        self._replace(new if self.precision is None else self.precision + new)


def of_batch_means(
    model: nn.Module, data: tuple[Tensor, Tensor], *, batch_size: int = 128
) -> Diagonal:
    """Return the mean over batches of the squared gradient of the mean loss of a batch.

    This is what most public implementations of EWC use. It is not a Fisher information: the
    gradients of the observations of a batch cancel before they are squared.

    Parameters
    ----------
    model
        A classifier.
    data
        Inputs and labels.
    batch_size
        Observations of a batch; a last batch that is smaller counts as much as the others.
    """
    batches = list(zip(*(tensor.split(batch_size) for tensor in data), strict=True))
    sums = _sums_of_squares(model, batches, [1 / len(batches)] * len(batches))
    return Diagonal(len(data[0]), "squared batch means", dict.fromkeys(sums, "rule"), sums)


def of_drawn_labels(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    batch_size: int = 128,
    generator: torch.Generator,
) -> Diagonal:
    """Return the squared gradients of batches with labels from the model, times the batch size.

    The scores of labels that the model draws are independent and zero on average. What cancels in
    the gradient of a batch therefore comes back in the square, on average: this is an unbiased
    estimate of the Fisher information (Liu et al. 2024, "Gauss-Newton-Bartlett").

    Parameters
    ----------
    model
        A classifier.
    data
        Inputs and labels; the labels are not read.
    batch_size
        Observations of a batch; a smaller last batch counts for less.
    generator
        Draws the labels.
    """
    x, _ = data
    with torch.no_grad(), evaluating(model):
        labels = torch.multinomial(model(x).softmax(1), 1, generator=generator).squeeze(1)
    batches = list(zip(x.split(batch_size), labels.split(batch_size), strict=True))
    sums = _sums_of_squares(model, batches, [len(part) ** 2 / len(x) for part, _ in batches])
    return Diagonal(len(x), "batched", dict.fromkeys(sums, "rule"), sums)


def _sums_of_squares(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weighted sum of the squared gradients of the mean losses of batches."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in parameters]
    with evaluating(model):
        for (x, y), weight in zip(batches, weights, strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
            for total, g in zip(sums, gradients, strict=True):
                total.addcmul_(g, g, value=weight)
    return dict(zip(names, sums, strict=True))


_fisher = partial(partial, fisher_information, progress=False)

VARIANTS: dict[str, Importance] = {
    "exact": _fisher(kind="exact"),
    "exact, n = 500": _fisher(kind="exact"),
    "sketch": _fisher(kind="sketch"),
    "sampled": _fisher(kind="sampled"),
    "empirical": _fisher(kind="empirical"),
    "batch means": of_batch_means,
}
"""The importances, by the name that tables show."""

SIZES = {"exact, n = 500": 500}
"""Observations that a variant looks at, if not all."""

RANDOM = ("sketch", "sampled")
"""Variants that draw random numbers."""

_SHARED = {"tasks": 5, "grid": decades(0, 12, step=2), "grid_seeds": 2}


def _grid(protocol: Protocol, seeds: int, _: Sequence[Run]) -> Iterable[Run]:
    """Yield plain training, and each variant at one strength in two decades for a few seeds."""
    for seed in range(seeds):
        yield _run("none", 0.0, seed)
    for seed in range(min(seeds, protocol["grid_seeds"])):
        for strength, variant in product(protocol["grid"], VARIANTS):
            yield _run(variant, strength, seed)


def _around_the_best(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield the decades around the best strength of the grid of each variant, for all seeds."""
    grid, few = protocol["grid"], range(protocol["grid_seeds"])
    first = [run for run in finished if run["strength"] in grid and run["seed"] in few]
    tops = {
        variant: best(points([r for r in first if r["variant"] == variant], "accuracy")).strength
        for variant in VARIANTS
    }
    for seed, (variant, top) in product(range(seeds), tops.items()):
        for factor in (0.1, 1.0, 10.0):
            yield _run(variant, float(f"{top * factor:.0e}"), seed)


def _run(variant: str, strength: float, seed: int) -> Run:
    return {"variant": variant, "strength": strength, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    stream = split(images, protocol["tasks"], scenario="task", seed=run["seed"])

    def regularizer(model: nn.Module) -> OnlinePenalty | None:
        if run["variant"] == "none":
            return None
        return OnlinePenalty(model, run["strength"], _seeded(run["variant"], run["seed"]))

    return play(stream, protocol, device, regularizer, seed=run["seed"])


def _seeded(variant: str, seed: int) -> Importance:
    """Shuffle the data of each task and draw random numbers by the seed of the run."""
    importance, generator = VARIANTS[variant], torch.Generator().manual_seed(seed)

    def shuffled(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
        order = torch.randperm(len(data[0]), generator=generator)
        x, y = (tensor[order[: SIZES.get(variant)].to(tensor.device)] for tensor in data)
        own = torch.Generator(x.device).manual_seed(int(order[0]))
        options: dict[str, Any] = {"generator": own} if variant in RANDOM else {}
        return importance(model, (x, y), **options)

    return shuffled


def at_their_best(runs: Iterable[Run]) -> list[Row]:
    """Return plain training and each variant at its best strength among those with most seeds.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    """
    found = rows(runs)
    chosen = []
    for variant in ("none", *VARIANTS):
        own = [r for r in found if r.settings["variant"] == variant and not r.diverged]
        most = max((len(row.accuracies) for row in own), default=0)
        full = [row for row in own if len(row.accuracies) == most]
        chosen += [max(full, key=lambda row: row.mean)] if full else []
    return chosen


FISHER_VARIANTS = Experiment(
    name="fisher-variants",
    summary="Task-incremental split MNIST with six importances, each over many strengths.",
    protocols={
        "mnist": {**_SHARED, "hidden": [400, 400], "rate": 1e-3, "steps": 2000, "batch": 128},
        "digits": {**_SHARED, "hidden": [64, 64], "rate": 1e-3, "steps": 100, "batch": 64},
    },
    stages=(_grid, _around_the_best),
    play=_play,
)
