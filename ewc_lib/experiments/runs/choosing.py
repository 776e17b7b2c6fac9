"""The search for the settings of a method: the same for all, on validation data.

A *knob* is a setting that is searched, such as a strength or a learning rate. Every method has as
many runs for its search as the others, however many knobs it has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Choice", "choose", "propose"]

Run = Mapping[str, Any]
Knobs = Mapping[str, Sequence[float]]


class Choice(NamedTuple):
    """The settings that did best.

    Parameters
    ----------
    settings
        Values of the knobs.
    value
        The mean over seeds at these.
    at_edge
        The knobs whose value is the smallest or the largest that was tried: something better may
        lie beyond.
    """

    settings: dict[str, float]
    value: float
    at_edge: tuple[str, ...]


def choose(runs: Iterable[Run], knobs: Iterable[str], by: str = "valid") -> Choice:
    """Return the best settings of one method.

    Parameters
    ----------
    runs
        Of one method, as :func:`.run_all` keeps them.
    knobs
        The settings to choose.
    by
        The outcome that counts, more being better; it has to be of validation data. Settings at
        which it is None or not finite for some seed, since training diverged, are not chosen.

    Raises
    ------
    ValueError
        If there is no run, or some run diverged at all settings.

    Examples
    --------
    >>> runs = [{"strength": s, "valid": v} for s, v in [(1.0, 0.5), (10.0, 0.8), (100.0, 0.7)]]
    >>> choose(runs, ["strength"])
    Choice(settings={'strength': 10.0}, value=0.8, at_edge=())
    """
    names = list(knobs)
    means = _means(runs, names, by)
    sound = {place: mean for place, mean in means.items() if not math.isnan(mean)}
    if not sound:
        raise ValueError(f"there are no settings of {', '.join(names)} at which all runs are sound")
    top = max(sound, key=lambda place: sound[place])
    columns = zip(names, zip(*means, strict=True), top, strict=True)
    edges = [n for n, tried, at in columns if len({*tried}) > 1 and at in (min(tried), max(tried))]
    return Choice(dict(zip(names, top, strict=True)), sound[top], tuple(edges))


def propose(
    runs: Sequence[Run], knobs: Knobs, budget: int, by: str = "valid"
) -> list[dict[str, float]]:
    """Return the settings to try next; nothing if as many as the budget were tried.

    First come all starting values of the first knob, then those of each further one, with the
    others at their best so far (in the beginning in the middle of theirs). Then comes what lies
    beyond the edge if the best is there, else the knob whose neighbours of the best are farthest
    apart, half way to them. Distances are those of logarithms.

    Parameters
    ----------
    runs
        The search of one method so far.
    knobs
        Starting values of each knob, positive and rising, at least two.
    budget
        Different settings to try in all.
    by
        As for :func:`choose`.

    Examples
    --------
    >>> knobs = {"rate": [0.01, 0.1, 1.0]}
    >>> propose([], knobs, budget=5)
    [{'rate': 0.01}, {'rate': 0.1}, {'rate': 1.0}]
    >>> runs = [{"rate": r, "valid": -abs(r - 2)} for r in (0.01, 0.1, 1.0)]
    >>> propose(runs, knobs, budget=5)  # the best is at the edge
    [{'rate': 10.0}]
    """
    tried = _means(runs, list(knobs), by)
    room = budget - len(tried)
    if room <= 0:
        return []
    if all(math.isnan(mean) for mean in tried.values()):
        best = {name: values[len(values) // 2] for name, values in knobs.items()}
    else:
        best = choose(runs, knobs, by).settings
    names = list(knobs)
    for i, name in enumerate(names):
        seen = {place[i] for place in tried}
        if new := [{**best, name: value} for value in knobs[name] if value not in seen]:
            return new[:room]
    found = sorted((_around(name, tried, knobs, best) for name in names), key=lambda pair: -pair[0])
    for _, places in found:
        if fresh := [place for place in places if tuple(place.values()) not in tried]:
            return fresh[:room]
    return []


def _around(
    name: str, tried: Iterable[tuple[float, ...]], knobs: Knobs, best: dict[str, float]
) -> tuple[float, list[dict[str, float]]]:
    """Return how far the neighbours of the best are along a knob, and what to try there."""
    places = (dict(zip(knobs, place, strict=True)) for place in tried)
    line = {place[name] for place in places if {**place, name: best[name]} == best}
    line |= {best[name]}
    below = max((value for value in line if value < best[name]), default=None)
    above = min((value for value in line if value > best[name]), default=None)
    ratio = knobs[name][1] / knobs[name][0]
    if below is None or above is None:
        beyond = [best[name] / (above / best[name] if above else ratio)] if below is None else []
        beyond += [best[name] * (best[name] / below if below else ratio)] if above is None else []
        return math.inf, [{**best, name: _rounded(value)} for value in beyond]
    inside = [math.sqrt(best[name] * value) for value in (below, above)]
    return math.log(above / below), [{**best, name: _rounded(value)} for value in inside]


def _rounded(value: float) -> float:
    """Two digits are enough, and the same on every machine."""
    return float(f"{value:.1e}")


def _means(runs: Iterable[Run], names: list[str], by: str) -> dict[tuple[float, ...], float]:
    """Average over seeds for each setting, NaN where some run diverged."""
    groups: dict[tuple[float, ...], list[float]] = {}
    for run in runs:
        value = math.nan if run[by] is None else float(run[by])
        groups.setdefault(tuple(run[name] for name in names), []).append(value)
    return {place: _mean(values) for place, values in groups.items()}


def _mean(values: list[float]) -> float:
    return statistics.mean(values) if all(map(math.isfinite, values)) else math.nan
