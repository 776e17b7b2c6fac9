import math
import statistics

import pytest

from ewc_lib.experiments.language.fine_tuning import candidates, chosen, flat
from ewc_lib.experiments.language.language_models import (
    METHODS,
    PROTOCOL,
    best,
    choice,
    comparison,
    gain,
    perplexity,
    table,
)
from ewc_lib.experiments.language.ways import TRAINED
from tests.experiments.texts import SHORT, cut_short

few = pytest.fixture(autouse=True)(cut_short)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "short.json"
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch)
        return comparison(path, seeds=2, protocol=SHORT, progress=False)


def test_every_method_is_measured_at_every_setting_for_every_seed(result):
    found = [(r["method"], r["seed"], r["rate"], r["setting"]) for r in flat(result, "texts")]
    assert len(set(found)) == len(found)
    for seed in range(2):
        own = [method for method, s, *_ in found if s == seed]
        assert set(own) == set(METHODS)
        assert own.count("learning rate") == own.count("EWC") == 2
        assert own.count("averaging") == own.count("EWC, averaging") == 1


WIDER = "L2", "EWC", "EWC, averaging", "LoRA, L2", "LoRA, EWC on factors", "LoRA, EWC"
"""Methods whose best rate was at the edge of a first grid."""


def test_every_method_has_as_many_candidates_or_a_rate_more():
    of = PROTOCOL["settings"]
    trained = {method: name for name, methods in TRAINED.items() for method in methods}
    for method in METHODS:
        rates = PROTOCOL["rates"][trained.get(method, method)]
        if method in TRAINED["plain"][1:]:
            rates = of["along"]
        wanted = 16 if method in WIDER else 12
        assert len(rates) * len(of.get(method, [1.0])) == wanted, method
        assert set(of["along"]) <= set(PROTOCOL["rates"]["plain"])


def test_validation_data_choose_one_rate_and_setting_and_test_data_are_reported(result):
    for method in METHODS:
        rows = flat(result, "texts", method=method)
        own = best(result, method)
        assert [row["seed"] for row in own] == [0, 1]
        mean = {}
        for row in rows:
            mean.setdefault((row["rate"], row["setting"]), []).append(row["valid"])
        top = max(mean, key=lambda at: statistics.mean(mean[at]))
        assert all((row["rate"], row["setting"]) == top for row in own)
        assert choice(result, method).settings == {"rate": top[0], "setting": top[1]}


def test_a_gain_is_a_loss_that_the_other_method_has_more(result):
    found = gain(result, "joint", "EWC")
    losses = [
        statistics.mean(row["both"] for row in best(result, method)) for method in ("EWC", "joint")
    ]
    assert math.isclose(found.difference, losses[0] - losses[1], abs_tol=1e-9)
    assert gain(result, "joint", "EWC", "b").n == 2


def test_the_perplexity_is_that_of_the_loss_of_a_text(result):
    rows = best(result, "EWC")
    for text, place in (("a", 2), ("b", 3)):
        losses = [
            point["losses"][place]
            for run in result["runs"]
            for point in run["points"]
            if point["method"] == "EWC" and point["setting"] == rows[0]["setting"]
        ]
        expected = statistics.mean(math.exp(loss) for loss in losses)
        assert math.isclose(perplexity(rows, text), expected, rel_tol=1e-9)


def test_the_table_has_a_line_for_each_method(result):
    lines = table(result).splitlines()[1:]
    assert [line[:21].strip() for line in lines] == list(METHODS)
    for line, method in zip(lines, METHODS, strict=True):
        assert f"{perplexity(best(result, method), 'a'):.2f}" in line
        assert ("±" in line) == (method != METHODS[0])


def test_curves_may_choose_plain_training_or_none(result):
    rows = candidates(result, "texts", "LoRA, EWC")
    assert {row["method"] for row in rows} == {"none", "learning rate", "LoRA, EWC"}
    assert len(chosen(rows, 0.0)) == 2


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path):
    one = {**SHORT, "rates": {"LoRA": [1e-2]}}
    first = comparison(tmp_path / "short.json", seeds=2, protocol=one, progress=False)
    again = comparison(tmp_path / "short.json", seeds=2, protocol=one, progress=False)
    assert again["runs"] == first["runs"]
