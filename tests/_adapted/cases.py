"""Small networks with the adapters of peft, and what they are without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

DOUBLE = torch.float64
N = 12


class Text(nn.Module):
    """Embeddings, a linear map with a transposed weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.emb, self.middle, self.out = nn.Embedding(7, 6), conv1d(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.emb(x))).mean(1))


class Images(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second, self.out = nn.Conv2d(4, 4, 2, stride=2, groups=groups), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


class Case(NamedTuple):
    """A network, its inputs, the class of the configuration of its adapters, and the rest."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    config: str
    options: dict[str, Any]
    held: str


def vectors() -> Tensor:
    return torch.randn(N, 6, dtype=DOUBLE)


def words() -> Tensor:
    return torch.randint(0, 7, (N, 3))


def images() -> Tensor:
    return torch.randn(N, 2, 4, 4, dtype=DOUBLE)


BOTH = {"target_modules": ["0", "2"]}
EVERY_WORD = {"target_modules": ["emb", "middle", "out"]}
EVERY_IMAGE = {"target_modules": ["first", "second", "out"]}
TEXT, IMAGE = "emb.weight middle.weight out.weight", "first.weight second.weight out.weight"
LINEAR, BIASES = "0.weight 2.weight", "0.weight 0.bias 2.weight 2.bias"
ONE = {"target_modules": ["0"]}

CASES = {
    "lora": Case(plain, vectors, "Lora", BOTH | {"r": 2, "lora_alpha": 5}, LINEAR),
    "rslora with biases": Case(
        plain, vectors, "Lora", BOTH | {"r": 2, "use_rslora": True, "lora_bias": True}, BIASES
    ),
    "all biases": Case(
        plain, vectors, "Lora", ONE | {"r": 2, "bias": "all"}, "0.weight 0.bias 2.bias"
    ),
    "a whole layer": Case(
        plain, vectors, "Lora", ONE | {"r": 2, "modules_to_save": ["2"]}, "0.weight 2.weight 2.bias"
    ),
    "dora": Case(
        plain, vectors, "Lora", BOTH | {"r": 2, "use_dora": True, "lora_dropout": 0.5}, LINEAR
    ),
    "adalora": Case(
        plain, vectors, "AdaLora", BOTH | {"init_r": 2, "target_r": 1, "total_step": 9}, LINEAR
    ),
    "loha": Case(plain, vectors, "LoHa", BOTH | {"r": 2}, LINEAR),
    "lokr": Case(plain, vectors, "LoKr", BOTH | {"r": 2}, LINEAR),
    "ia3": Case(plain, vectors, "IA3", BOTH | {"feedforward_modules": ["2"]}, BIASES),
    "vera": Case(plain, vectors, "Vera", BOTH | {"r": 2}, BIASES),
    "hra": Case(plain, vectors, "HRA", BOTH | {"r": 2}, BIASES),
    "lora of words": Case(Text, words, "Lora", EVERY_WORD | {"r": 2}, TEXT),
    "dora of words": Case(Text, words, "Lora", EVERY_WORD | {"r": 2, "use_dora": True}, TEXT),
    "some words": Case(
        Text,
        words,
        "Lora",
        {"r": 2, "target_modules": ["middle"], "trainable_token_indices": {"emb": [1, 2]}},
        "emb.weight middle.weight",
    ),
    "lora of images": Case(Images, images, "Lora", EVERY_IMAGE | {"r": 2}, IMAGE),
    "dora of images": Case(Images, images, "Lora", EVERY_IMAGE | {"r": 2, "use_dora": True}, IMAGE),
    "lokr of images": Case(Images, images, "LoKr", EVERY_IMAGE | {"r": 2}, IMAGE),
}


def adapted(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a network with adapters that have been trained, and data."""
    peft, case = pytest.importorskip("peft"), CASES[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells which weights are transposed
        torch.manual_seed(0)
        config = getattr(peft, f"{case.config}Config")(**case.options)
        model = peft.get_peft_model(case.make().to(DOUBLE), config).to(DOUBLE)
        data = case.x(), torch.arange(N) % 4
    move(model)
    return model, data


def move(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Move all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += (size * torch.randn(p.shape, generator=generator, dtype=DOUBLE)).to(p.dtype)


def merged(model: nn.Module) -> nn.Module:
    """Return the network that peft makes of one with adapters; the model stays as it is."""
    return copy.deepcopy(model).merge_and_unload().requires_grad_(True)
