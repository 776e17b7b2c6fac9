"""What the penalty adds to a training step, after one task and after fifty."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ewc_lib._progress import progress as show_progress
from ewc_lib.continual import mlp
from ewc_lib.ewc import EWC
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.provenance import provenance
from ewc_lib.experiments.runs.store import save

__all__ = ["Overhead", "overhead", "overheads"]

SIZES = (784, 400, 400, 10)
BATCH = 128
FORMS = ("gradient", "proximal", "penalty")


class Overhead(NamedTuple):
    """What one form of the penalty adds to a plain step of Adam.

    Parameters
    ----------
    form
        ``"gradient"`` (:meth:`ewc_lib.EWC.add_gradient_`), ``"proximal"``
        (:meth:`ewc_lib.EWC.proximal_step_`) or ``"penalty"`` (in the loss).
    tasks
        Number of consolidated tasks.
    share, low, high
        Median, first and third quartile of the added time, as a share of a plain step.
    """

    form: str
    tasks: int
    share: float
    low: float
    high: float


def overhead(
    path: Path = OUTPUT / "overhead.json",
    *,
    tasks: Sequence[int] = (1, 50),
    rounds: int = 200,
    sizes: tuple[int, ...] = SIZES,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Time single steps of Adam without and with a penalty, in turn, on one thread.

    Parameters
    ----------
    path
        The JSON file.
    tasks
        Numbers of consolidated tasks.
    rounds
        Steps of each form. Each round times all forms once, so that whatever else the machine
        does meets them all.
    sizes
        Of the multilayer perceptron.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        ``plain`` and, for each form and number of tasks, the seconds of each step;
        :func:`overheads` reads it.
    """
    start, before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {("plain", 0): _step("plain", 0, sizes)}
        steps |= {(form, n): _step(form, n, sizes) for n in tasks for form in FORMS}
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
        for _ in range(10):
            for step in steps.values():
                step()
        for _ in show_progress(range(rounds), "overhead", progress):
            for key, step in steps.items():
                begin = time.perf_counter()
                step()
                seconds[key].append(round(time.perf_counter() - begin, 7))
        record = provenance(seeds=[0], wall_seconds=time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    runs = [{"form": form, "tasks": n, "seconds": s} for (form, n), s in seconds.items()]
    settings = {"sizes": list(sizes), "batch": BATCH, "optimizer": "Adam"}
    result = {"experiment": "overhead", **settings, "provenance": record, "runs": runs}
    save(path, result)
    return result


def _step(form: str, tasks: int, sizes: tuple[int, ...]) -> Callable[[], None]:
    """Return a function that does one training step."""
    model = mlp(sizes, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, sizes[0], generator=generator)
    y = torch.randint(sizes[-1], (BATCH,), generator=generator)
    ewc = EWC(model, strength=1.0)
    for _ in range(tasks):
        ewc.consolidate((x, y), progress=False)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if form == "penalty":
            loss = loss + ewc.penalty()
        optimizer.zero_grad()
        loss.backward()
        if form == "gradient":
            ewc.add_gradient_()
        optimizer.step()
        if form == "proximal":
            ewc.proximal_step_(optimizer)

    return step


def overheads(result: dict[str, Any]) -> list[Overhead]:
    """Compare each step with the plain one of the same round."""
    seconds = {(run["form"], run["tasks"]): run["seconds"] for run in result["runs"]}
    plain = seconds.pop(("plain", 0))
    found = []
    for (form, n), own in seconds.items():
        shares = [s / p - 1 for s, p in zip(own, plain, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        found.append(Overhead(form, n, middle, low, high))
    return found
