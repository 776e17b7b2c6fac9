"""Layers with low-rank updates of this package."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ewc_lib._adapted.low_rank import LowRankUpdate, UpdatedLayer, add_adapters
from ewc_lib._adapted.network import has_adapters, units, without_adapters
from tests._adapted.cases import DOUBLE, move, plain


def updated(*ranks, dtype=DOUBLE):
    model = plain().to(dtype)
    for rank in ranks:
        add_adapters(model, ["0"], rank)
        move(model)
    return model


@pytest.mark.parametrize("ranks", [(2,), (2, 1)])
def test_the_weight_is_the_one_with_all_updates(ranks):
    model = updated(*ranks)
    found = {n: t for unit in units(model) for n, t in unit.tensors().items()}
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(found["0.weight"], model[0].weight, rtol=1e-12, atol=1e-12)


def test_an_update_of_half_precision_is_not_rounded_away():
    model = updated(2, dtype=torch.bfloat16)
    before = next(iter(units(model))).tensors()["0.weight"]
    update = model[0].parametrizations.weight[0]
    with torch.no_grad():
        update.B[0, 0] = update.B[0, 0] * (1 + 2**-7)
    change = next(iter(units(model))).tensors()["0.weight"] - before
    assert change.dtype == torch.float32
    assert change[0].abs().min() > 0
    assert not change[1:].any()


@pytest.mark.parametrize("alone", [True, False])
def test_a_layer_without_its_updates_computes_the_same(alone):
    whole = updated(2)
    model, x = whole[0] if alone else whole, torch.randn(5, 6, dtype=DOUBLE)
    expected, kind = model(x), type(whole[0])
    with without_adapters(model) as network:
        assert not has_adapters(network.model)
        torch.testing.assert_close(network.model(x), expected, rtol=1e-12, atol=1e-12)
    assert type(whole[0]) is kind is not nn.Linear
    assert parametrize.is_parametrized(whole[0], "weight")


def test_other_parametrizations_are_no_updates():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert not UpdatedLayer.is_one(model)
    bare, both = nn.Linear(3, 2), nn.Linear(3, 2)
    assert not UpdatedLayer.is_one(bare)
    update = LowRankUpdate(both.weight, 1, torch.Generator().manual_seed(0))
    parametrize.register_parametrization(both, "weight", update)
    assert UpdatedLayer.is_one(both)
    parametrize.register_parametrization(both, "bias", nn.Tanh())
    assert not UpdatedLayer.is_one(both)
