import pytest

from ewc_lib.experiments.runs.choosing import choose
from ewc_lib.experiments.streams.split_chosen import (
    SPLIT_CHOSEN,
    at_choice,
    criteria,
    flattery,
    knobs_of,
    searched,
)
from tests.experiments.cases import run


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    few = {"class": ["none", "EWC", "joint"], "masked": ["EWC, clipped", "EWC, all classes"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EWC_DATA", raising=False)
        return run(SPLIT_CHOSEN, tmp_path_factory.mktemp("few"), seeds=2, budget=4, methods=few)


def test_every_method_tries_as_many_settings_on_seeds_that_no_table_shows(result):
    for scenario, methods in result["protocol"]["methods"].items():
        for method in methods:
            own = searched(result["runs"], scenario, method)
            assert len({(r["strength"], r["rate"]) for r in own}) == 4
            shown = [r for r in result["runs"] if r["method"] == method and not r["search"]]
            assert {r["seed"] for r in shown} == {0, 1}
            assert not {r["seed"] for r in own} & {0, 1}


def test_what_is_shown_was_chosen_on_validation_images(result):
    for scenario, methods in result["protocol"]["methods"].items():
        for method in methods:
            own = searched(result["runs"], scenario, method)
            best = [choose(own, knobs_of(method), by).settings for by in criteria(scenario)]
            shown = [r for r in result["runs"] if r["method"] == method and not r["search"]]
            assert all({k: r[k] for k in knobs_of(method)} in best for r in shown)
            assert len(shown) == 2 * len({tuple(b.values()) for b in best})


def test_a_search_that_was_stopped_within_a_round_finishes_its_seeds_first():
    protocol, (search, *_) = SPLIT_CHOSEN.protocols["digits"], SPLIT_CHOSEN.stages
    protocol = {**protocol, "methods": {"task": ["EWC"]}, "budget": 1}
    first = next(iter(search(protocol, 2, ())))
    done = [{**first, "valid": 0.5}]
    left = [run for run in search(protocol, 2, done) if run not in done and run != first]
    assert left
    assert all({**run, "seed": first["seed"]} == first for run in left)
    with_all = done + [{**run, "valid": 0.5} for run in left]
    assert choose(with_all, knobs_of("EWC")).value == 0.5


def test_where_tasks_share_outputs_each_strength_is_tried_at_each_low_rate(tmp_path, monkeypatch):
    monkeypatch.delenv("EWC_DATA", raising=False)
    methods = {"domain": ["none", "EWC", "joint"]}
    low = SPLIT_CHOSEN.protocols["digits"]["low"] | {"rates": [1e-5, 3e-5], "budget": 9}
    runs = run(SPLIT_CHOSEN, tmp_path, budget=4, methods=methods, low=low)["runs"]
    tried = {
        m: {(r["strength"], r["rate"]) for r in searched(runs, "domain", m)}
        for m in methods["domain"]
    }
    assert {(s, r) for s in (10.0, 100.0) for r in (1e-5, 3e-5)} < tried["EWC"]
    assert {(None, 1e-5), (None, 3e-5)} < tried["none"]
    assert {method: len(settings) for method, settings in tried.items()} == {
        "none": 9,
        "EWC": 9,
        "joint": 4,
    }


def finished(strength, seed, valid, accuracy, search):
    settings = {"scenario": "task", "method": "EWC", "strength": strength, "rate": 1e-3}
    return {**settings, "seed": seed, "valid": valid, "accuracy": accuracy, "search": search}


def test_choosing_on_the_test_images_flatters_by_the_difference_in_the_test():
    tried = [finished(1.0, 9, 0.9, 0.7, True), finished(10.0, 9, 0.8, 0.75, True)]
    shown = [finished(1.0, 1, 0.9, 0.6, False), finished(1.0, 0, 0.9, 0.65, False)]
    other = [finished(10.0, 0, 0.9, 0.99, False)]
    assert flattery(tried + shown, "task", "EWC") == pytest.approx(0.05)
    found = at_choice([*tried, *other, *shown], "task", "EWC")
    assert list(found) == [0, 1]
    assert [run["accuracy"] for run in found.values()] == [0.65, 0.6]
