"""What the diagonal Fisher information costs, here and elsewhere, in time and in memory.

The unit of time is one plain forward and backward pass over the same data, in the same run.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ewc_lib._progress import progress as show_progress
from ewc_lib.experiments.cost.models import BENCHMARKS, SEED, Batches, Benchmark
from ewc_lib.experiments.cost.peers import CONTESTANTS, Contestant, Contestants, error, plain_pass
from ewc_lib.experiments.cost.report import RESULT, Entry, load
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.provenance import differences, provenance

__all__ = ["fisher_cost", "profile"]

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

TRIAL = 64
"""Observations from which the cost of a contestant is guessed."""

PATIENCE = 10
"""A contestant that costs more plain passes than this is measured on fewer observations ..."""

SHORTENED = 5
"""... so few that it takes about as long as this number of plain passes, ..."""

FEWEST = 16
"""... but not fewer than these."""


def fisher_cost(
    path: Path = OUTPUT / RESULT.name,
    sections: Iterable[str] = (),
    *,
    benchmarks: Mapping[str, Benchmark] = BENCHMARKS,
    contestants: Contestants = CONTESTANTS,
    sizes: Iterable[int] = SIZES,
    repetitions: int = 5,
    threads: int = 2,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure all contestants on all models, and write what was found after each model.

    Within a model the contestants take turns, one repetition of each and then the next, and each
    run is compared with a plain pass just before it, so that whatever else the machine does
    meets both. Peak memory is that of a process of its own
    for each contestant. Answers are compared in double precision, because a fast wrong number is
    no competitor. What a contestant cannot do is recorded with the reason.

    Parameters
    ----------
    path
        The JSON file. Sections that it holds already are kept and not measured again.
    sections
        Names of models, or ``"linearity"``. By default all.
    benchmarks
        The models, by name. Linearity is measured on the one that is called ``"mlp"``.
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
        :func:`~ewc_lib.experiments.cost.report.fits` read it.

    Raises
    ------
    ValueError
        If a section is unknown, or if the file was measured by other code, on another machine
        or with other settings, which must not be mixed.
    RuntimeError
        If the code was changed during the measurement: processes that start later would run it.
    """
    known = [*benchmarks, "linearity"]
    wanted = list(sections) or known
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown section {unknown[0]!r}; there are {', '.join(known)}")
    settings = {
        "repetitions": repetitions,
        "threads": threads,
        "sizes": list(sizes),
        "contestants": list(contestants),
    }
    with _quiet(threads):
        record = provenance(seeds=[SEED], packages=PACKAGES, wall_seconds=0.0)
        result = _begin(path, settings, record, fresh)
        for name in wanted:
            if name in result["sections"]:
                continue
            start = time.perf_counter()
            if name == "linearity":
                found = _linearity(benchmarks["mlp"], contestants["ewc_lib"], settings, progress)
            else:
                found = _compare(benchmarks[name], contestants, settings, progress)
            found["wall_seconds"] = round(time.perf_counter() - start, 3)
            now = provenance(seeds=[SEED], packages=PACKAGES, wall_seconds=0.0)
            if changed := differences(record, now):
                raise RuntimeError(f"{name} was being measured while {'; '.join(changed)}")
            result["sections"][name] = {**found, "command": record["command"]}
            total = sum(section["wall_seconds"] for section in result["sections"].values())
            result["provenance"] = {**record, "wall_seconds": round(total, 3)}
            _save(path, result)
    return result


def _begin(path: Path, settings: Entry, record: Entry, fresh: bool) -> dict[str, Any]:
    """Return what the file holds, if it may be added to."""
    if fresh or not path.exists():
        name = "fisher-cost"
        return {"experiment": name, "settings": settings, "provenance": record, "sections": {}}
    old = load(path)
    before = {**old["provenance"], "settings": old["settings"]}
    if changed := differences(before, {**record, "settings": settings}):
        raise ValueError(
            f"{path.name} must not be mixed with new results: {'; '.join(changed)}. Start anew "
            "with --fresh, or write to another file with --output"
        )
    return old


