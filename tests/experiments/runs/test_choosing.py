"""The search for settings, on functions whose optimum is known."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ewc_lib.experiments.runs.choosing import choose, propose

STRENGTHS = {"strength": [1e0, 1e2, 1e4, 1e6]}
BOTH = {**STRENGTHS, "rate": [3e-4, 1e-3, 3e-3]}


def search(function, knobs, budget):
    runs = []
    while new := propose(runs, knobs, budget):
        runs += [{**place, "valid": function(**place)} for place in new]
    return runs


def valley(**optimum):
    """Return a function of positive numbers with one maximum, parabolic in their logarithms."""
    return lambda **at: -sum(math.log10(at[name] / optimum[name]) ** 2 for name in optimum)


@given(st.floats(-2, 8), st.floats(-4.5, -1.5))
@settings(max_examples=50)
def test_a_search_of_two_knobs_finds_a_maximum_inside_what_it_tried(strength, rate):
    runs = search(valley(strength=10**strength, rate=10**rate), BOTH, budget=18)
    found = choose(runs, BOTH)
    assert not found.at_edge
    assert abs(math.log10(found.settings["strength"]) - strength) < 1.01
    assert abs(math.log10(found.settings["rate"]) - rate) < 0.51


@pytest.mark.parametrize("budget", [3, 7, 12])
@pytest.mark.parametrize("knobs", [STRENGTHS, BOTH])
def test_every_method_has_as_many_different_settings_as_the_budget(knobs, budget):
    runs = search(
        valley(strength=1e3, rate=1e-3) if "rate" in knobs else valley(strength=1e3), knobs, budget
    )
    assert len({tuple(run[name] for name in knobs) for run in runs}) == len(runs) == budget


def test_the_first_values_are_those_of_the_first_knob_with_the_others_in_the_middle():
    first = propose([], BOTH, budget=20)
    assert first == [{"strength": s, "rate": 1e-3} for s in STRENGTHS["strength"]]


def test_a_best_at_the_edge_sends_the_search_beyond_it():
    runs = search(valley(strength=1e-3), STRENGTHS, budget=4)
    assert choose(runs, STRENGTHS).at_edge == ("strength",)
    assert propose(runs, STRENGTHS, budget=6) == [{"strength": 1e-2}]


def test_settings_at_which_a_seed_diverged_are_not_chosen():
    runs = [
        {"strength": 1.0, "valid": 0.5},
        {"strength": 2.0, "valid": 0.9},
        {"strength": 2.0, "valid": None},
        {"strength": 4.0, "valid": math.nan},
    ]
    assert choose(runs, ["strength"]).settings == {"strength": 1.0}
    with pytest.raises(ValueError, match="no settings of strength"):
        choose(runs[1:], ["strength"])
    assert len(propose(runs[3:], STRENGTHS, budget=9)) == 4


def test_seeds_are_averaged_and_other_outcomes_ignored():
    runs = [
        {"strength": s, "valid": v, "accuracy": 1 - v, "seed": seed}
        for s, seed, v in [(1.0, 0, 0.9), (1.0, 1, 0.1), (2.0, 0, 0.6), (2.0, 1, 0.6)]
    ]
    found = choose(runs, ["strength"])
    assert (found.settings, found.value) == ({"strength": 2.0}, pytest.approx(0.6))
    assert choose(runs, ["strength"], by="accuracy").settings == {"strength": 1.0}


@pytest.mark.parametrize(
    "values",
    [[1.0], [], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, math.inf], ["a", "b"], [None, 1]],
)
def test_starting_values_that_are_not_positive_numbers_that_rise_are_refused(values):
    with pytest.raises(ValueError, match=r"rate needs two starting values or more.*got \["):
        propose([], {**STRENGTHS, "rate": values}, budget=9)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, None, "high"])
def test_a_search_among_runs_at_no_positive_number_is_refused(value):
    runs = [{"strength": s, "valid": 0.5} for s in (1.0, value)]
    with pytest.raises(ValueError, match="logarithms of strength, got runs at"):
        propose(runs, STRENGTHS, budget=9)


@pytest.mark.parametrize("values", [["low", "high"], [None, 1.0, 2.0], [1.0, "high"]])
def test_words_can_be_chosen_among_and_have_no_edge(values):
    runs = [{"knob": value, "valid": 0.1 * i} for i, value in enumerate(values)]
    found = choose(runs, ["knob"])
    assert (found.settings, found.at_edge) == ({"knob": values[-1]}, ())


@pytest.mark.parametrize(("best", "is_edge"), [((1, 5), True), ((2, 5), False), ((2, 6), True)])
def test_a_pair_of_numbers_is_at_an_edge_if_one_of_them_is(best, is_edge):
    pairs = list(product((1, 2, 3), (4, 5, 6)))
    runs = [{"knob": pair, "valid": float(pair == best)} for pair in pairs]
    assert bool(choose(runs, ["knob"]).at_edge) == is_edge


def test_zero_is_a_number_and_may_be_an_edge():
    runs = [{"strength": s, "valid": -s} for s in (0.0, 1.0)]
    assert choose(runs, ["strength"]).at_edge == ("strength",)


@pytest.mark.parametrize("seeds", [[(1.0, 0), (1.0, 1), (2.0, 0)], [(1.0, 0), (1.0, 0), (2.0, 0)]])
def test_means_over_other_seeds_or_one_seed_twice_are_not_compared(seeds):
    runs = [{"strength": s, "seed": seed, "valid": 0.5} for s, seed in seeds]
    with pytest.raises(ValueError, match="means over other seeds"):
        choose(runs, ["strength"])


def test_a_method_without_a_choice_is_at_no_edge():
    assert choose([{"rate": 1e-3, "valid": 0.5}], ["rate"]).at_edge == ()
