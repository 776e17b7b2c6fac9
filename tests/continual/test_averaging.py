"""Weights between two, beside the formula entry by entry."""

import copy

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.continual import averaged

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


class Net(nn.Module):
    """Has all that a state can hold: tied and frozen weights, statistics, a counter, a mask."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.tied, self.frozen = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.tied.weight = self.body.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x):
        mixed = self.norm(self.body(x)) @ self.mask.exp()
        return self.frozen(self.tied(mixed).tanh())


@pytest.fixture
def trained():
    """A model after some training, and its state before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model, before


def test_parameters_are_on_the_line_and_buffers_are_those_of_after(trained):
    model, before = trained
    after = copy.deepcopy(model.state_dict())
    found, names = averaged(model, before, 0.25), dict(model.named_parameters())
    assert list(found) == list(after)
    for name, value in found.items():
        line = 0.75 * before[name] + 0.25 * after[name] if name in names else after[name]
        if name != "tied.weight":
            torch.testing.assert_close(value, line)
    assert not torch.equal(found["body.weight"], after["body.weight"])
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])


def test_what_comes_back_can_be_loaded_and_has_no_nan(trained):
    model, before = trained
    found = averaged(model, before)
    model.load_state_dict(found)
    assert model.tied.weight is model.body.weight
    assert torch.equal(model.body.weight, found["body.weight"])
    assert torch.equal(model.mask, torch.full((3, 3), -torch.inf).triu(1))
    assert model.train()(X).isfinite().all()


def test_the_ends_are_before_and_after_and_nothing_is_changed(trained):
    model, before = trained
    kept, after = copy.deepcopy(before), copy.deepcopy(model.state_dict())
    start, end = averaged(model, before, 0.0), averaged(model, before, 1.0)
    end["body.bias"].add_(1.0)
    for name, _ in model.named_parameters():
        assert torch.equal(start[name], kept[name])
        assert torch.equal(before[name], kept[name])
        assert torch.equal(model.state_dict()[name], after[name])


def test_with_fisher_informations_each_weight_is_nearer_to_where_it_matters(trained):
    model, before = trained
    old = copy.deepcopy(model)
    old.load_state_dict(before)
    F, G = (fisher_information(m, (X, Y)) for m in (old, model))
    found, after = averaged(model, old, 0.3, fishers=(F, G)), model.state_dict()
    for name, f in F.diagonal().items():
        a, b = 0.7 * (f + 1e-6), 0.3 * (G.diagonal()[name] + 1e-6)
        expected = (a * before[name] + b * after[name]) / (a + b)
        torch.testing.assert_close(found[name], expected)
    assert torch.equal(found["tied.weight"], found["body.weight"])
    assert torch.equal(found["frozen.weight"], before["frozen.weight"])


def test_a_parameter_that_is_infinite_in_both_stays(trained):
    model, before = trained
    for weight in (model.frozen.weight, before["frozen.weight"]):
        weight.data[0] = -torch.inf
    assert averaged(model, before)["frozen.weight"][0].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_an_average_has_the_precision_of_the_weights(dtype):
    model = nn.Linear(2, 2, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    nn.init.zeros_(model.weight)
    found = averaged(model, before)["weight"]
    assert found.dtype == dtype
    torch.testing.assert_close(found, before["weight"] / 2)


def test_a_state_that_training_has_changed_is_refused(trained):
    model, _ = trained
    with pytest.raises(ValueError, match="keep a copy"):
        averaged(model, model.state_dict())


def test_states_of_another_model_are_refused(trained):
    model, before = trained
    without = {name: value for name, value in before.items() if name != "body.bias"}
    with pytest.raises(ValueError, match=r"the state before has no 'body\.bias'"):
        averaged(model, without)
    with pytest.raises(ValueError, match=r"the state after has no 'body\.bias'"):
        averaged(model, before, after=without)
    with pytest.raises(ValueError, match=r"'body\.bias' have another shape"):
        averaged(model, before | {"body.bias": torch.ones(4)})


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_zero_and_one(trained, share):
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        averaged(*trained, share)
