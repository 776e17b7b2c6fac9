"""The search for the settings of a method: the same for all, on validation data.

A *knob* is a setting that is searched, such as a strength or a learning rate. Every method has as
many runs for its search as the others, however many knobs it has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ewc_lib._arguments import is_number

__all__ = ["Choice", "choose", "propose"]

Run = Mapping[str, Any]
Knobs = Mapping[str, Sequence[float]]
Place = tuple[Any, ...]


class Choice(NamedTuple):
    """The settings that did best.

    Parameters
    ----------
    settings
        Values of the knobs.
    value
        The mean over seeds at these.
    at_edge
        The knobs whose value is the smallest or the largest number that was tried: something
        better may lie beyond; of a tuple of numbers, any one of them. Other values have no edge.
    """

    settings: dict[str, Any]
    value: float
    at_edge: tuple[str, ...]


def choose(runs: Iterable[Run], knobs: Iterable[str], by: str = "valid") -> Choice:
    """Return the best settings of one method.

    Parameters
    ----------
    runs
        Of one method, as :func:`.run_all` keeps them; with the same seeds at all settings, if
        they have seeds.
    knobs
        The settings to choose, numbers or words.
    by
        The outcome that counts, more being better; it has to be of validation data. Settings at
        which it is None or not finite for some seed, since training diverged, are not chosen.

    Raises
    ------
    ValueError
        If there is no run, if some run diverged at all settings, if settings have other seeds
        than others have, or a seed twice.

    Examples
    --------
    >>> runs = [{"strength": s, "valid": v} for s, v in [(1.0, 0.5), (10.0, 0.8), (100.0, 0.7)]]
    >>> choose(runs, ["strength"])
    Choice(settings={'strength': 10.0}, value=0.8, at_edge=())
    """
    runs, names = list(runs), list(knobs)
    _check_seeds(runs, names)
    return _best(_means(runs, names, by), names)


def _best(means: Mapping[Place, float], names: list[str]) -> Choice:
    sound = {place: mean for place, mean in means.items() if not math.isnan(mean)}
    if not sound:
        raise ValueError(f"there are no settings of {', '.join(names)} at which all runs are sound")
    top = max(sound, key=lambda place: sound[place])
    columns = zip(names, zip(*means, strict=True), top, strict=True)
    edges = tuple(name for name, tried, at in columns if _is_edge(at, tried))
    return Choice(dict(zip(names, top, strict=True)), sound[top], edges)


def _is_edge(at: Any, tried: Sequence[Any]) -> bool:
    if isinstance(at, tuple):  # of several numbers, any one
        return any(map(_is_edge, at, zip(*tried, strict=True)))
    is_between = not all(map(is_number, tried)) or min(tried) < at < max(tried)
    return len({*tried}) > 1 and not is_between


def _check_seeds(runs: Sequence[Run], names: list[str]) -> None:
    """Raise a ValueError unless all settings have the same seeds, each once."""
    seeds: dict[Place, list[Any]] = {}
    for run in runs:
        if "seed" in run:
            seeds.setdefault(tuple(run[name] for name in names), []).append(run["seed"])
    for place, own in seeds.items():
        first = next(iter(seeds.values()))
        if len({*own}) < len(own) or {*own} != {*first}:
            at = ", ".join(f"{name} {value}" for name, value in zip(names, place, strict=True))
            raise ValueError(
                f"means over other seeds cannot be compared: there are {sorted(own)} at {at}, and "
                f"{sorted(first)} elsewhere; give the runs of one method, each once"
            )


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

    Raises
    ------
    ValueError
        If the starting values are not as they have to be, or a run has another value of a knob
        than a positive number.

    Examples
    --------
    >>> knobs = {"rate": [0.01, 0.1, 1.0]}
    >>> propose([], knobs, budget=5)
    [{'rate': 0.01}, {'rate': 0.1}, {'rate': 1.0}]
    >>> runs = [{"rate": r, "valid": -abs(r - 2)} for r in (0.01, 0.1, 1.0)]
    >>> propose(runs, knobs, budget=5)  # the best is at the edge
    [{'rate': 10.0}]
    """
    names = list(knobs)
    tried = _means(runs, names, by)
    _check_knobs(knobs, tried)
    room = budget - len(tried)
    if room <= 0:
        return []
    if all(math.isnan(mean) for mean in tried.values()):
        best = {name: values[len(values) // 2] for name, values in knobs.items()}
    else:
        best = _best(tried, names).settings
    for i, name in enumerate(names):
        seen = {place[i] for place in tried}
        if new := [{**best, name: value} for value in knobs[name] if value not in seen]:
            return new[:room]
    found = sorted((_around(name, tried, knobs, best) for name in names), key=lambda pair: -pair[0])
    for _, places in found:
        if fresh := [place for place in places if tuple(place.values()) not in tried]:
            return fresh[:room]
    return []


def _check_knobs(knobs: Knobs, tried: Iterable[Place]) -> None:
    for name, values in knobs.items():
        rises = all(map(_is_positive, values)) and sorted({*values}) == list(values)
        if not rises or len(values) < 2:
            raise ValueError(
                f"{name} needs two starting values or more, positive numbers that rise, "
                f"got {list(values)}"
            )
    for name, *column in zip(knobs, *tried, strict=True):
        if bad := [value for value in column if not _is_positive(value)]:
            raise ValueError(
                f"a search goes by the logarithms of {name}, got runs at {bad[0]!r}: leave them out"
            )


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < float(value) < math.inf


def _around(
    name: str, tried: Iterable[Place], knobs: Knobs, best: dict[str, float]
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


def _means(runs: Iterable[Run], names: list[str], by: str) -> dict[Place, float]:
    """Average over seeds for each setting, NaN where some run diverged."""
    groups: dict[Place, list[float]] = {}
    for run in runs:
        value = math.nan if run[by] is None else float(run[by])
        groups.setdefault(tuple(run[name] for name in names), []).append(value)
    return {place: _mean(values) for place, values in groups.items()}


def _mean(values: list[float]) -> float:
    return statistics.mean(values) if all(map(math.isfinite, values)) else math.nan
