"""What the diagonal Fisher information costs, here and elsewhere, in time and in memory.

The unit of time is one plain forward and backward pass over the same data, in the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ewc_lib._progress import progress as show_progress
from ewc_lib.experiments.cost.benchmarks import SEED, Batches, Benchmark
from ewc_lib.experiments.cost.benchmarks import benchmarks as benchmarks_on
from ewc_lib.experiments.cost.measure import peak_bytes, quiet, require, seconds
from ewc_lib.experiments.cost.peers import CONTESTANTS, Contestant, Contestants, error, plain_pass
from ewc_lib.experiments.cost.report import OUT_OF_REACH, Entry, load, result_name
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.provenance import differences, provenance

__all__ = ["fisher_cost"]

PACKAGES = (
    "nngeometry",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "laplace-torch",
    "asdfghjkl",
    "opacus",
)

SIZES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
"""Numbers of observations over which the cost should grow linearly."""

FEWEST = 16
"""A contestant is tried on so many observations, then on twice as many, and so on, ..."""

PATIENCE = 5
"""... until a run takes as long as this number of plain passes over all observations."""


def fisher_cost(
    path: Path | None = None,
    sections: Iterable[str] = (),
    *,
    device: str = "cpu",
    benchmarks: Mapping[str, Benchmark] | None = None,
    contestants: Contestants = CONTESTANTS,
    sizes: Iterable[int] = SIZES,
    repetitions: int = 5,
    threads: int = 2,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure all contestants on all models, and write down what was found after each run.

    Within a model the contestants take turns, one repetition of each and then the next, and each
    run is compared with a plain pass just before it, so that whatever else the machine does
    meets both. Peak memory on the processor is that of a process of its own
    for each contestant. Answers are compared in double precision, because a fast wrong number is
    no competitor. What a contestant cannot do is recorded with the reason.

    Parameters
    ----------
    path
        The JSON file, by default one for each device. What it holds already is kept and not
        measured again.
    sections
        Names of models, or ``"linearity"``. By default all.
    device
        ``"cpu"`` or ``"cuda"``.
    benchmarks
        The models, by name; by default those of the device. Linearity is measured on the one that
        is called ``"mlp"``.
    contestants
        Functions of a model and its batches, by library and kind.
    sizes
        Numbers of observations for ``"linearity"``.
    repetitions
        How often each contestant is measured. The median of five survives two accidents.
    threads
        Threads of PyTorch, here and in the processes that measure memory.
    fresh
        Start anew instead of adding to the file.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        The content of the file; :func:`~ewc_lib.experiments.cost.report.rows` and
        :func:`~ewc_lib.experiments.cost.report.fits` read it. A model of which something is
        missing stands under ``"unfinished"``, for the next call.

    Raises
    ------
    ValueError
        If a section is unknown, if the device is, or if the file was measured by other code, on
        another machine or with other settings, which must not be mixed.
    RuntimeError
        If the code was changed during the measurement: processes that start later would run it.
    """
    require(device)
    models = benchmarks_on(device) if benchmarks is None else benchmarks
    models = {name: model._replace(device=device) for name, model in models.items()}
    known = [*models, "linearity"]
    wanted = list(sections) or known
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown section {unknown[0]!r}; there are {', '.join(known)}")
    settings = {
        "device": device,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "repetitions": repetitions,
        "threads": threads,
        "sizes": list(sizes),
        "contestants": list(contestants),
    }
    with quiet(threads):
        path = OUTPUT / result_name(device) if path is None else path
        result = _begin(path, settings, fresh)
        for name in wanted:
            if name in result["sections"]:
                continue
            section = _Section(name, path, result)
            if name == "linearity":
                _linearity(section, models["mlp"], contestants["ewc_lib"], progress)
            else:
                _compare(section, models[name], contestants, progress)
            section.finish()
    return result


def _begin(path: Path, settings: Entry, fresh: bool) -> dict[str, Any]:
    """Return what the file holds, if it may be added to."""
    record = _provenance()
    if fresh or not path.exists():
        name = "fisher-cost"
        return {"experiment": name, "settings": settings, "provenance": record, "sections": {}}
    old = load(path)
    before = {**old["provenance"], "settings": old["settings"]}
    if changed := differences(before, {**record, "settings": settings}):
        raise ValueError(
            f"{path.name} must not be mixed with new results: {'; '.join(changed)}. Start anew "
            "with --fresh, or write to another folder with --out"
        )
    return {**old, "provenance": {**record, "wall_seconds": old["provenance"]["wall_seconds"]}}


def _provenance() -> Entry:
    return provenance(seeds=[SEED], packages=PACKAGES, wall_seconds=0.0)


class _Section:
    """A part of the result while it is measured, and the file that it is written to."""

    def __init__(self, name: str, path: Path, result: dict[str, Any]) -> None:
        self.name, self.path, self.result = name, path, result
        self.settings: Entry = result["settings"]
        self.found: Entry = result.setdefault("unfinished", {}).setdefault(name, {})
        self.found["command"] = result["provenance"]["command"]
        self.since = time.perf_counter()

    def save(self) -> None:
        """Write all or nothing."""
        if changed := differences(self.result["provenance"], _provenance()):
            raise RuntimeError(f"{self.name} was being measured while {'; '.join(changed)}")
        now = time.perf_counter()
        for record in (self.found, self.result["provenance"]):
            record["wall_seconds"] = round(record.get("wall_seconds", 0) + now - self.since, 3)
        self.since = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        text = json.dumps(self.result, indent=1, allow_nan=False)
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.path)

    def finish(self) -> None:
        """Move it to the finished ones."""
        self.result["sections"][self.name] = self.result["unfinished"].pop(self.name)
        if not self.result["unfinished"]:
            del self.result["unfinished"]
        self.save()


