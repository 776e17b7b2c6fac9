"""Adapters of the peft library, on a small network and on a small language model."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.scenarios import N, Scenario
from tests.zoo.hugging_face import GPT2, text
from tests.zoo.registry import animal, read, stir


def on_a_network(kind: str, *, fresh: bool = False, **options: Any) -> Scenario:
    """Return a network whose two linear maps have adapters."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    config = getattr(peft, kind)(**{"target_modules": ["0", "2"], **options})
    body = peft.get_peft_model(base, config)
    return read(body if fresh else stir(body), torch.randn(N, 3, 4))


def on_gpt2(kind: str, **options: Any) -> Scenario:
    """Return a language model whose attention has adapters."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    config = getattr(peft, kind)(**{"target_modules": ["c_attn"], **options})
    return Scenario(stir(peft.get_peft_model(base, config)), *text("word"))


_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 4}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 4}),
    "lokr_in_two_factors": ("LoKrConfig", {"r": 1, "alpha": 4, "decompose_both": True}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 2}),
    "vera": ("VeraConfig", {"r": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": ["2"]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 2, "use_rslora": True, "lora_bias": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 2, "target_r": 1, "total_step": 10}),
    "fourier": ("FourierFTConfig", {"n_frequency": 5, "scaling": 1.0}),
    "hra": ("HRAConfig", {"r": 2}),
}
for _name, (_kind, _options) in _NETWORKS.items():
    animal(f"peft_{_name}", partial(on_a_network, _kind, **_options))


def _boft() -> Scenario:
    """Butterflies of rotations, for which peft would otherwise compile a CUDA extension."""
    pytest.importorskip("peft")
    with mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None):
        return on_a_network("BOFTConfig", boft_block_size=2)


animal("peft_boft", _boft)
animal("peft_loha_fresh", lambda: on_a_network("LoHaConfig", fresh=True, r=2))
animal(
    "peft_lora_with_a_whole_layer",
    lambda: on_a_network("LoraConfig", r=2, target_modules=["0"], modules_to_save=["2"]),
)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {"feedforward_modules": [], "fan_in_fan_out": True}),
    "dora": ("LoraConfig", {"r": 1, "use_dora": True, "fan_in_fan_out": True}),
    "lora_of_the_table": ("LoraConfig", {"r": 1, "target_modules": ["wte"]}),
}
for _name, (_kind, _options) in _MODELS.items():
    animal(f"peft_{_name}_on_gpt2", partial(on_gpt2, _kind, **_options))


def _two_adapters() -> Scenario:
    """Two adapters of one layer, of which the second is active."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    body = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    body.add_adapter("second", peft.LoraConfig(r=1, target_modules=["0"]))
    body.set_adapter("second")
    return read(stir(body), torch.randn(N, 4))


animal("peft_second_of_two_adapters", _two_adapters)


def _prefix() -> Scenario:
    """Learned keys and values before those of a text."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_positions": 8}))
    return Scenario(stir(peft.get_peft_model(base, config)), *text("word"))


animal("peft_prefix_tuning", _prefix)
