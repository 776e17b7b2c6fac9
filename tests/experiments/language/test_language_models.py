import math
import statistics

import pytest
import torch.nn.functional as F

from ewc_lib import EWC
from ewc_lib.experiments.language.language_models import METHODS, comparison, flat, table
from ewc_lib.experiments.language.model import language_model, learn, texts
from ewc_lib.experiments.runs.strengths import held_out
from tests.experiments.texts import SHORT, cut_short

few = pytest.fixture(autouse=True)(cut_short)


@pytest.fixture
def result(tmp_path):
    return comparison(tmp_path / "short.json", seeds=2, protocol=SHORT, progress=False)


def test_every_method_is_measured_at_every_strength(result):
    keys = {(r["method"], r["seed"], r["strength"]) for r in flat(result)}
    assert keys == {
        (method, seed, strength)
        for method in METHODS
        for seed in range(2)
        for strength in SHORT["grids"].get(method, [0.0])
    }
    assert len(keys) == len(flat(result))
    assert all(r["both"] == (r["documentation"] + r["code"]) / 2 < 0 for r in flat(result))


def test_all_methods_go_on_from_the_same_network(result):
    for seed in range(2):
        before = [run["before"] for run in result["runs"] if run["seed"] == seed]
        assert all(pair == before[0] for pair in before)
    trainable = {run["method"]: run["trainable"] for run in result["runs"]}
    assert trainable["LoRA"] == trainable["LoRA, EWC"] < trainable["EWC"] == trainable["none"]


def test_a_stopped_comparison_goes_on_where_it_was(result, tmp_path):
    again = comparison(tmp_path / "short.json", seeds=2, protocol=SHORT, progress=False)
    assert again["runs"] == result["runs"]


def test_a_run_can_be_repeated_by_hand(result):
    english, code = texts(SHORT["length"])
    model = language_model(SHORT, 1)
    options = {"rate": SHORT["rate"], "batch": SHORT["batch"]}
    learn(model, english.train, options, steps=4, seed=1)
    ewc = EWC(model, 1000.0, kind="sketch")
    ewc.consolidate(english.train)
    learn(model, code.train, options, steps=3, seed=2, regularizer=ewc)
    x, y = code.test
    expected = -F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    (run,) = (r for r in flat(result, method="EWC", seed=1) if r["strength"] == 1000.0)
    assert math.isclose(run["code"], expected, rel_tol=1e-4)


def test_the_table_shows_perplexities_at_the_strength_that_the_other_seeds_choose(result):
    lines = table(result).splitlines()[1:]
    assert [line[:15].strip() for line in lines] == list(METHODS)
    for line, method in zip(lines, METHODS, strict=True):
        chosen = held_out(flat(result, method=method), "both")
        for text in ("documentation", "code"):
            mean = statistics.mean(math.exp(-run[text]) for run in chosen)
            assert f" {mean:.2f} ±" in line
