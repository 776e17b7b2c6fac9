"""What it takes to keep a task of a language model: memory and time beside a step of training.

The models are built as GPT-2 is, of three sizes, with random weights and tokens, which change
neither memory nor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ewc_lib.experiments.cost._plain import cross_entropy
from ewc_lib.experiments.cost.benchmarks import Batches, Benchmark
from ewc_lib.experiments.cost.measure import peak_bytes, quiet
from ewc_lib.experiments.cost.models import GPT2
from ewc_lib.experiments.cost.peers import CONTESTANTS, Contestant, Diagonal
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.store import Run, run_all
from ewc_lib.regularizers import L2

__all__ = ["ASKED", "SIZES", "keeping", "table"]

SIZES: Mapping[str, Mapping[str, int]] = {
    "6 layers of 256": {"vocabulary": 50_257, "width": 256, "layers": 6, "heads": 8},
    "6 layers of 512": {"vocabulary": 50_257, "width": 512, "layers": 6, "heads": 8},
    "GPT-2": {"vocabulary": 50_257, "width": 768, "layers": 12, "heads": 12},
}
"""Shapes of the models; the last is that of GPT-2 with 124 million parameters."""

BATCH, LENGTH = 8, 128
"""Sequences of a batch, and tokens of a sequence."""


def nothing(model: nn.Module, batches: Batches) -> Diagonal:
    """Do nothing: what a process takes that has the model and its data."""
    return {}


def step(model: nn.Module, batches: Batches) -> Diagonal:
    """Make two updates by Adam for each batch."""
    return _train(torch.optim.Adam(model.parameters()), model, batches)


def held_step(model: nn.Module, batches: Batches) -> Diagonal:
    """Make two updates by Adam, each with the proximal step of a diagonal penalty.

    The precision is that of L2, whose numbers take the memory and the time that any take.
    """
    optimizer, penalty = torch.optim.Adam(model.parameters()), L2(model, 1.0)
    penalty.consolidate(batches)
    with penalty.attach(optimizer):
        return _train(optimizer, model, batches)


def _train(optimizer: torch.optim.Optimizer, model: nn.Module, batches: Batches) -> Diagonal:
    for _, (x, y) in product(range(2), batches):
        optimizer.zero_grad()
        (cross_entropy(model(x), y) / y.numel()).backward()
        optimizer.step()
    return {}


ASKED: Mapping[str, Contestant] = {
    "nothing": nothing,
    "step": step,
    "held step": held_step,
    "sketch": CONTESTANTS["ewc_lib"]["sketch"],
}
"""What is measured: the model alone, a step of training, one with a penalty, and the Fisher
information of one batch."""


def keeping(
    path: Path = OUTPUT / "keeping.json",
    *,
    sizes: Mapping[str, Mapping[str, int]] = SIZES,
    length: int = LENGTH,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the peak of the memory, each in a process of its own, and processor seconds.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    sizes
        Shapes of the models, as :data:`SIZES`.
    length
        Tokens of a sequence.
    fresh
        Drop what the file holds.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        As :func:`.run_all` returns it: for each model and what is asked of it, ``parameters``,
        ``peak`` in bytes, and ``processor_seconds`` for one batch, with one thread.
    """
    return run_all(
        path,
        partial(_measure, sizes, length),
        [{"model": model, "asked": name} for model, name in product(sizes, ASKED)],
        experiment="keeping",
        data="random tokens",
        protocol={"sizes": {name: dict(s) for name, s in sizes.items()}, "length": length},
        fresh=fresh,
        progress=progress,
    )


def _text(n: int, generator: torch.Generator, length: int, vocabulary: int) -> Any:
    tokens = torch.randint(vocabulary, (n, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _measure(sizes: Mapping[str, Mapping[str, int]], length: int, run: Run) -> dict[str, Any]:
    shape, asked = sizes[run["model"]], ASKED[run["asked"]]
    build: Callable[[], nn.Module] = partial(GPT2, length=length, **shape)
    draw = partial(_text, length=length, vocabulary=shape["vocabulary"])
    benchmark = Benchmark(run["model"], build, draw, n=BATCH, batch_size=BATCH, exact=False)
    peak = peak_bytes(asked, benchmark, BATCH, 1)
    model, batches = benchmark.model(), benchmark.batches(BATCH)
    n_parameters = sum(p.numel() for p in model.parameters())
    with quiet(1):
        start = time.process_time()
        asked(model, batches)
        seconds = time.process_time() - start
    return {"parameters": n_parameters, "peak": peak, "processor_seconds": round(seconds, 3)}


def table(result: Mapping[str, Any]) -> str:
    """Return memory and time of each model as text, above those of the model alone.

    Parameters
    ----------
    result
        As :func:`keeping` returns it.
    """
    found = {(run["model"], run["asked"]): run for run in result["runs"]}
    lines = [f"{'GiB above the model and its data':34}{'step':>8}{'held step':>12}{'sketch':>9}"]
    for model in result["protocol"]["sizes"]:
        alone = found[model, "nothing"]
        more = [found[model, name]["peak"] - alone["peak"] for name in list(ASKED)[1:]]
        name = f"{model} ({alone['parameters'] / 1e6:.0f} million)"
        lines.append(
            f"{name:34}"
            + "".join(f"{b / 2**30:{w}.2f}" for b, w in zip(more, (8, 12, 9), strict=True))
        )
    return "\n".join(lines)
