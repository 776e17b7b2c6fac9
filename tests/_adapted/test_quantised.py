"""Adapters above weights of 4 and 8 bits, against the network of the weights that they stand for.

They need bitsandbytes, which is no dependency of the project.
"""

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib.regularizers import AdapterEWC
from tests._adapted.cases import move
from tests.scenarios import same

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
each = pytest.mark.parametrize("bits", [4, 8])


def quantised(layer, bits):
    if bits == 4:
        made = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.clone(), requires_grad=False, quant_type="nf4"
        )
    else:
        made = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
    made.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return made.to("cpu")


def adapted(bits, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        base[0] = quantised(base[0], bits)
        base.is_loaded_in_4bit, base.is_loaded_in_8bit = bits == 4, bits == 8
        config = peft.LoraConfig(r=4, target_modules=["0"], **options)
        model = peft.get_peft_model(base, config)
        data = torch.randn(20, 64), torch.arange(20) % 4
    move(model, size=0.05)
    return model, data


def plain(model):
    """The network of the weights that the model stands for."""
    layer, head = model.base_model.model[0], model.base_model.model[2]
    found = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    weight = peft.utils.integrations.dequantize_module_weight(layer.base_layer).float()
    weight = weight + layer.get_delta_weight("default")
    if magnitudes := dict(layer.lora_magnitude_vector):
        weight = weight * (magnitudes["default"].weight / weight.norm(dim=1))[:, None]
    found[0].weight.data, found[0].bias.data = weight.detach(), layer.base_layer.bias.data
    found[2].load_state_dict(head.state_dict())
    return found


@each
@pytest.mark.parametrize("dora", [False, True])
def test_it_is_ewc_of_the_weights_that_the_bits_stand_for(bits, dora):
    model, data = adapted(bits, use_dora=dora)
    reference = plain(model)
    held = AdapterEWC(model, 3.0)
    ewc = EWC(reference, 3.0, params="0.weight")
    found, expected = (penalty.consolidate(data) for penalty in (held, ewc))
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-4, atol=1e-9)
    move(model, seed=1, size=0.05)
    reference.load_state_dict(plain(model).state_dict())
    torch.testing.assert_close(held.penalty(), ewc.penalty(), rtol=1e-4, atol=1e-9)


@each
def test_the_bits_are_what_they_were(bits):
    model, data = adapted(bits)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    AdapterEWC(model, 3.0).consolidate(data)
    after = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert same(after, before)


def test_an_evaluation_that_packs_the_bits_is_no_step_of_training():
    model, (x, y) = adapted(4)
    held = AdapterEWC(model, 3.0)
    held.consolidate((x, y))
    with torch.no_grad():
        model.eval()(x)
    assert held.penalty().item() == pytest.approx(0, abs=1e-12)
