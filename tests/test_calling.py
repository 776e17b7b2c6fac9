"""Calling a network: what goes in, and what is left behind."""

import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ewc_lib._calling import Caller, evaluating, forward, untouched
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


# What a call may change


class Editing(nn.Module):
    """A model that edits its input, its buffer and its attributes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("largest", torch.zeros(()))
        self.calls, self.cache, self.seen = 0, {"features": []}, deque(maxlen=2)

    def forward(self, x):
        self.calls += 1
        self.largest.copy_(torch.maximum(self.largest, x.max()))
        self.cache["features"].append(x)
        self.seen.append(x)
        self.features = self.layer(x)
        return self.features + x.clamp_(max=1)


def test_attributes_and_containers_have_their_content_again():
    model = Editing()
    model.seen.append("before")
    held = {name: id(value) for name, value in vars(model).items()}
    with untouched(model):
        model(torch.ones(3, 2))
    assert {name: id(value) for name, value in vars(model).items()} == held
    assert (model.calls, model.cache, list(model.seen)) == (0, {"features": []}, ["before"])


def test_a_model_that_edits_gets_copies_and_another_gets_what_there_is():
    model, x = Editing(), torch.full((3, 2), 2.0)
    caller = Caller(model)
    with caller.prepared(x) as given:  # nothing is known before the first call
        before = caller.state(given)
        model(given)
        assert caller.state(given) != before
    assert x.min() == 2
    assert model.largest == 0
    assert model.calls == 0
    caller.learn(x, harmless=True)
    with caller.prepared(x[:2]) as given:
        assert given.data_ptr() == x.data_ptr()
    with caller.prepared(x[:, :1]) as given:  # another form
        assert given.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_exchanged_under_all_their_names_and_come_back(fails):
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "lstm": nn.LSTM(2, 2)})
    model["other"] = model["one"]
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    flat = [id(w) for w in model["lstm"]._flat_weights]
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = model

        def forward(self, x):
            if fails:
                raise KeyError
            return model["one"](x) + model["other"](x) + model["lstm"](x)[0]

    zeros = {f"models.{name}": value for name, value in zeros.items()}
    if fails:
        with pytest.raises(KeyError):
            forward(Both(), torch.ones(3, 2), zeros)
    else:
        assert not forward(Both(), torch.ones(3, 2), zeros).any()
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert flat == [id(w) for w in model["lstm"]._flat_weights]


class Merging(nn.Linear):
    """An adapter that is merged into its weight in eval mode."""

    def __init__(self):
        super().__init__(2, 2)
        self.change = nn.Parameter(torch.full((2, 2), 0.1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.change.data
            self.merged = not mode
        return self


def test_a_module_that_acts_on_its_mode_is_asked_to_act_back():
    model = nn.Sequential(Merging(), nn.Dropout())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_exported_program_keeps_the_mode_that_it_has():
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)).module()
    with evaluating(program):
        program(torch.ones(3, 2))
    assert (
        program.training
        == torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)).module().training
    )
