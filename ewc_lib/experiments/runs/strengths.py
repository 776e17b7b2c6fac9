r"""The search for a strength: a grid of :math:`\lambda`, and where it does not matter.

A strength is an exchange rate between tasks, and nobody knows it beforehand. What can be known
is how much its choice matters: the *plateau* is the range of strengths whose result is as good as
the best, up to a tolerance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from ewc_lib.experiments.runs.store import Run, run_all

__all__ = [
    "Point",
    "best",
    "decades",
    "draw",
    "plateau",
    "points",
    "sweep",
]


class Point(NamedTuple):
    r"""What one strength gives, over seeds.

    Parameters
    ----------
    strength
        :math:`\lambda`.
    mean
        Mean of the results over seeds; NaN if none of them is finite.
    error
        Standard error of that mean; NaN for a single seed.
    n
        Number of finite results.
    failed
        Share of the seeds whose result is not finite: runs that diverged.
    """

    strength: float
    mean: float
    error: float
    n: int
    failed: float


def decades(low: int, high: int, step: int = 1) -> list[float]:
    """Return powers of ten.

    Examples
    --------
    >>> decades(-1, 3, step=2)
    [0.1, 10.0, 1000.0]
    """
    return [float(f"1e{exponent}") for exponent in range(low, high + 1, step)]


def sweep(
    function: Callable[[float, int], float],
    strengths: Iterable[float],
    seeds: Iterable[int],
    *,
    path: Path | str,
    name: str = "sweep",
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: bool | None = None,
) -> list[Point]:
    """Evaluate a function on a grid of strengths and seeds, and keep every result.

    Parameters
    ----------
    function
        Takes a strength and a seed and returns what counts, for example the average accuracy
        after the last task. NaN says that training diverged.
    strengths
        The grid, usually :func:`decades` at first and then a finer one around the best: a decade
        may cost points of accuracy.
    seeds
        The seeds. All strengths of the first come first, so a stopped sweep has whole curves.
    path
        The file that keeps the results. The same call goes on where it was stopped.
    name
        Of the sweep, in the file.
    settings
        Everything else on which the result depends; a file of other settings is refused.
    workers
        Processes, each with one thread.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    list of Point
        In the order of the strengths.

    Raises
    ------
    ValueError
        If the file holds results of another sweep.
    RuntimeError
        If the function raised an exception; all other results are kept.

    Examples
    --------
    >>> import math, tempfile
    >>> def accuracy(strength, seed):  # in earnest: train on a few tasks, return the accuracy
    ...     return 0.9 - 0.01 * (math.log10(strength) - 2) ** 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = sweep(accuracy, decades(0, 5), seeds=[0, 1], path=f"{folder}/sweep.json")
    >>> plateau(found, tolerance=0.011)
    (10.0, 1000.0)
    """
    runs = [{"strength": s, "seed": seed} for seed, s in product(list(seeds), list(strengths))]
    result = run_all(
        Path(path),
        partial(_evaluate, function),
        runs,
        experiment=name,
        data="",
        protocol=settings or {},
        workers=workers,
        progress=progress,
    )
    return points(result["runs"], "value")


def _evaluate(function: Callable[[float, int], float], run: Run) -> dict[str, float]:
    return {"value": function(run["strength"], run["seed"])}


def points(runs: Iterable[Mapping[str, Any]], value: str) -> list[Point]:
    """Average over seeds, for each strength.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them, each with a ``"strength"``.
    value
        The name of the outcome; None where training diverged.
    """
    groups: dict[float, list[float | None]] = {}
    for run in runs:
        groups.setdefault(run["strength"], []).append(run[value])
    return [_point(strength, groups[strength]) for strength in sorted(groups)]


def _point(strength: float, values: Sequence[float | None]) -> Point:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    mean = statistics.mean(finite) if finite else math.nan
    spread = statistics.stdev(finite) if len(finite) > 1 else math.nan
    error = spread / math.sqrt(max(1, len(finite)))
    return Point(strength, mean, error, len(finite), 1 - len(finite) / len(values))


def best(found: Iterable[Point]) -> Point:
    """Return the point with the highest mean among those where no run diverged.

    Raises
    ------
    ValueError
        If some run diverged at every strength.
    """
    sound = [point for point in found if not point.failed]
    if not sound:
        raise ValueError("some run diverged at every strength")
    return max(sound, key=lambda point: point.mean)


def plateau(found: Sequence[Point], tolerance: float = 0.01) -> tuple[float, float]:
    """Return the smallest and the largest strength that are as good as the best.

    Parameters
    ----------
    found
        As :func:`sweep` returns them, in the order of the strengths.
    tolerance
        How much worse than the best still counts; by default a hundredth. The range reaches from
        the best strength to both sides as long as every point on the way is within it.

    Raises
    ------
    ValueError
        If some run diverged at every strength.
    """
    top = best(found)
    good = [not point.failed and point.mean >= top.mean - tolerance for point in found]
    low = high = list(found).index(top)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(good) and good[high + 1]:
        high += 1
    return found[low].strength, found[high].strength


def draw(
    axes: Axes,
    found: Sequence[Point],
    *,
    label: str | None = None,
    tolerance: float = 0.01,
    bayesian: float | None = None,
    **style: Any,
) -> None:
    """Draw the results over the strength, and the plateau as a thick line.

    Parameters
    ----------
    axes
        Where to draw.
    found
        As :func:`sweep` returns them.
    label
        Of the curve.
    tolerance
        Of the plateau.
    bayesian
        The strength that Bayes' rule implies (:meth:`ewc_lib.EWC.bayesian_strength`), marked by a
        dotted line.
    **style
        Of the curve, as in ``Axes.plot``.
    """
    x, y, errors, *_ = zip(*found, strict=True)
    curve = axes.errorbar(x, y, yerr=errors, label=label, capsize=2, marker="o", ms=3, **style)
    low, high = plateau(found, tolerance)
    flat = [point for point in found if low <= point.strength <= high]
    axes.plot(
        [point.strength for point in flat],
        [point.mean for point in flat],
        color=curve.lines[0].get_color(),
        linewidth=4,
        alpha=0.4,
    )
    if bayesian is not None:
        axes.axvline(bayesian, linestyle=":", color="0.5")
    axes.set(xscale="log", xlabel="strength λ")
