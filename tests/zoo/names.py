"""Modules and parameters that are registered under several names, with parameters of no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.scenarios import N, Scenario
from tests.zoo.hugging_face import GPT2, text
from tests.zoo.registry import WORDS, Functional, animal, layer, on_words, stir


class Low(nn.Module):
    """A product of three, which no rule knows."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(width, 3))
        self.v = nn.Parameter(torch.randn(3, 4))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("...i,ij,jk->...k", h, self.u, self.v)


class Named(nn.Module):
    """A body with a low-rank map behind it, of which some part has further names."""

    def __init__(self, body: nn.Module, **names: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.body = body
        self.low = Low()
        for name, part in names.items():
            self.add_module(name, part(self))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.low(h[0] if isinstance(h, tuple) else h)


def _mlp(*inner: nn.Module) -> nn.Module:
    return nn.Sequential(*(inner or [nn.Linear(4, 5)]), nn.Tanh())


def _first(model: Any) -> nn.Module:
    return model.body[0]


layer("two_names", lambda: Named(_mlp(), first=_first), 4)
layer("two_names_on_sequences", lambda: Named(_mlp(), first=_first), N, 4)
layer(
    "three_names",
    lambda: Named(_mlp(), first=_first, again=_first, parts=lambda m: nn.ModuleList([m.body[0]])),
    4,
)
layer("two_names_of_what_no_rule_knows", lambda: Named(_mlp(), head=lambda m: m.low), 4)
layer("two_names_of_a_whole_body", lambda: Named(_mlp(), encoder=lambda m: m.body), 4)
layer(
    "two_names_of_a_normalisation",
    lambda: Named(_mlp(nn.LayerNorm(4), nn.Linear(4, 5)), norm=_first),
    3,
    4,
)
layer(
    "two_names_of_a_batch_normalisation",
    lambda: Named(_mlp(nn.BatchNorm1d(4), nn.Linear(4, 5)), norm=_first),
    4,
)
layer(
    "two_names_of_a_convolution",
    lambda: Named(_mlp(nn.Conv1d(2, 3, 2)), kernel=lambda m: nn.ModuleDict({"first": m.body[0]})),
    2,
    6,
)
layer(
    "two_names_of_a_recurrent_layer",
    lambda: Named(nn.LSTM(2, 5, batch_first=True), encoder=lambda m: m.body),
    3,
    2,
)
layer(
    "two_names_of_a_parametrised_layer",
    lambda: Named(_mlp(parametrizations.weight_norm(nn.Linear(4, 5))), first=_first),
    4,
)
layer(
    "two_names_of_a_frozen_layer",
    lambda: Named(_mlp(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 5)), first=_first),
    4,
)
on_words(
    "two_names_of_a_table",
    lambda: Named(_mlp(nn.Embedding(WORDS, 5)), word_embeddings=_first),
    3,
)
on_words(
    "two_names_of_a_table_by_index",
    lambda: Named(_mlp(Functional(lambda p, x: p.w[x], w=(WORDS, 5))), word_embeddings=_first),
    3,
)


class Blocks(nn.Module):
    """Two lists that hold the same blocks, in two orders, and are run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
        self.up = nn.ModuleList(blocks)
        self.down = nn.ModuleList(reversed(blocks))
        self.low = Low(4)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.up, *self.down]:
            x = block(x)
        return self.low(x)


layer("two_lists_of_the_same_blocks", Blocks, 4)


class TiedTwice(nn.Module):
    """A table under two names, whose weight is that of the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.low = Low(4)
        self.word_embeddings = self.table
        self.head = nn.Linear(4, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.low(self.table(words))))


on_words("two_names_and_tied_weights", TiedTwice, 3)


class TwoParameters(nn.Module):
    """One parameter under two names, both of which are used."""

    def __init__(self, in_a_list: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        if in_a_list:
            self.all = nn.ParameterList([self.w, nn.Parameter(torch.randn(4, 4))])
        else:
            self.other = self.w

    def forward(self, x: Tensor) -> Tensor:
        other, last = self.all if hasattr(self, "all") else (self.other, self.w)
        return torch.einsum("ni,ij,jk->nk", torch.tanh(x @ self.w), other, last)


layer("two_names_of_a_parameter", lambda: TwoParameters(in_a_list=False), 4)
layer("two_names_of_a_parameter_in_a_list", lambda: TwoParameters(in_a_list=True), 4)


class Inside(nn.Module):
    """A layer that is registered at two depths, and called under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.low = Low(4)
        self.outer = nn.Sequential(self.low, nn.Tanh(), nn.Sequential(nn.Linear(4, 4)))
        self.linear = self.outer[2][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.low(self.outer(x))))


layer("two_names_at_two_depths", Inside, 4)


def _prompts(kind: str, frozen: bool = True, **options: Any) -> Scenario:
    """Learned prompts of the peft library before a text; it names the table of words twice."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_positions": 8}))
    model = peft.get_peft_model(base, config)
    if not frozen:
        model.requires_grad_(True)
    inputs, likelihood, words = text("word")
    unseen = words.new_full((len(words), 2), -100)
    return Scenario(stir(model), inputs, likelihood, torch.cat([unseen, words], 1))


animal("prompt_tuning", lambda: _prompts("PromptTuningConfig"))
animal("prompt_tuning_of_the_whole_model", lambda: _prompts("PromptTuningConfig", frozen=False))
animal("p_tuning", lambda: _prompts("PromptEncoderConfig", encoder_hidden_size=4))
animal(
    "p_tuning_by_a_recurrent_network",
    lambda: _prompts(
        "PromptEncoderConfig",
        encoder_hidden_size=4,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=1,
    ),
)
