"""The results of experiments on streams as rows: means over seeds, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scipy.special import stdtrit

from ewc_lib.experiments.runs.published import Published, published

__all__ = ["Comparison", "Row", "beside", "interval", "rows", "table"]

NEAR = 2.0
"""Points of percent: a comparison that could miss a larger difference decides nothing."""

POWER = 0.8
"""With which probability a difference has to be seen to count as visible."""

OUTCOMES = frozenset(
    {
        "a",
        "accuracy",
        "average",
        "b",
        "before",
        "corrected",
        "corrected_valid",
        "curve",
        "diverged",
        "final",
        "forgetting",
        "learning",
        "mean",
        "seconds",
        "seconds_consolidation",
        "seconds_training",
        "seed",
        "sitting",
        "transfer",
        "valid",
        "worst",
    }
)
"""What does not tell a row from others."""


class Row(NamedTuple):
    """All seeds of one row of settings.

    Parameters
    ----------
    settings
        What the runs share, without the seed.
    accuracies
        Average accuracy over all tasks after the last one, for each seed, in their order; runs
        that diverged, without a finite accuracy, are left out.
    diverged
        Number of the runs that diverged.
    seconds_training, seconds_consolidation
        Medians over runs.
    seeds
        Those of the accuracies.
    """

    settings: dict[str, Any]
    accuracies: list[float]
    diverged: int
    seconds_training: float
    seconds_consolidation: float
    seeds: tuple[int, ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        """Accuracies by seed; a ValueError if each has not one of its own."""
        if len({*self.seeds}) != len(self.accuracies):
            raise ValueError(f"{len(self.accuracies)} accuracies of the seeds {self.seeds}")
        return dict(zip(self.seeds, self.accuracies, strict=True))

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.accuracies) if self.accuracies else math.nan

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the mean."""
        return interval(self.accuracies)


def interval(values: list[float], confidence: float = 0.95) -> float:
    """Return half the width of the confidence interval of a mean (Student's t).

    It is NaN for fewer than two values.

    Examples
    --------
    >>> round(interval([0.9, 1.0, 1.1]), 3)
    0.248
    """
    if len(values) < 2:
        return math.nan
    return float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * _standard_error(values)


def rows(runs: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Row]:
    """Group runs by their settings, in the order of their first appearance.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    **wanted
        Settings that the runs must have, as ``scenario="task"``.

    Raises
    ------
    ValueError
        If runs of the same settings have the same seed.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        settings = {key: value for key, value in run.items() if key not in OUTCOMES}
        if all(settings.get(key) == value for key, value in wanted.items()):
            groups.setdefault(tuple(settings.items()), []).append(run)
    return [_row(dict(settings), group) for settings, group in groups.items()]


def _row(settings: dict[str, Any], group: list[Mapping[str, Any]]) -> Row:
    in_order = sorted(group, key=lambda run: run["seed"])
    seeds = [run["seed"] for run in in_order]
    if len({*seeds}) < len(seeds):
        raise ValueError(f"the same seed twice, {seeds}, at {_label(settings)}")
    key = "accuracy" if "accuracy" in in_order[0] else "mean"  # of all tasks, or of two
    sound = [r for r in in_order if r[key] is not None and math.isfinite(r[key])]

    def median(name: str) -> float:
        values = [run[name] for run in sound if name in run]
        return statistics.median(values) if values else math.nan

    return Row(
        settings,
        [run[key] for run in sound],
        len(group) - len(sound),
        median("seconds_training"),
        median("seconds_consolidation"),
        tuple(run["seed"] for run in sound),
    )


class Comparison(NamedTuple):
    """A row of ours and what others have published for it.

    Parameters
    ----------
    label
        What tables call the row.
    row
        Ours.
    published
        Theirs, in percent; None if there is none.
    """

    label: str
    row: Row
    published: Published | None

    @property
    def difference(self) -> float:
        """Ours minus theirs, in points of percent; NaN if there is none."""
        return math.nan if self.published is None else 100 * self.row.mean - self.published.value

    @property
    def error(self) -> float:
        """Standard error of the difference: of both means, or of ours if theirs is unknown."""
        theirs = 0.0 if self.published is None else self.published.error or 0.0
        return math.hypot(100 * _standard_error(self.row.accuracies), theirs)

    @property
    def visible(self) -> float:
        """The difference that would be seen with a probability of 80 %, in points of percent."""
        return (self._quantile(0.975) + self._quantile(POWER)) * self.error

    @property
    def verdict(self) -> str:
        """``"differs"``, ``"agrees"``, ``"undecided"``, or nothing where there is nothing to tell.

        Numbers differ if their difference is beyond its 95 % interval. They agree if it is not,
        though one of two points would have been visible. Else there are too few seeds.
        """
        if math.isnan(self.difference) or math.isnan(self.error):
            return ""
        if abs(self.difference) > self._quantile(0.975) * self.error:
            return "differs"
        return "agrees" if self.visible <= NEAR else "undecided"

    def _quantile(self, share: float) -> float:
        """Student's, with the degrees of freedom of our seeds: theirs are more."""
        return float(stdtrit(max(1, len(self.row.accuracies) - 1), share))


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def beside(found: Iterable[Row], experiment: str, label: str) -> list[Comparison]:
    """Put published numbers beside rows.

    Parameters
    ----------
    found
        As :func:`ewc_lib.experiments.runs.report.rows` returns them.
    experiment
        The name under which the numbers are published (:mod:`ewc_lib.experiments.runs.published`).
    label
        The name of a row, with its settings in braces, as ``"{scenario} {method}"``.

    Examples
    --------
    >>> ours = Row({"variant": "exact"}, [0.99, 0.992], 0, 60.0, 1.0)
    >>> (found,) = beside([ours], "fisher-variants", "{variant}")
    >>> found.published.value, round(found.difference, 2), round(found.error, 2)
    (99.12, -0.02, 0.19)
    """
    labels = ((row, label.format(**row.settings)) for row in found)
    return [Comparison(name, row, published(experiment, name)) for row, name in labels]


def table(result: Mapping[str, Any]) -> str:
    """Return all rows of a result as text, accuracies in percent."""
    lines = [f"{result['experiment']} on {result['data']}, {len(result['runs'])} runs"]
    if result["data"] != "mnist":
        lines.append("A demonstration on small images: no number of it is comparable with others'.")
    found = rows(result["runs"])
    labels = [_label(row.settings) for row in found]
    width = max(map(len, labels), default=0)
    for label, row in zip(labels, found, strict=True):
        n = len(row.accuracies)
        width_of = f" ± {100 * row.half_width:.2f}" if n > 1 else ""
        diverged = f", {row.diverged} diverged" if row.diverged else ""
        seeds = f"{n} seed{'s' * (n != 1)}{diverged}"
        lines.append(f"{label:<{width}}  {100 * row.mean:6.2f}{width_of}  ({seeds})")
    return "\n".join(lines)


def _label(settings: Mapping[str, Any]) -> str:
    """Write settings in a few words: names as they are, numbers with what they mean."""
    said = {k: value for k, value in settings.items() if value is not None and value is not False}
    return " ".join(_word(key, value) for key, value in said.items())


def _word(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return key if value is True else f"{key} {value:g}"
