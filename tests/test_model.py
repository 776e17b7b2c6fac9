"""Calling a network: what goes in, what is left behind, and which parameters count."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ewc_lib._model import (
    check_finite_parameters,
    evaluating,
    forward,
    select_parameters,
    untouched,
)
from tests.scenarios import same, trace_of


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class TestForward:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])

    def test_a_tensor_is_passed_as_the_only_argument(self):
        assert same(forward(nn.Identity(), self.x), self.x)

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_a_tuple_or_list_is_passed_by_position(self, kind):
        model = Function(lambda a, b: a - b)
        assert same(forward(model, kind((self.x, self.y))), self.x - self.y)

    def test_a_dict_is_passed_by_keyword(self):
        model = Function(lambda *, a, b: a - b)
        assert same(forward(model, {"b": self.y, "a": self.x}), self.x - self.y)

    def test_logits_are_taken_out_of_the_output(self):
        model = Function(lambda a: SimpleNamespace(logits=a + 1, loss=None))
        assert same(forward(model, self.x), self.x + 1)

    def test_other_parameters_replace_the_models_own_for_this_call_only(self):
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone()
        weight = torch.tensor([[2.0, 3.0]])
        assert same(forward(model, self.x, {"weight": weight}), 8 + model.bias.reshape(1, 1))
        assert same(model.weight.detach(), before)

    def test_tied_weights_are_replaced_in_all_their_places(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        assert same(forward(model, self.x, {"0.weight": 3 * torch.eye(2)}), 9 * self.x)

    @pytest.mark.parametrize("output", [None, {"a": x}, (x,)])
    def test_an_output_that_is_no_tensor_is_refused(self, output):
        with pytest.raises(TypeError, match=r"must return a tensor or have \.logits"):
            forward(Function(lambda a: output), self.x)


def mixed_modes():
    """A network in training mode of which one part was deliberately put in eval mode."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()
    return model


def test_every_module_is_in_eval_mode_inside_and_in_its_own_mode_after():
    model = mixed_modes()
    before = trace_of(model)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert same(trace_of(model), before)
    assert [m.training for m in (model, model[0], model[1], *model[1])] == [
        True,
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("context", [evaluating, untouched])
def test_modes_come_back_after_an_exception(context):
    model = mixed_modes()
    before = trace_of(model)
    with pytest.raises(KeyError), context(model):
        raise KeyError
    assert same(trace_of(model), before)


class Restless(nn.Module):
    """A network that leaves traces of every kind in its own buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, momentum=0.5)
        self.register_buffer("changed", torch.tensor([1.0, float("nan")]))
        self.register_buffer("changed_unseen", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("later", None)
        self.register_buffer("kept", torch.arange(3).expand(2, 3), persistent=False)
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self, x):
        self.changed += 1
        self.changed_unseen.data.add_(1)
        self.replaced = self.replaced + 1
        self.later = x.detach()
        self.register_buffer("new", torch.ones(1))
        self.norm.running_mean.mul_(0.5)
        return self.norm(self.layer(x + torch.randn(2)))


def state(model):
    buffers = {name: b for module in model.modules() for name, b in module._buffers.items()}
    return {
        name: None if b is None else (id(b), torch.nan_to_num(b.detach().to_dense()).clone())
        for name, b in buffers.items()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_random_state_are_bit_identical_after(fails):
    model = Restless().train()
    buffers, random_state = state(model), torch.get_rng_state()
    assert set(buffers) > {"changed", "later", "running_mean", "num_batches_tracked"}
    try:
        with untouched(model):
            model(torch.ones(3, 2))
            torch.manual_seed(7)
            assert not same(state(model), buffers)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same(state(model), buffers)
    assert same(torch.get_rng_state(), random_state)
    assert model.training
    assert model.norm.training


def test_a_buffer_that_did_not_change_is_not_written_to():
    model = nn.BatchNorm1d(2)
    version = model.running_mean._version
    with untouched(model):
        model(torch.ones(3, 2))
    assert model.running_mean._version == version


def test_other_sources_of_randomness_and_gradients_are_left_alone():
    model = mixed_modes()
    model[0].weight.grad = torch.ones(2, 2)
    random.seed(3)
    np.random.seed(3)
    before = trace_of(model)
    with untouched(model):
        torch.autograd.grad(model(torch.randn(4, 2)).sum(), model[0].weight)
    assert same(trace_of(model), before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_can_be_taken_inside_whatever_is_switched_off_outside(around):
    model = nn.Linear(2, 1)
    with around():
        with untouched(model):
            (g,) = torch.autograd.grad(model(torch.ones(1, 2)).sum(), model.bias)
        assert not torch.is_grad_enabled()
    assert g.item() == 1


def network():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)))
    model.add_module("head", nn.Linear(3, 2))
    return model


ALL = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        (None, ALL),
        ("head.weight", ["head.weight"]),
        (["head.bias", "body.0.weight"], ["body.0.weight", "head.bias"]),
        ("head.*", ["head.weight", "head.bias"]),
        (["*.bias", "head.*"], ["body.0.bias", "body.2.bias", "head.weight", "head.bias"]),
        ("body.[0-1].*", ["body.0.weight", "body.0.bias"]),
        (lambda name, p: p.dim() == 1, ["body.0.bias", "body.2.bias", "head.bias"]),
        (lambda name, p: name.startswith("head"), ["head.weight", "head.bias"]),
    ],
)
def test_parameters_are_chosen_in_the_order_of_the_model(params, chosen):
    model = network()
    found = select_parameters(model, params)
    assert list(found) == chosen
    assert all(p is model.get_parameter(name) for name, p in found.items())


def test_frozen_parameters_are_not_chosen():
    model = network()
    model.body.requires_grad_(False)
    assert list(select_parameters(model)) == ["head.weight", "head.bias"]
    assert list(select_parameters(model, "*.weight")) == ["head.weight"]
    assert list(select_parameters(model, lambda name, p: True)) == ["head.weight", "head.bias"]


def test_a_tied_parameter_is_chosen_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(select_parameters(model)) == ["0.weight"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("head.weigth", "'head.weigth'; did you mean 'head.weight'"),
        ("zzz", f"'zzz'; the model has {', '.join(ALL)}"),
        (["head.weight", "tail.*"], r"'tail\.\*'"),
        ("body.0.weight", "'body.0.weight' does not require grad"),
        ([], "chooses no parameter"),
        (lambda name, p: False, "chooses no parameter"),
    ],
)
def test_a_choice_that_finds_nothing_is_named(params, message):
    model = network()
    if params == "body.0.weight":
        model.body.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        select_parameters(model, params)


@pytest.mark.parametrize("model", [network().requires_grad_(False), nn.Tanh()])
def test_a_model_without_trainable_parameters_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no trainable parameter"):
        select_parameters(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_parameter_that_is_not_finite_is_named(bad):
    parameters = {"a": torch.ones(2), "b": torch.tensor([1.0, bad]), "c": torch.tensor([bad])}
    with pytest.raises(ValueError, match="parameter 'b' holds NaN or infinite"):
        check_finite_parameters(parameters)
    check_finite_parameters({"a": parameters["a"]})
