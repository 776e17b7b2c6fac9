"""One parameter, several uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib import Categorical
from tests.scenarios import N, Scenario
from tests.zoo.registry import WORDS, animal, function, layer


class Tied(nn.Module):
    """A language model of one layer, whose table of words is its head too."""

    def __init__(self, by_linear: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.middle = nn.Linear(4, 4)
        self.by_linear = by_linear

    def forward(self, words: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.table(words)))
        return F.linear(h, self.table.weight) if self.by_linear else h @ self.table.weight.T


def _language(model: nn.Module) -> Scenario:
    words = torch.randint(0, WORDS, (N, 3))
    return Scenario(model, words, Categorical(ignore_index=0), words.roll(-1, 1))


def _two_heads() -> nn.Module:
    """Two modules that share one parameter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class Loop(nn.Module):
    """A layer that is applied again and again."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(self.norm(x)))
        return x


animal("tied_embedding", lambda: _language(Tied()))
animal("tied_embedding_with_a_transpose", lambda: _language(Tied(by_linear=False)))
layer("two_modules_with_one_parameter", _two_heads, 4)
layer("module_called_in_a_loop", Loop, 4)
layer("module_called_in_a_loop_on_sequences", Loop, N, 4)
function(
    "module_called_on_parts_of_the_batch",
    (4,),
    lambda p, x: torch.cat([F.linear(part, p.w, p.b) for part in x.split(3)]),
    w=(5, 4),
    b=(5,),
)
function(
    "two_shapes_of_input",
    (N, 4),
    lambda p, x: torch.cat([x @ p.w, (x.mean(1) @ p.w).unsqueeze(1)], 1),
    w=(4, 3),
)
function("weight_and_its_transpose", (4,), lambda p, x: torch.tanh(x @ p.w) @ p.w.T, w=(4, 5))
function("weight_as_data", (4,), lambda p, x: x @ p.w + F.linear(p.w, p.w).sum(0), w=(4, 4))
function(
    "weight_penalised_inside", (4,), lambda p, x: x @ p.w * (1 + p.w.square().mean()), w=(4, 5)
)
function("weight_cut_in_two", (4,), lambda p, x: _in_two(p, x), w=(6, 4), b=(6,))


def _in_two(p: Any, x: Tensor) -> Tensor:
    """One packed projection, used by halves, as attention to a memory does."""
    (w1, w2), (b1, b2) = p.w.chunk(2), p.b.chunk(2)
    return F.linear(x, w1, b1) * torch.sigmoid(F.linear(x, w2, b2))


class Branches(nn.Module):
    """A list of layers, a dict of parameters, and a path that depends on the input's length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scales = nn.ParameterDict({"short": torch.ones(4), "long": torch.ones(4)})
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        key = "long" if x.shape[1] > 4 else "short"
        for step in self.layers[: x.shape[1] - 1]:
            x = torch.tanh(step(x)) * self.scales[key]
        return x


layer("branches", Branches, 3, 4)
