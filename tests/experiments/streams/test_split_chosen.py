import pytest

from ewc_lib.experiments.runs.choosing import choose
from ewc_lib.experiments.streams.split_chosen import SPLIT_CHOSEN, criteria, knobs_of, searched
from tests.experiments.cases import run


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    few = {"class": ["none", "EWC", "joint"], "masked": ["EWC, clipped", "EWC, all classes"]}
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
