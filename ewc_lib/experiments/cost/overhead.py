"""What the penalty adds to a training step, after one task and after fifty."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib._progress import progress as show_progress
from ewc_lib.continual import mlp
from ewc_lib.ewc import EWC
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.provenance import provenance
from ewc_lib.experiments.runs.store import save
from ewc_lib.norms import freeze_norms

__all__ = ["NETWORKS", "Overhead", "overhead", "overheads"]

BATCH = 128
FORMS = ("gradient", "proximal", "penalty")


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(channels: tuple[int, ...] = (64, 64, 64, 128, 128, 256, 256, 512, 512)) -> nn.Module:
    """Return the residual network with 18 layers for small images (He et al. 2016)."""
    first = channels[0]
    blocks = [Residual(i, o) for i, o in pairwise(channels)]
    return nn.Sequential(
        nn.Conv2d(3, first, 3, 1, 1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels[-1], 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp((784, 400, 400, 10), seed=0), (784,)),
    "resnet18": (resnet18, (3, 32, 32)),
}
"""What is trained, and the shape of one of its inputs."""


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
    network: str = "mlp",
    tasks: Sequence[int] = (1, 50),
    rounds: int = 200,
    device: str = "cpu",
    threads: int = 2,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Time single steps of Adam's fused kernel without and with a penalty, in turn.

    Parameters
    ----------
    path
        The JSON file.
    network
        Of :data:`NETWORKS`.
    tasks
        Numbers of consolidated tasks.
    rounds
        Steps of each form. Each round times all forms once, so that whatever else the machine
        does meets them all.
    device
        Where to train. A step ends when the device has done its work.
    threads
        Of PyTorch, on the processor.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        ``plain`` and, for each form and number of tasks, the seconds of each step, on a processor
        those that it has worked for it; :func:`overheads` reads it.
    """
    start, before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.process_time if device == "cpu" else time.perf_counter
    try:
        steps = _steps(network, tasks, device)
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
        for _ in range(10):
            for step in steps.values():
                step()
        for _ in show_progress(range(rounds), "overhead", progress):
            for key, step in steps.items():
                begin = clock()
                step()
                seconds[key].append(round(clock() - begin, 7))
        record = provenance(seeds=[0], wall_seconds=time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    runs = [{"form": form, "tasks": n, "seconds": s} for (form, n), s in seconds.items()]
    settings = {"network": network, "batch": BATCH, "optimizer": "Adam (fused)", "device": device}
    result = {"experiment": "overhead", **settings, "provenance": record, "runs": runs}
    save(path, result)
    return result


def _steps(
    network: str, tasks: Sequence[int], device: str
) -> dict[tuple[str, int], Callable[[], None]]:
    """Return functions that do one training step each, all of one network, as in training."""
    build, shape = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().to(device).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *shape, generator=generator).to(device)
    y = torch.randint(10, (BATCH,), generator=generator).to(device)
    penalties = {n: EWC(model, strength=1.0, kind="empirical") for n in tasks}
    with freeze_norms(model):
        for n, ewc in penalties.items():
            for _ in range(n):
                ewc.consolidate((x, y), progress=False)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(form: str, ewc: EWC | None) -> None:
        loss = F.cross_entropy(model(x), y)
        if ewc and form == "penalty":
            loss = loss + ewc.penalty()
        optimizer.zero_grad()
        loss.backward()
        if ewc and form == "gradient":
            ewc.add_gradient_()
        optimizer.step()
        if ewc and form == "proximal":
            ewc.proximal_step_(optimizer)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    steps: dict[tuple[str, int], Callable[[], None]] = {("plain", 0): partial(step, "plain", None)}
    steps |= {(form, n): partial(step, form, ewc) for n, ewc in penalties.items() for form in FORMS}
    return steps


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