def _save(path: Path, result: dict[str, Any]) -> None:
    """Write all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """Set the number of threads, and let the collector skip what is there already."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def _compare(
    benchmark: Benchmark, contestants: Contestants, settings: Entry, progress: bool | None
) -> Entry:
    """Measure all contestants on one model."""
    title, model, batches = benchmark.title, benchmark.model(), benchmark.batches(benchmark.n)
    unit = min(_seconds(plain_pass, model, batches) for _ in range(2)) / benchmark.n
    found: dict[str, Entry] = {library: {} for library in contestants}
    runs: list[tuple[Entry, Contestant]] = []
    pairs = [(library, kind) for library, kinds in contestants.items() for kind in kinds]
    for library, kind in show_progress(pairs, f"{title}: answers", progress):
        contestant = contestants[library][kind]
        found[library][kind] = entry = _examine(contestant, kind, benchmark, unit)
        if "reason" not in entry:
            runs.append((entry, contestant))
    data = {entry["n"]: benchmark.batches(entry["n"]) for entry, _ in runs}
    turns = runs * settings["repetitions"]
    for entry, contestant in show_progress(turns, f"{title}: time", progress):
        entry["plain_seconds"].append(_seconds(plain_pass, model, batches))
        entry["seconds"].append(_seconds(contestant, model, data[entry["n"]]))
    threads = settings["threads"]
    for entry, contestant in show_progress(runs, f"{title}: memory", progress):
        entry["peak_bytes"] = _peak(contestant, benchmark, entry["n"], threads)
    return {
        "title": title,
        "parameters": sum(p.numel() for p in model.parameters()),
        "n": benchmark.n,
        "batch_size": benchmark.batch_size,
        "plain_peak_bytes": _peak(plain_pass, benchmark, benchmark.n, threads),
        "contestants": found,
    }


def _examine(contestant: Contestant, kind: str, benchmark: Benchmark, unit: float) -> Entry:
    """Find out whether a contestant can do it, how well, and on how many observations."""
    if kind == "exact" and not benchmark.exact:
        return {"reason": "one backward pass for each token and class is out of reach"}
    trial = benchmark.batches(min(TRIAL, benchmark.n))
    try:
        wrong_by = error(contestant, kind, benchmark)
        cost = min(_seconds(contestant, benchmark.model(), trial) for _ in range(2))
    except Exception as problem:  # whatever a library raises is its reason
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return {"reason": reason if len(reason) <= 120 else f"{reason[:117]}..."}
    passes = cost / min(TRIAL, benchmark.n) / unit
    fewer = max(FEWEST, math.ceil(benchmark.n * SHORTENED / passes))
    n = fewer if passes > PATIENCE else benchmark.n
    return {"n": n, "error": wrong_by, "plain_seconds": [], "seconds": []}


def _seconds(contestant: Contestant, model: nn.Module, batches: Batches) -> float:
    """Time one run, on a copy of the model because some libraries leave their hooks behind."""
    model = copy.deepcopy(model)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        contestant(model, batches)
        return time.perf_counter() - start


def _peak(contestant: Contestant, benchmark: Benchmark, n: int, threads: int) -> int:
    """Peak memory of a process of its own, in bytes.

    A server forks it: a process that is started in the usual way begins with the peak of the
    process that started it.
    """
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, contestant, benchmark, n, threads).result()


def _peak_of_this_process(
    contestant: Contestant, benchmark: Benchmark, n: int, threads: int
) -> int:
    import resource  # there is none on Windows

    torch.set_num_threads(threads)
    _seconds(contestant, benchmark.model(), benchmark.batches(n))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _linearity(
    benchmark: Benchmark, kinds: Mapping[str, Contestant], settings: Entry, progress: bool | None
) -> Entry:
    """Measure the kinds of this package on more and more observations."""
    model = benchmark.model()
    everyone: dict[str, Contestant] = {"plain": plain_pass, **kinds}
    runs: list[Entry] = [{"kind": kind, "n": n} for n in settings["sizes"] for kind in everyone]
    data = {n: benchmark.batches(n) for n in settings["sizes"]}
    turns = runs * settings["repetitions"]
    for run in show_progress(turns, "linearity: time", progress):
        seconds = _seconds(everyone[run["kind"]], model, data[run["n"]])
        run.setdefault("seconds", []).append(seconds)
    for run in show_progress(runs, "linearity: memory", progress):
        contestant = everyone[run["kind"]]
        run["peak_bytes"] = _peak(contestant, benchmark, run["n"], settings["threads"])
    return {"title": benchmark.title, "runs": runs}


def profile(benchmark: Benchmark, kind: str, threads: int = 2) -> str:
    """Return where the time of one run goes, operation by operation.

    Parameters
    ----------
    benchmark
        The model and its data.
    kind
        A kind of the Fisher information, or ``"plain"`` for the unit.
    threads
        Threads of PyTorch.

    Raises
    ------
    ValueError
        If the kind is unknown.
    """
    contestants: dict[str, Contestant] = {"plain": plain_pass, **CONTESTANTS["ewc_lib"]}
    if kind not in contestants:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(contestants)}")
    model, batches = benchmark.model(), benchmark.batches(benchmark.n)
    with _quiet(threads):
        _seconds(contestants[kind], model, batches)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            contestants[kind](model, batches)
    text: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    return text
