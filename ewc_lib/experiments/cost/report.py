"""The measured cost of the Fisher information, as numbers and a figure."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

from ewc_lib.experiments.runs.folders import RESULTS
from ewc_lib.figures import use_style

__all__ = [
    "CUDA_RESULT",
    "OUT_OF_REACH",
    "RESULT",
    "Fit",
    "Measured",
    "figure",
    "fits",
    "load",
    "model_sections",
    "plain_seconds",
    "result_name",
    "rows",
    "with_later",
]

Entry: TypeAlias = dict[str, Any]

RESULT = RESULTS / "fisher_cost.json"
"""Where the book finds the numbers of a processor."""

CUDA_RESULT = RESULTS / "fisher_cost_cuda.json"
"""Where it finds those of a graphics card, if there are any."""

KINDS = ("empirical", "sketch", "sampled", "exact")

OUT_OF_REACH = "one backward pass for each token and class is out of reach"
"""The reason of an answer that nobody was asked for."""

AGREEMENT = 1e-5
"""Largest relative error of a right answer; sums in float32 come to 1e-7."""


def result_name(device: str) -> str:
    """Return the name of the file for a device.

    Examples
    --------
    >>> result_name("cpu"), result_name("cuda")
    ('fisher_cost.json', 'fisher_cost_cuda.json')
    """
    return RESULT.name if device == "cpu" else CUDA_RESULT.name


def load(path: Path = RESULT) -> dict[str, Any]:
    """Read a result that :func:`.fisher_cost` wrote."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


class Measured(NamedTuple):
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


def with_later(result: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return a result with what was measured once more in the place of what it had.

    Parameters
    ----------
    result, later
        As :func:`.fisher_cost` and :func:`load` return them. The later one has the same number of
        observations of each of its models, and some of the contestants.

    Raises
    ------
    ValueError
        If another number of observations was measured.
    """
    sections = dict(result["sections"])
    for model, section in model_sections(later).items():
        old = sections[model]
        if section["n"] != old["n"]:
            raise ValueError(
                f"{model} was measured on {old['n']}, then {section['n']} observations"
            )
        found = {name: {**kinds} for name, kinds in old["contestants"].items()}
        for library, kinds in section["contestants"].items():
            found[library] |= kinds
        sections[model] = {**old, "contestants": found}
    return {**result, "sections": sections}


def rows(result: dict[str, Any]) -> list[Measured]:
    """Return the cost of every contestant on every model.

    Parameters
    ----------
    result
        As :func:`.fisher_cost` and :func:`load` return it.
    """
    return [
        _row(model, section, library, kind, entry)
        for model, section in model_sections(result).items()
        for library, kinds in section["contestants"].items()
        for kind, entry in kinds.items()
    ]


def model_sections(result: dict[str, Any]) -> dict[str, Entry]:
    """Return the sections that compare contestants on a model."""
    return {name: found for name, found in result["sections"].items() if name != "linearity"}


def _row(model: str, section: Entry, library: str, kind: str, entry: Entry) -> Measured:
    if "reason" in entry:
        return Measured(model, library, kind, reason=entry["reason"])
    n, share = entry["n"], entry["n"] / section["n"]
    pairs = zip(entry["seconds"], entry["plain_seconds"], strict=True)
    passes = [seconds / (plain * share) for seconds, plain in pairs]
    above = (entry["peak_bytes"] - section["plain_peak_bytes"]) / 2**20
    spread = statistics.median(passes), min(passes), max(passes)
    return Measured(model, library, kind, n, *spread, above, entry["error"], share < 1)


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
        As :func:`.fisher_cost` and :func:`load` return it.
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


def plain_seconds(section: Entry) -> float:
    """Return the median time of the plain passes of one section."""
    entries = [entry for kinds in section["contestants"].values() for entry in kinds.values()]
    seconds: list[float] = [t for entry in entries for t in entry.get("plain_seconds", ())]
    return statistics.median(seconds)


MARKERS = {"plain": "x", "empirical": "o", "sketch": "D", "sampled": "^", "exact": "s"}


def figure(result: dict[str, Any]) -> Figure:
    """Draw the cost of all contestants, one panel for each model, and the cost over the size.

    Bars reach from the smallest to the largest repetition. Wrong answers are hollow.

    Parameters
    ----------
    result
        As :func:`.fisher_cost` and :func:`load` return it.
    """
    use_style()
    sections = result["sections"]
    height = math.ceil(len(sections) / 2)
    drawn, panels = plt.subplots(height, 2, figsize=(7, 3.3 * height), squeeze=False)
    drawn.set_layout_engine("constrained", h_pad=0.12)  # a title is that of the panel below it
    for axes in panels.flat[len(sections) :]:
        axes.set_axis_off()
    for axes, (name, section) in zip(panels.flat, sections.items(), strict=False):
        axes.set_title(section["title"])
        if name == "linearity":
            _draw_linearity(axes, section["runs"])
        else:
            _draw_model(axes, [row for row in rows(result) if row.model == name])
    keys = [Line2D([], [], label=kind, linestyle="none", **_style(kind)) for kind in MARKERS]
    panels.flat[len(sections) - 1].legend(handles=keys, loc="upper left")
    return drawn


def _draw_model(axes: Axes, mine: list[Measured]) -> None:
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
    _number(axes)
    axes.set_yticklabels(places)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _number(axes: Axes) -> None:
    """Write plain numbers on a logarithmic axis, as many as there is room for."""
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 5.5)
    digits = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-2, 5) for digit in digits]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_linearity(axes: Axes, runs: list[Entry]) -> None:
    for kind in dict.fromkeys(run["kind"] for run in runs):
        axes.plot(*_medians(runs, kind), **_style(kind))
    axes.set(xscale="log", yscale="log", xlabel="observations", ylabel="seconds")
    axes.set_ylim(top=30 * axes.get_ylim()[1])  # room for the legend


def _style(kind: str) -> dict[str, Any]:
    colour = f"C{list(MARKERS).index(kind)}"
    return {"color": colour, "marker": MARKERS[kind], "markersize": 5}