def _compare(
    section: _Section, benchmark: Benchmark, contestants: Contestants, progress: bool | None
) -> None:
    """Measure all contestants on one model."""
    title, model, batches = benchmark.title, benchmark.model(), benchmark.batches(benchmark.n)
    section.found |= {
        "title": title,
        "parameters": sum(p.numel() for p in model.parameters()),
        "n": benchmark.n,
        "batch_size": benchmark.batch_size,
    }
    found = section.found.setdefault("contestants", {library: {} for library in contestants})
    pairs = [(library, kind) for library, kinds in contestants.items() for kind in kinds]
    unit = min(seconds(plain_pass, model, batches) for _ in range(2))
    for library, kind in show_progress(pairs, f"{title}: answers", progress):
        if kind not in found[library]:
            contestant = contestants[library][kind]
            found[library][kind] = _examine(contestant, kind, benchmark, model, unit)
            section.save()
    runs = [(found[library][kind], contestants[library][kind]) for library, kind in pairs]
    sizes = {entry["n"] for entry, _ in runs if "n" in entry}
    data = {n: benchmark.batches(n) for n in sizes}
    turns = [(turn, *run) for turn in range(section.settings["repetitions"]) for run in runs]
    for turn, entry, contestant in show_progress(turns, f"{title}: time", progress):
        if len(entry.get("seconds", range(turn + 1))) == turn:
            plain = seconds(plain_pass, model, batches)
            _take_turn(entry, plain, partial(seconds, contestant, model, data[entry["n"]]))
            section.save()
    threads = section.settings["threads"]
    for entry, contestant in show_progress(runs, f"{title}: memory", progress):
        if "seconds" in entry and "peak_bytes" not in entry:
            entry["peak_bytes"] = peak_bytes(contestant, benchmark, entry["n"], threads)
            section.save()
    section.found["plain_peak_bytes"] = peak_bytes(plain_pass, benchmark, benchmark.n, threads)


def _examine(
    contestant: Contestant, kind: str, benchmark: Benchmark, model: nn.Module, unit: float
) -> Entry:
    """Find out whether a contestant can do it, how well, and on how many observations."""
    if kind == "exact" and not benchmark.exact:
        return {"reason": OUT_OF_REACH}
    try:
        wrong_by = error(contestant, kind, benchmark)
        n = _affordable(partial(seconds, contestant, model), benchmark, unit)
    except Exception as problem:
        return _reason(problem)
    return {"n": n, "error": wrong_by, "plain_seconds": [], "seconds": []}


def _affordable(timed: Callable[[Batches], float], benchmark: Benchmark, unit: float) -> int:
    """Return how many observations are measured, where a plain pass over all takes a unit."""
    n = min(FEWEST, benchmark.n)
    first = timed(benchmark.batches(n))  # which also loads and compiles
    if first > 10 * PATIENCE * unit:
        return n
    while n < benchmark.n and timed(benchmark.batches(n)) < PATIENCE * unit:
        n = min(2 * n, benchmark.n)
    return n


def _take_turn(entry: Entry, plain: float, timed: Callable[[], float]) -> None:
    """Add a run, after a plain pass that took so long."""
    try:
        taken = timed()
    except Exception as problem:  # as when memory is short on more observations
        entry.clear()
        entry.update(_reason(problem))
    else:
        entry["plain_seconds"].append(plain)
        entry["seconds"].append(taken)


def _reason(problem: Exception) -> Entry:
    """Say what a library has raised, whatever it is, in one short line."""
    reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return {"reason": reason if len(reason) <= 120 else f"{reason[:117]}..."}


def _linearity(
    section: _Section,
    benchmark: Benchmark,
    kinds: Mapping[str, Contestant],
    progress: bool | None,
) -> None:
    """Measure the kinds of this package on more and more observations."""
    model, settings = benchmark.model(), section.settings
    everyone: dict[str, Contestant] = {"plain": plain_pass, **kinds}
    blank: list[Entry] = [{"kind": kind, "n": n} for n in settings["sizes"] for kind in everyone]
    section.found["title"] = benchmark.title
    runs = section.found.setdefault("runs", blank)
    data = {n: benchmark.batches(n) for n in settings["sizes"]}
    turns = [(turn, run) for turn in range(settings["repetitions"]) for run in runs]
    for turn, run in show_progress(turns, "linearity: time", progress):
        if len(run.setdefault("seconds", [])) == turn:
            run["seconds"].append(seconds(everyone[run["kind"]], model, data[run["n"]]))
            section.save()
    for run in show_progress(runs, "linearity: memory", progress):
        if "peak_bytes" not in run:
            contestant, n = everyone[run["kind"]], run["n"]
            run["peak_bytes"] = peak_bytes(contestant, benchmark, n, settings["threads"])
            section.save()
