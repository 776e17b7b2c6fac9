"""The network that one with adapters amounts to, against the one that peft makes by merging."""

import pytest
import torch

from ewc_lib._adapted.network import has_adapters, units, without_adapters
from tests._adapted.cases import CASES, adapted, merged, plain
from tests.scenarios import same

each = pytest.mark.parametrize("name", CASES)


@each
def test_the_tensors_are_those_of_the_merged_network(name):
    model, _ = adapted(name)
    expected = dict(merged(model).named_parameters())
    found = {n: t for unit in units(model) for n, t in unit.tensors().items()}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key].detach(), rtol=1e-9, atol=1e-9)


@each
def test_the_network_computes_what_the_one_with_adapters_does(name):
    model, (x, _) = adapted(name)
    expected = model.eval()(x)
    with without_adapters(model) as network:
        assert not has_adapters(network.model)
        torch.testing.assert_close(network.model(x), expected, rtol=1e-9, atol=1e-9)


@each
def test_the_adapters_come_back_and_nothing_has_changed(name):
    model, _ = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = list(model.modules())
    with without_adapters(model), torch.no_grad():
        pass
    assert [*model.modules()] == modules
    assert same(model.state_dict(), before)


@each
def test_what_training_changes_has_the_name_of_a_network_without_adapters(name):
    model, _ = adapted(name)
    trained = [n for unit in units(model) for n in unit.trained()]
    assert trained == CASES[name].held.split()


def test_a_merged_adapter_is_part_of_the_weight_below():
    model, _ = adapted("lora")
    before = {n: t for unit in units(model) for n, t in unit.tensors().items()}
    model.merge_adapter()
    after = {n: t for unit in units(model) for n, t in unit.tensors().items()}
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert not after["0.weight"].requires_grad


def test_adapters_that_are_switched_off_do_not_count():
    model, (x, _) = adapted("lora")
    base = plain().to(x)
    base.load_state_dict(
        {
            key.removeprefix("base_model.model.").replace("base_layer.", ""): value
            for key, value in model.state_dict().items()
            if "lora" not in key
        }
    )
    with model.disable_adapter():
        found = {n: t for unit in units(model) for n, t in unit.tensors().items()}
    assert same(found, dict(base.named_parameters()))
