import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ewc_lib._multiplier import MOST, multiplier

SIZES = st.floats(-8, 6).map(lambda power: 10.0**power)
PROBLEMS = st.lists(st.tuples(SIZES, st.floats(-3, 3)), min_size=1, max_size=20)


def quadratic(parts):
    """Return what is left at each strength, and how it changes."""

    def at(strength):
        left = [k * u * u / (1 + strength * k) ** 2 for k, u in parts]
        slopes = [-2 * k * x / (1 + strength * k) for x, (k, _) in zip(left, parts, strict=True)]
        return sum(left), sum(slopes)

    return at


@given(PROBLEMS, st.floats(-6, -0.01), st.sampled_from([0.0, 1.0, 1e8, MOST]))
def test_what_is_left_is_just_below_the_limit(parts, power, start):
    at = quadratic(parts)
    limit = at(0.0)[0] * 10**power
    if limit < 1e-200:
        return
    found = multiplier(at, limit, start)
    assert 0.995 * limit <= at(found)[0] <= limit


@given(PROBLEMS, st.floats(1, 3))
def test_what_is_below_the_limit_is_left_alone(parts, factor):
    at = quadratic(parts)
    assert multiplier(at, factor * at(0.0)[0], 5.0) == 0.0


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_cannot_be_kept_gives_all_there_is(limit):
    found = multiplier(quadratic([(1.0, 1.0)]), limit, 0.0)
    assert found == MOST
    assert found * torch.zeros(1) == 0
    assert math.isfinite(torch.tensor(found, dtype=torch.float32).item())


def test_few_steps_find_it():
    counted = []

    def at(strength):
        counted.append(strength)
        return quadratic([(10.0**k, 1.0) for k in range(-4, 5)])(strength)

    multiplier(at, 1.0, 0.0)
    assert len(counted) < 15
    del counted[:]
    multiplier(at, 1.0, 0.93)
    assert len(counted) < 8


@pytest.mark.parametrize("start", [0.0, 1e-30, 1e3, 1e20, 0.5 * MOST, MOST])
def test_rounding_that_hides_what_is_left_does_not_end_the_search(start):
    """Beyond some strength nothing is left, and no slope."""

    def at(strength):
        q, slope = quadratic([(1e-10, 1.0), (1.0, 1e3)])(strength)
        return (q, slope) if q > 1e-11 else (-1e-18, 0.0)

    found = multiplier(at, 1e-8, start)
    assert 0 < at(found)[0] <= 1e-8
    assert 0 < multiplier(at, 1e-13, start) <= MOST
