"""Calling a network: what goes in, and what is left behind."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ewc_lib._calling import evaluating, forward, untouched
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

    @pytest.mark.parametrize("output", [None, {"a": x}, [x], ("x", x)])
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
