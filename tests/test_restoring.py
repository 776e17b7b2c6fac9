"""Giving a network back as it was."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from ewc_lib._restoring import evaluating, same_attributes, untouched
from tests.scenarios import same, trace_of


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


class Remembering(nn.Module):
    """A model that remembers what it has seen, in every kind of place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls, self.cache, self.seen = 0, {"features": []}, deque(maxlen=2)

    def forward(self, x):
        self.calls += 1
        self.cache["features"].append(x)
        self.seen.append(x)
        self.features = self.layer(x)
        self.layer.weight.requires_grad_(False)
        return random.random() * np.random.rand() * self.features


def test_attributes_and_containers_have_their_content_again():
    model = Remembering()
    model.seen.append("before")
    held = {name: id(value) for name, value in vars(model).items()}
    with untouched(model):
        model(torch.ones(3, 2))
    assert {name: id(value) for name, value in vars(model).items()} == held
    assert model.layer.weight.requires_grad
    assert (model.calls, model.cache, list(model.seen)) == (0, {"features": []}, ["before"])


def test_attributes_of_any_object_have_their_content_again():
    class Configuration:
        problem, classes = None, []

    configuration = Configuration()
    configuration.classes = []
    with same_attributes([configuration, None]):
        configuration.problem = "regression"
        configuration.classes.append(1)
    assert vars(configuration) == {"classes": []}


def test_python_and_numpy_draw_what_they_would_have_drawn():
    before = random.getstate(), np.random.get_state()
    with untouched(model := Remembering()):
        model(torch.ones(3, 2))
    assert same((random.getstate(), np.random.get_state()), before)


def test_a_parameter_that_was_converted_has_its_memory_again():
    model = nn.Linear(2, 2)
    weight, memory = model.weight, model.weight.data_ptr()
    with untouched(model):
        model.double()
    assert model.weight is weight
    assert (weight.dtype, weight.data_ptr()) == (torch.float32, memory)


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
