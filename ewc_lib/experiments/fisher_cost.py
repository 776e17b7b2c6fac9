"""What the diagonal Fisher information costs, here and elsewhere, in time and in memory.

The unit of time is one plain forward and backward pass over the same data, in the same run.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from ewc_lib import plot
from ewc_lib._progress import progress as show_progress
from ewc_lib.experiments.models import BENCHMARKS, SEED, Batches, Benchmark
from ewc_lib.experiments.peers import CONTESTANTS, Contestant, Contestants, error, plain_pass
from ewc_lib.experiments.provenance import PACKAGE, differences, provenance

__all__ = [
    "RESULT",
    "Fit",
    "Row",
    "figure",
    "fisher_cost",
    "fits",
    "load",
    "profile",
    "rows",
    "table",
]

Entry: TypeAlias = dict[str, Any]

RESULT = PACKAGE.parent / "book" / "results" / "fisher_cost.json"
"""Where the book finds its numbers."""

PACKAGES = (
    "nngeometry",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "laplace-torch",
    "asdfghjkl",
    "opacus",
)

KINDS = ("empirical", "sketch", "sampled", "exact")

SIZES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
"""Numbers of observations over which the cost should grow linearly."""

AGREEMENT = 1e-5
"""Largest relative error of a right answer; sums in float32 come to 1e-7."""

TRIAL = 64
"""Observations from which the cost of a contestant is guessed."""

PATIENCE = 40
"""A contestant that costs more plain passes than this is measured on fewer observations ..."""

SHORTENED = 5
"""... so few that it takes about as long as this number of plain passes, ..."""

FEWEST = 16
"""... but not fewer than these."""


def fisher_cost(
    path: Path = RESULT,
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
        The content of the file; :func:`rows` and :func:`fits` read it.

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
    settings = {"repetitions": repetitions, "threads": threads, "sizes": list(sizes)}
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


def load(path: Path = RESULT) -> dict[str, Any]:
    """Read a result that :func:`fisher_cost` wrote."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


