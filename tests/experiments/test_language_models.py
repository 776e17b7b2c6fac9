import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from ewc_lib import EWC
from ewc_lib.experiments.language_models import (
    METHODS,
    PROTOCOL,
    adaptable,
    comparison,
    flat,
    language_model,
    learn,
    log_likelihood,
    table,
    texts,
)
from ewc_lib.experiments.strengths import left_out
from ewc_lib.regularizers import add_adapters

SHORT = {
    **PROTOCOL,
    "width": 8,
    "layers": 1,
    "heads": 2,
    "length": 8,
    "rank": 2,
    "steps_a": 4,
    "steps_b": 3,
    "grids": {"L2": [0.1, 1.0], "EWC": [10.0, 1000.0], "LoRA, EWC": [1.0]},
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Cut both texts short: what is tested does not depend on their length."""
    module = comparison.__module__
    for name, times in (("documentation", 20), ("source_code", 40)):
        text = f"{name} of a few words, again and again. " * times
        monkeypatch.setattr(f"{module}.{name}", lambda text=text: text)


@pytest.fixture
def result(tmp_path):
    return comparison(tmp_path / "short.json", seeds=2, protocol=SHORT, progress=False)


def tokens(model_seed=0):
    model = language_model(SHORT, model_seed)
    english, _ = texts(SHORT["length"])
    return model, english.train


def test_both_texts_have_as_many_sequences():
    english, code = texts(8)
    assert english.train[0].shape == code.train[0].shape
    assert english.test[0].shape == code.test[0].shape
    assert not torch.equal(english.train[0], code.train[0])


def test_a_network_follows_its_seed_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    (one, again, other) = (language_model(SHORT, seed).token.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_log_likelihood_is_the_mean_over_all_bytes():
    model, (x, y) = tokens()
    logs = model(x).log_softmax(-1)
    expected = logs.gather(-1, y[..., None]).mean().item()
    assert len(x) > 64  # more than one batch
    assert math.isclose(log_likelihood(model, (x, y)), expected, rel_tol=1e-5)


def test_learning_raises_the_likelihood_and_follows_the_seed():
    found = []
    for _ in range(2):
        model, data = tokens()
        before = log_likelihood(model, data)
        learn(model, data, SHORT, steps=30, seed=0)
        found.append(log_likelihood(model, data))
    assert found[0] == found[1] > before + 0.5


def test_learning_takes_the_proximal_step_of_a_penalty_that_has_one():
    model, data = tokens()
    held = EWC(model, 1e12, kind="sketch")
    held.consolidate(data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, data, SHORT, steps=5, seed=0, regularizer=held)
    F_ = held.precision.diagonal()
    held_back = 0
    for name, p in model.named_parameters():
        firm = F_[name] > 1e-6
        held_back += firm.sum()
        torch.testing.assert_close(p[firm], before[name][firm], atol=1e-4, rtol=0)
    assert held_back > 100


def test_only_adapters_are_learned_where_there_are_some():
    model, data = tokens()
    add_adapters(model, adaptable(model), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, data, SHORT, steps=3, seed=0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith((".A", ".B"))


def test_the_head_is_not_adaptable():
    assert adaptable(language_model(SHORT, 0)) == [
        "blocks.0.attention.project",
        "blocks.0.attention.out",
        "blocks.0.up",
        "blocks.0.down",
    ]


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
    lines = table(result).splitlines()
    assert [line[:15].strip() for line in lines[1:]] == list(METHODS)
    (line,) = (x for x in lines if x.startswith("none "))
    own = [math.exp(-r["code"]) for r in flat(result, method="none")]
    assert f"{statistics.mean(own):.2f} ±" in line
    (line,) = (x for x in lines if x.startswith("L2 "))
    runs = flat(result, method="L2")
    best = max(SHORT["grids"]["L2"], key=lambda s: _mean(runs, s))
    assert left_out(runs, "both") <= _mean(runs, best) + 1e-12


def _mean(runs, strength):
    return statistics.mean(r["both"] for r in runs if r["strength"] == strength)
