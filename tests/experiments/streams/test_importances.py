import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.experiments.streams.importances import (
    IMPORTANCES,
    SEARCH_SEED,
    SEARCHED,
    VARIANTS,
    choices,
    results,
)
from tests.experiments.cases import run


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(IMPORTANCES, tmp_path_factory.mktemp("results"), tasks=2, budget=3)


def of(result, method):
    return [r for r in result["runs"] if r["method"] == method]


def test_every_method_has_the_same_search_on_a_seed_of_its_own(result):
    for method in SEARCHED:
        tried = [r["strength"] for r in of(result, method) if r["seed"] == SEARCH_SEED]
        assert len(tried) == len(set(tried)) == 3


def test_the_result_is_that_of_other_seeds_at_the_strength_with_the_best_validation(result):
    for method, choice in choices(result["runs"]).items():
        (at,) = [r for r in of(result, method) if r["seed"] != SEARCH_SEED]
        tried = [r for r in of(result, method) if r["seed"] == SEARCH_SEED]
        best = max(tried, key=lambda r: r["valid"])
        assert at["strength"] == choice.settings["strength"] == best["strength"]
    assert [r["seed"] for r in of(result, "none")] == [0]


def test_results_leave_out_the_search_and_strengths_that_were_not_chosen(result):
    other = [{**r, "strength": 12.0} for r in result["runs"] if r["seed"] != SEARCH_SEED]
    found = results([*result["runs"], *other])
    assert set(found) == {"none", *SEARCHED}
    for method, choice in choices(result["runs"]).items():
        assert found[method].settings["strength"] == choice.settings["strength"]
        assert len(found[method].accuracies) == 1


def test_what_is_chosen_does_not_depend_on_test_images(result):
    other = [{**r, "accuracy": -r["accuracy"], "final": []} for r in result["runs"]]
    assert choices(other) == choices(result["runs"])


def test_the_root_is_that_of_the_exact_diagonal_and_few_images_are_the_first():
    model, x = mlp((3, 4, 2), 0).double(), torch.randn(600, 3, dtype=torch.float64)
    data = x, torch.arange(600) % 2
    exact = VARIANTS["exact"](model, data).values
    few = VARIANTS["exact"](model, (x[:500], data[1][:500])).values
    for name, value in exact.items():
        root = VARIANTS["root of exact"](model, data).values[name]
        torch.testing.assert_close(root.square(), value)
        torch.testing.assert_close(VARIANTS["exact, n = 500"](model, data).values[name], few[name])
