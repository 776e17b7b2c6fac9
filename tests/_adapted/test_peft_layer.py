"""Layers of peft: the weight that each has, and what has none."""

import pytest
import torch
from torch import nn

from ewc_lib._adapted.network import units
from tests._adapted.cases import DOUBLE, Images, adapted, move, plain


def peft_model(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


def tensors(model):
    return {n: t for unit in units(model) for n, t in unit.tensors().items()}


def check(model):
    for unit in units(model):
        if unit.layer is not None:
            unit.layer.check()


def test_the_gradient_of_a_weight_goes_through_its_length_as_well():
    model, _ = adapted("dora")
    trained = [p for p in model.parameters() if p.requires_grad]
    weight = tensors(model)["0.weight"]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    found = torch.autograd.grad((weight * direction).sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, found, strict=True):
        if gradient is None:
            continue
        way, ends = torch.ones_like(parameter), []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * way
                ends.append((tensors(model)["0.weight"] * direction).sum())
        with torch.no_grad():
            parameter += 1e-6 * way
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dora", [False, True])
def test_several_active_adapters_act_one_after_the_other(dora):
    peft = pytest.importorskip("peft")
    model = peft_model(plain().to(DOUBLE), target_modules=["0", "2"], use_dora=dora)
    model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    model.to(DOUBLE)
    move(model)
    check(model)
    both = tensors(model)["0.weight"]
    model.base_model.set_adapter(["second"])
    check(model)
    assert (tensors(model)["0.weight"] - both).abs().max() > 1e-3


def test_a_layer_whose_output_is_no_linear_map_is_refused_by_name():
    model, _ = adapted("lora")
    layer = model.base_model.model[0]
    forward = layer.forward
    layer.forward = lambda x: forward(x) + x.square().sum(-1, keepdim=True)
    with pytest.raises(ValueError, match=r"the layer 'base_model\.model\.0' .* not that of one"):
        check(model)


def test_an_adapter_that_cannot_be_merged_is_refused_by_name():
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = peft_model(Images(groups=2), target_modules=["second"])
    with pytest.raises(ValueError, match=r"the layer 'base_model\.model\.second' .* cannot merge"):
        tensors(model)


def test_a_layer_without_a_weight_is_refused_by_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    model = peft_model(Attention(), target_modules=["attention"])
    with pytest.raises(ValueError, match=r"the layer 'base_model\.model\.attention' .* no weight"):
        units(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_step_of_an_adapter_is_not_rounded_away_by_a_weight_of_half_precision(dtype):
    model = peft_model(plain().to(dtype), target_modules=["0"])
    move(model, size=0.1)
    before = tensors(model)["0.weight"]
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight += 1e-4
    change = tensors(model)["0.weight"] - before
    assert change.dtype == torch.float32
    expected = 1e-4 * model.base_model.model[0].lora_A["default"].weight.float().sum(0)
    scaling = model.base_model.model[0].scaling["default"]
    torch.testing.assert_close(change, (scaling * expected).expand(8, 6), rtol=1e-2, atol=1e-6)
