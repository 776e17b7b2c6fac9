import math

import numpy as np
import pytest

from ewc_lib.experiments.structures.predictors import PREDICTORS, gap, ranking


def points(n_seeds=4, n=6, noise=0.0):
    rng = np.random.default_rng(0)
    return [
        {"seed": seed, "method": m, "x": k + 10 * m, "y": k**3 + noise * rng.normal() - 500 * m}
        for seed in range(n_seeds)
        for m in (0, 1)
        for k in range(n)
    ]


def test_a_rising_function_of_the_outcome_ranks_perfectly_within_methods():
    found = ranking(points(), "x", "y", within=["method"])
    assert found == pytest.approx((1, 0, 4))


def test_over_methods_pairs_of_different_methods_count_as_well():
    # of 66 pairs 30 lie within a method and are concordant, 36 between two and are discordant
    assert math.isclose(ranking(points(), "x", "y").value, (30 - 36) / 66)


def test_seeds_are_never_compared_with_each_other():
    shifted = [{**p, "x": p["x"] - 1000 * p["seed"]} for p in points()]
    assert ranking(shifted, "x", "y") == ranking(points(), "x", "y")


def test_the_interval_is_narrower_with_more_seeds():
    few, many = (ranking(points(n, noise=20.0), "x", "y", within=["method"]) for n in (4, 60))
    assert 0 < many.half_width < few.half_width


def test_diverged_runs_do_not_count():
    broken = {"seed": 0, "method": 0, "x": None, "y": None}
    assert ranking([*points(), broken], "x", "y") == ranking(points(), "x", "y")


def test_a_group_without_a_rank_is_left_out():
    alone = {"seed": 0, "method": 7, "x": 1.0, "y": 1.0}
    found = ranking([*points(), alone], "x", "y", within=["method"])
    assert found == ranking(points(), "x", "y", within=["method"])


def test_a_gap_is_the_difference_of_two_correlations():
    runs = [{**p, "z": -p["x"]} for p in points()]
    opposite = gap(runs, "x", "z", "y", within=["method"])
    assert opposite == pytest.approx((4, 2, 0, 2 ** (1 - 4)))
    assert opposite.is_clear
    assert gap(runs, "x", "x", "y") == (4, 0, 0, 1)


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least two seeds"):
        ranking(points(n_seeds=1), "x", "y")


def test_predictors_are_named_once():
    assert len({*PREDICTORS}) == len(PREDICTORS) > 0
