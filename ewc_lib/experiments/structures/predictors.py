r"""How well a number ranks networks by what they have forgotten: Kendall's :math:`\tau_b`.

.. math:: \tau_b = \frac{C - D}{\sqrt{(N - N_x)(N - N_y)}}

Of the :math:`N` pairs of networks, :math:`C` are concordant, the one with the larger number has
forgotten more, and :math:`D` are discordant; :math:`N_x` are tied in the number, :math:`N_y` in
what is forgotten. Ranks do not ask for a straight line, so that nats, squared lengths and
accuracies can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import kendalltau

from ewc_lib.experiments.runs.paired import Paired, paired
from ewc_lib.experiments.runs.report import interval

__all__ = ["PREDICTORS", "Ranking", "gap", "ranking"]

PREDICTORS = ("distance", "diagonal", "kronecker", "whole", "razor", "reverse")
r"""What may tell how much is forgotten, by the names of :func:`.beyond_diagonal.flat`.

The squared distance; half the quadratic form of three structures; and what Shenfeld, Pari and
Agrawal (2025) propose, the divergence on inputs of the *new* task, in both directions.
"""

Group = tuple[Any, ...]


class Ranking(NamedTuple):
    r"""How well a predictor ranks, over seeds.

    Parameters
    ----------
    value
        The mean over seeds of :math:`\tau_b`; of two networks the predictor names the one
        that has forgotten more with probability :math:`(1 + \tau_b)/2`, if there are no ties.
    half_width
        Half of the 95 % confidence interval of that mean (Student's t).
    n
        Number of seeds.
    """

    value: float
    half_width: float
    n: int


def ranking(
    runs: Iterable[Mapping[str, Any]],
    predictor: str,
    outcome: str,
    *,
    within: Sequence[str] = (),
) -> Ranking:
    r"""Return the rank correlation of a predictor with an outcome.

    Parameters
    ----------
    runs
        As :func:`.beyond_diagonal.flat` returns them; those that diverged do not count.
    predictor, outcome
        Names of numbers in them.
    within
        Settings that a pair of networks has to share, besides the seed, as ``["method"]``. Of the
        correlations within one seed the mean counts.

    Raises
    ------
    ValueError
        If fewer than two seeds have a correlation.

    Examples
    --------
    >>> runs = [{"seed": s, "x": x, "y": x**2} for s in range(3) for x in range(5)]
    >>> round(ranking(runs, "x", "y").value, 3)
    1.0
    """
    values = _of_seeds(runs, predictor, outcome, within)
    return Ranking(statistics.mean(values), interval(values), len(values))


def gap(
    runs: Sequence[Mapping[str, Any]],
    one: str,
    other: str,
    outcome: str,
    *,
    within: Sequence[str] = (),
) -> Paired:
    """Return the difference of the rank correlations of two predictors, seed by seed.

    Parameters
    ----------
    runs, outcome, within
        As for :func:`ranking`.
    one, other
        Predictors; the difference is that of the first minus the second.

    Raises
    ------
    ValueError
        As :func:`ranking`.
    """
    return paired(*(_of_seeds(runs, name, outcome, within) for name in (one, other)))


def _of_seeds(
    runs: Iterable[Mapping[str, Any]], predictor: str, outcome: str, within: Sequence[str]
) -> list[float]:
    """Return the correlation of each seed, in their order."""
    groups: dict[Group, list[tuple[float, float]]] = {}
    for run in runs:
        if run[predictor] is not None and run[outcome] is not None:
            place = run["seed"], *(run[name] for name in within)
            groups.setdefault(place, []).append((run[predictor], run[outcome]))
    by_seed: dict[int, list[float]] = {}
    for (seed, *_), points in sorted(groups.items()):
        predicted, seen = ({*column} for column in zip(*points, strict=True))
        if len(predicted) > 1 and len(seen) > 1:
            value = float(kendalltau(*zip(*points, strict=True)).statistic)
            by_seed.setdefault(seed, []).append(value)
    if len(by_seed) < 2:
        raise ValueError(f"at least two seeds with a correlation are needed, got {len(by_seed)}")
    return [statistics.mean(values) for values in by_seed.values()]
