"""Batch after batch: checks of the output, joined batches, and no trace."""

import sys

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.score.network import NetworkScores
from ewc_lib.score.network import _eager as eager
from tests.budgets import set_budget
from tests.scenarios import SCENARIOS, N, estimate, relative_error, same
from tests.score.cases import batch, three_paths


@pytest.fixture
def network():
    return three_paths()


def test_an_output_without_one_row_per_observation_is_refused(network):
    network.model.forward = lambda x: x.sum(0)
    with pytest.raises(ValueError, match="one row per observation"):
        network.run(batch(5))


def test_an_output_that_is_not_finite_is_refused_by_its_observation(network):
    with torch.no_grad():
        network.model.by_rule.weight[0] = 1e300
    bad = batch(5, first=20)
    bad.inputs[3] = 1e300
    with pytest.raises(ValueError, match="the output of observation 23 is not finite"):
        network.run(bad)


# Joined batches


@pytest.mark.parametrize("name", ["mlp_categorical", "attention", "tied_weights", "lstm"])
@pytest.mark.parametrize("size", [1, 3])
def test_joining_batches_changes_no_number(name, size, monkeypatch):
    case = SCENARIOS[name]()
    apart = estimate(case, size, structure="dense").to_dense()
    set_budget(monkeypatch, batch=2**24)
    assert relative_error(estimate(case, size, structure="dense").to_dense(), apart) < 1e-12


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_joining_batches_changes_no_draw(kind, monkeypatch):
    case = SCENARIOS["mlp_categorical"]()
    options = {"kind": kind, "draws": 3, "structure": "dense"}
    apart = estimate(case, 3, **options).to_dense()
    set_budget(monkeypatch, batch=2**24)
    assert relative_error(estimate(case, 3, **options).to_dense(), apart) < 1e-12


def test_small_batches_are_joined_after_the_first(monkeypatch):
    sizes, run = [], NetworkScores.run
    monkeypatch.setattr(NetworkScores, "run", lambda self, b: sizes.append(len(b)) or run(self, b))
    set_budget(monkeypatch, batch=2**24)
    estimate(SCENARIOS["mlp_categorical"](), 2)
    assert sizes == [2, N - 2]


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_batches_that_a_model_cannot_take_together_are_run_apart(kind, monkeypatch):
    def in_order(model, inputs):
        if (inputs[0].diff(dim=0)[:, 0] < 0).any():
            raise ValueError("not in order")

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    pieces = [torch.randn(n, 4).double().sort(0).values for n in (3, 3, 2)]
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x in pieces]
    set_budget(monkeypatch, batch=2**24)
    free = fisher_information(model, data, kind=kind).diagonal()
    sizes, run = [], NetworkScores.run
    monkeypatch.setattr(NetworkScores, "run", lambda self, b: sizes.append(len(b)) or run(self, b))
    model.register_forward_pre_hook(in_order)
    bound = fisher_information(model, data, kind=kind).diagonal()
    assert all(torch.allclose(bound[name], free[name]) for name in free)
    assert sizes == [3, 5, 3, 2]


# No trace, and what was compiled


def test_everything_is_as_it_was_after_an_error(network):
    network.model.train()
    state = torch.get_rng_state()
    seen = []

    def fail():
        seen.append(network.model.training)
        torch.rand(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), network.leaving_no_trace():
        fail()
    assert seen == [False]
    assert network.model.training
    assert same(torch.get_rng_state(), state)


def test_the_compiler_is_only_touched_where_it_was_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: asked.append(stance))
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with eager():
        pass
    assert asked == []