class Row(NamedTuple):
    """The cost of one contestant on one model; where there is a ``reason``, there is no cost.

    Parameters
    ----------
    model, library, kind
        Who computed what.
    n
        Number of observations. Where it is below that of the plain pass, the time was scaled.
    passes, low, high
        Median, smallest and largest time of the repetitions, in plain passes over as many
        observations.
    mebibytes
        Peak memory above that of the plain pass.
    error
        Largest error of any entry, relative to the largest entry of its parameter, in double
        precision; None if there is no truth to compare with.
    scaled
        Whether the time was scaled.
    reason
        Why there is no answer.
    """

    model: str
    library: str
    kind: str
    n: int = 0
    passes: float = math.nan
    low: float = math.nan
    high: float = math.nan
    mebibytes: float = math.nan
    error: float | None = None
    scaled: bool = False
    reason: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether an answer that is no estimate differs from the truth."""
        estimate = self.kind in ("sketch", "sampled")
        return not estimate and self.error is not None and self.error > AGREEMENT


def rows(result: dict[str, Any]) -> list[Row]:
    """Return the cost of every contestant on every model.

    Parameters
    ----------
    result
        As :func:`fisher_cost` and :func:`load` return it.
    """
    return [
        _row(model, section, library, kind, entry)
        for model, section in _models(result).items()
        for library, kinds in section["contestants"].items()
        for kind, entry in kinds.items()
    ]


def _models(result: dict[str, Any]) -> dict[str, Entry]:
    return {name: found for name, found in result["sections"].items() if name != "linearity"}


def _row(model: str, section: Entry, library: str, kind: str, entry: Entry) -> Row:
    if "reason" in entry:
        return Row(model, library, kind, reason=entry["reason"])
    n, share = entry["n"], entry["n"] / section["n"]
    pairs = zip(entry["seconds"], entry["plain_seconds"], strict=True)
    passes = [seconds / (plain * share) for seconds, plain in pairs]
    above = (entry["peak_bytes"] - section["plain_peak_bytes"]) / 2**20
    spread = statistics.median(passes), min(passes), max(passes)
    return Row(model, library, kind, n, *spread, above, entry["error"], share < 1)


class Fit(NamedTuple):
    """A straight line through the medians of one kind over the number of observations.

    Parameters
    ----------
    kind
        Of the Fisher information, or ``"plain"``.
    slope, intercept
        Seconds for each observation, and seconds for none.
    r2
        Share of the variance that the line explains.
    mebibytes
        Largest peak memory above that of a plain pass over as many observations.
    """

    kind: str
    slope: float
    intercept: float
    r2: float
    mebibytes: float


def fits(result: dict[str, Any]) -> list[Fit]:
    """Fit the cost over the number of observations by least squares.

    Parameters
    ----------
    result
        As :func:`fisher_cost` and :func:`load` return it.
    """
    runs = result["sections"]["linearity"]["runs"]
    plain = {run["n"]: run["peak_bytes"] for run in runs if run["kind"] == "plain"}
    found = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        n, seconds = _medians(runs, kind)
        slope, intercept = (float(value) for value in np.polyfit(n, seconds, 1))
        r2 = float(np.corrcoef(n, seconds)[0, 1] ** 2)
        above = max(run["peak_bytes"] - plain[run["n"]] for run in runs if run["kind"] == kind)
        found.append(Fit(kind, slope, intercept, r2, above / 2**20))
    return found


def _medians(runs: list[Entry], kind: str) -> tuple[list[int], list[float]]:
    mine = [run for run in runs if run["kind"] == kind]
    return [run["n"] for run in mine], [statistics.median(run["seconds"]) for run in mine]


def table(result: dict[str, Any], value: str = "passes") -> str:
    """Return the result as text, one block for each model.

    A time is the median of the repetitions with the smallest and the largest, in plain passes.
    ``~`` marks times that were scaled from fewer observations, ``!`` wrong answers, and ``–``
    what is not possible, with the reason below.

    Parameters
    ----------
    result
        As :func:`fisher_cost` and :func:`load` return it.
    value
        ``"passes"`` for the time, ``"mebibytes"`` for peak memory above that of the plain pass,
        ``"error"`` for the error of the answer; see :class:`Row`.

    Raises
    ------
    ValueError
        If the value is another one.
    """
    if value not in ("passes", "mebibytes", "error"):
        raise ValueError(f"value must be 'passes', 'mebibytes' or 'error', got {value!r}")
    blocks = []
    for model, section in _models(result).items():
        mine = [row for row in rows(result) if row.model == model]
        blocks.append("\n".join(_block(section, mine, value)))
    return "\n\n".join(blocks)


def _block(section: Entry, mine: list[Row], value: str) -> Iterator[str]:
    entries = [entry for kinds in section["contestants"].values() for entry in kinds.values()]
    unit = statistics.median(t for entry in entries for t in entry.get("plain_seconds", ()))
    yield (
        f"{section['title']}: {section['parameters']:,} parameters, {section['n']:,} observations "
        f"in batches of {section['batch_size']}, {unit:.3g} s for a plain pass"
    )
    yield _line("", KINDS)
    cells = {(row.library, row.kind): _cell(row, value) for row in mine}
    for library in section["contestants"]:
        yield _line(library, [cells.get((library, kind), "") for kind in KINDS])
    reasons = dict.fromkeys(row.reason for row in mine if row.reason is not None)
    for reason in reasons:
        who = dict.fromkeys(row.library for row in mine if row.reason == reason)
        yield f"  – {', '.join(who)}: {reason}"


def _line(first: str, others: Iterable[str]) -> str:
    return (f"{first:<20}" + "".join(f"{other:>22}" for other in others)).rstrip()


def _cell(row: Row, value: str) -> str:
    if row.reason is not None:
        return "–"
    if value == "mebibytes":
        return f"{row.mebibytes:.0f}"
    if value == "error":
        return "unknown" if row.error is None else f"{row.error:.1g}"
    marks = "~" * row.scaled + "!" * row.wrong
    return f"{marks}{_digits(row.passes)} ({_digits(row.low)}–{_digits(row.high)})"


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"


MARKERS = {"plain": "x", "empirical": "o", "sketch": "D", "sampled": "^", "exact": "s"}


def figure(result: dict[str, Any]) -> Figure:
    """Draw the cost of all contestants, one panel for each model, and the cost over the size.

    Bars reach from the smallest to the largest repetition. Wrong answers are hollow.

    Parameters
    ----------
    result
        As :func:`fisher_cost` and :func:`load` return it.
    """
    plot.use_style()
    sections = result["sections"]
    height = math.ceil(len(sections) / 2)
    drawn, panels = plt.subplots(height, 2, figsize=(8, 3.3 * height), squeeze=False)
    for axes in panels.flat[len(sections) :]:
        axes.set_axis_off()
    for axes, (name, section) in zip(panels.flat, sections.items(), strict=False):
        axes.set_title(section["title"])
        if name == "linearity":
            _draw_linearity(axes, section["runs"])
        else:
            _draw_model(axes, [row for row in rows(result) if row.model == name])
    keys = [Line2D([], [], label=kind, linestyle="none", **_style(kind)) for kind in MARKERS]
    drawn.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return drawn


def _draw_model(axes: Axes, mine: list[Row]) -> None:
    measured = [row for row in mine if row.reason is None]
    places = {library: i for i, library in enumerate(dict.fromkeys(r.library for r in measured))}
    for shift, kind in enumerate(KINDS, start=1):
        for row in (row for row in measured if row.kind == kind):
            axes.errorbar(
                row.passes,
                places[row.library] + 0.15 * (shift - 2.5),
                xerr=[[row.passes - row.low], [row.high - row.passes]],
                linestyle="none",
                **_style(kind),
                markerfacecolor="none" if row.wrong else None,
            )
    axes.set(xscale="log", xlabel="plain passes", yticks=[*places.values()])
    axes.set_yticklabels(places)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _draw_linearity(axes: Axes, runs: list[Entry]) -> None:
    for kind in dict.fromkeys(run["kind"] for run in runs):
        axes.plot(*_medians(runs, kind), **_style(kind))
    axes.set(xscale="log", yscale="log", xlabel="observations", ylabel="seconds")


def _style(kind: str) -> dict[str, Any]:
    colour = f"C{list(MARKERS).index(kind)}"
    return {"color": colour, "marker": MARKERS[kind], "markersize": 5}
