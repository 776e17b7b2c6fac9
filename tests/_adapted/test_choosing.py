"""Choosing tensors of the network that adapters make, by their plain names."""

import pytest
from torch import nn

from ewc_lib._adapted.choosing import chooser
from ewc_lib._adapted.network import units
from tests._adapted.cases import adapted


def chosen(model, params):
    choice = chooser(model, params)
    return [n for unit in units(model) for n, t in unit.tensors().items() if choice(n, t)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("2.*", ["2.weight", "2.bias"]),
        ("base_model.model.0.base_layer.weight", ["0.weight"]),
        (["0.bias", "*.weight"], ["0.weight", "0.bias", "2.weight"]),
        (lambda name, tensor: tensor.dim() == 1, ["0.bias", "2.bias"]),
    ],
)
def test_names_patterns_and_predicates_choose(params, expected):
    assert chosen(adapted("lora")[0], params) == expected


def test_a_module_chooses_what_is_in_it_and_a_parameter_itself():
    model, _ = adapted("a whole layer")
    layers = model.base_model.model
    assert chosen(model, layers[0]) == ["0.weight", "0.bias"]
    assert chosen(model, [layers[2].modules_to_save["default"].bias]) == ["2.bias"]
    assert len(chosen(model, model)) == 4


@pytest.mark.parametrize("params", ["5.weight", [nn.Linear(2, 2)], ["0.weight", "head.*"]])
def test_what_matches_nothing_is_refused_with_what_there_is(params):
    with pytest.raises(ValueError, match=r"no such tensor is held; .* 0\.weight, 2\.weight"):
        chooser(adapted("lora")[0], params)


def test_what_is_no_choice_is_refused():
    with pytest.raises(ValueError, match="got float"):
        chooser(adapted("lora")[0], 1.0)
