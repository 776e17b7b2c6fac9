"""Parametrisations and adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.scenarios import N, Scenario
from tests.zoo.hugging_face import GPT2, text
from tests.zoo.registry import animal, layer, read, stir


def _parametrised(wrap: Callable[[nn.Module], nn.Module], width: int = 4) -> Callable[..., Any]:
    return lambda: nn.Sequential(wrap(nn.Linear(4, width)), nn.Tanh(), nn.Linear(width, 3))


layer("weight_norm", _parametrised(parametrizations.weight_norm), 4)
layer("spectral_norm", _parametrised(parametrizations.spectral_norm), 4)
layer("orthogonal", _parametrised(parametrizations.orthogonal), 4)
layer(
    "orthogonal_by_matrix_exponential",
    _parametrised(partial(parametrizations.orthogonal, orthogonal_map="matrix_exp")),
    4,
)
layer(
    "weight_norm_of_a_convolution", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), 2, 4
)


def _lora(trained: bool) -> Scenario:
    """An adapter of the peft library, as it starts (no change) or later; its base is frozen."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], lora_dropout=0.5)
    body = peft.get_peft_model(base, config)
    if trained:
        with torch.no_grad():
            for name, parameter in body.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    return read(body, torch.randn(N, 3, 4))


animal("lora_fresh", lambda: _lora(trained=False))
animal("lora_trained", lambda: _lora(trained=True))


def _lora_on_gpt2() -> Scenario:
    """Adapters of attention in a language model, whose linear maps have transposed weights."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    return Scenario(stir(peft.get_peft_model(model, config)), *text("word"))


animal("lora_on_gpt2", _lora_on_gpt2)


class Adapter(nn.Module):
    """A linear map with a low-rank change, written by hand, in two ways."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(5, 2))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


layer("adapter", lambda: Adapter(merged=False), 3, 4)
layer("adapter_merged", lambda: Adapter(merged=True), 3, 4)
