import statistics

import pytest

from ewc_lib.experiments.language.fine_tuning import (
    METHODS,
    candidates,
    chosen,
    comparison,
    flat,
    table,
)
from tests.experiments.texts import FINE, cut_short

few = pytest.fixture(autouse=True)(cut_short)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "short.json"
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch)
        return comparison(path, seeds=2, protocol=FINE, progress=False)


@pytest.mark.parametrize("name", ["digits", "texts"])
def test_every_method_is_measured_at_every_setting(result, name):
    found = [(r["method"], r["seed"], r["rate"], str(r["setting"])) for r in flat(result, name)]
    assert len(set(found)) == len(found)
    for seed in range(2):
        own = [(m, rate) for m, s, rate, _ in found if s == seed]
        assert {m for m, _ in own} == set(METHODS)
        assert own.count(("EWC", 1e-2)) == own.count(("EWC, averaging", 1e-2)) == 2
        for method in ("learning rate", "early stopping", "averaging"):
            assert [own.count((method, rate)) for rate in FINE["plain_rates"]] == [1, 1]


@pytest.mark.parametrize("name", ["digits", "texts"])
def test_an_infinite_strength_loses_nothing_that_the_old_observations_need(result, name):
    (firm, _) = (r for r in flat(result, name, method="EWC") if r["setting"] == 1e12)
    assert firm["nats"]["diagonal"] < 1e-8


def test_all_methods_go_on_from_the_same_model(result):
    for name, seed in (("digits", 0), ("texts", 1)):
        runs = [r for r in result["runs"] if (r["data"], r["seed"]) == (name, seed)]
        assert all(run["before"] == runs[0]["before"] for run in runs)


def test_validation_data_choose_within_the_limit_and_doing_nothing_is_a_choice(result):
    start = {"seed": 0, "valid_a": 0.0, "valid_b": 3.0}
    rows = [
        start,
        {"seed": 0, "valid_a": 0.1, "valid_b": 1.0},
        {"seed": 0, "valid_a": 0.5, "valid_b": 0.5},
    ]
    assert [chosen(rows, limit)[0]["valid_b"] for limit in (0.05, 0.1, 1.0)] == [3.0, 1.0, 0.5]
    for method in METHODS:
        rows = candidates(result, "digits", method)
        whole = {"EWC"} if method == "EWC, averaging" else set()  # averaging with a share of 1
        assert {r["method"] for r in rows} == {"none", "learning rate", method} | whole
        assert all(r["a"] == r["valid_a"] == 0 for r in rows if r["method"] == "none")
        assert len(chosen(rows, 0.0)) == 2


def test_the_table_shows_the_test_loss_on_b_of_what_was_chosen(result):
    lines = table(result).splitlines()
    assert len(lines) == 2 * (1 + len(METHODS))
    line = lines[1 + METHODS.index("EWC")]
    rows = chosen(candidates(result, "digits", "EWC"), FINE["limits"][0])
    assert line[25:].split()[0] == f"{statistics.mean(row['b'] for row in rows):.3f}"


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path):
    one = {**FINE, "plain_rates": [1e-3]}
    del one["texts"]
    first = comparison(tmp_path / "short.json", seeds=2, protocol=one, progress=False)
    again = comparison(tmp_path / "short.json", seeds=2, protocol=one, progress=False)
    assert again["runs"] == first["runs"]
