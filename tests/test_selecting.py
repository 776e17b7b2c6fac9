"""Which parameters count."""

import pytest
from torch import nn

from ewc_lib._selecting import select_parameters


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
