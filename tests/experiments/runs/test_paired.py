"""Differences seed by seed, against all ways to exchange two methods, one by one."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from ewc_lib.experiments.runs.paired import paired
from ewc_lib.experiments.runs.report import Row

values = st.lists(st.integers(-50, 50), min_size=2, max_size=8)


@given(values)
def test_p_is_the_share_of_exchanges_that_are_as_far_from_zero(differences):
    flips = list(product([-1, 1], repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    as_far = sum(found >= abs(sum(differences)) for found in sums)
    found = paired(differences, [0.0] * len(differences))
    assert found.p == pytest.approx(as_far / len(flips))


def test_the_interval_is_that_of_the_paired_t_test():
    one, other = [0.91, 0.85, 0.97, 0.9], [0.8, 0.83, 0.9, 0.91]
    theirs = ttest_rel(one, other).confidence_interval(0.95)
    found = paired(one, other)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert not found.is_clear
    assert paired(other, one).difference == -found.difference


def test_what_seeds_share_drops_out():
    luck = [0.0, 0.3, -0.2, 0.1, 0.25, -0.3]
    better = [0.8 + x + d for x, d in zip(luck, [0.01, 0.012, 0.009] * 2, strict=True)]
    found = paired(better, [0.8 + x for x in luck])
    assert found.is_clear
    assert found.p == 2**-5


def test_only_seeds_that_both_have_are_compared():
    one = Row({}, [0.9, 0.8, 0.7], 0, 0.0, 0.0, (0, 1, 3))
    found = paired(one, {3: 0.6, 2: 0.1, 0: 0.7})
    assert found.n == 2
    assert found.difference == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([0.5], [0.4], "at least two"),
        ([0.5, 0.6], [0.4], "by seed"),
        (np.ones(4), np.ones(3), "by seed"),
        ({1: 0.5, 2: 0.6}, [0.5, 0.6], "by seed"),
        ({0: 1.0}, {1: 1.0}, "got 0"),
        ([0.5, math.nan], [0.4, 0.4], "not finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(one, other, message):
    with pytest.raises(ValueError, match=message):
        paired(one, other)


def test_many_seeds_are_tested_by_random_exchanges():
    clear = paired([1.0 + 0.01 * k for k in range(20)], [0.0] * 20)
    assert clear.p < 1e-4
    assert paired([1.0, -1.0] * 10, [0.0] * 20).p > 0.5
