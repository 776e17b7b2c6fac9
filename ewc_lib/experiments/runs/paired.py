"""Differences between two methods, seed by seed.

Seeds share their tasks, their initial weights and the order of their data, so most of what makes
one run better than another is the same for both methods, and drops out of the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import permutation_test

from ewc_lib.experiments.runs.report import Row, interval

__all__ = ["Paired", "paired"]

EXACT = 2**16
"""Sign flips that are all tried; beyond them as many are drawn at random."""


class Paired(NamedTuple):
    """The difference between two methods over the same seeds.

    Parameters
    ----------
    n
        Number of seeds that both have.
    difference
        Mean of the first minus the second.
    half_width
        Half of the 95 % confidence interval of that mean (Student's t).
    p
        Of the two-sided sign-flip test: the share of all ways to exchange the two methods within
        seeds whose mean difference is at least as far from zero. With *n* seeds it is
        :math:`2^{1-n}` at least: five seeds cannot go below 0.0625.
    """

    n: int
    difference: float
    half_width: float
    p: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.difference - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.difference + self.half_width

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.difference) > self.half_width


def paired(
    one: Row | Mapping[int, float] | Sequence[float],
    other: Row | Mapping[int, float] | Sequence[float],
) -> Paired:
    """Compare two methods seed by seed.

    Parameters
    ----------
    one, other
        Rows, or values by seed, or values in one order of seeds. Only seeds that both have count:
        a run that diverged takes its partner out, so say how many did.

    Raises
    ------
    ValueError
        If fewer than two seeds are in both, if sequences differ in length or meet values by seed,
        or if a value is not finite.

    Examples
    --------
    >>> found = paired([0.9, 0.8, 0.95, 0.9, 0.85, 0.9], [0.8, 0.75, 0.9, 0.8, 0.8, 0.85])
    >>> round(found.difference, 3), round(found.half_width, 3), found.p
    (0.067, 0.027, 0.03125)
    """
    first, second = _by_seed(one), _by_seed(other)
    named = [isinstance(values, Row | Mapping) for values in (one, other)]
    if not all(named) and (any(named) or len(first) != len(second)):
        raise ValueError(f"got {len(first)} and {len(second)} values; give them by seed")
    if not all(math.isfinite(value) for value in (*first.values(), *second.values())):
        raise ValueError("some values are not finite; leave those seeds out, and say so")
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        raise ValueError(f"at least two seeds in both are needed, got {len(seeds)}")
    a, b = ([values[seed] for seed in seeds] for values in (first, second))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.mean(differences)
    return Paired(len(seeds), mean, interval(differences), _p(differences))


def _p(differences: Sequence[float]) -> float:
    """Return that of all sign flips, or of many at random."""
    found = permutation_test(
        (np.asarray(differences),),
        lambda x, axis: np.abs(x.sum(axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=EXACT,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _by_seed(values: Row | Mapping[int, float] | Sequence[float]) -> Mapping[int, float]:
    if isinstance(values, Row):
        return values.by_seed
    if isinstance(values, Mapping):
        return values
    return {seed: float(value) for seed, value in enumerate(values)}
