"""Attention and the layers around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N, Scenario
from tests.zoo.registry import Functional, PositionsFirst, animal, layer, read, stir


class Attend(nn.Module):
    """Attention of a sequence to itself, or to a memory of another width."""

    def __init__(self, width: int = 4, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.5, "batch_first": True, **options}
        self.attention = nn.MultiheadAttention(width, 2, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        if not self.attention.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h, weights = self.attention(x, memory, memory, need_weights=self.need_weights)
        h = h if self.attention.batch_first else h.transpose(0, 1)
        return torch.cat([h.flatten(1), weights.flatten(1)], 1) if self.need_weights else h


layer("attention", lambda: Attend(), 3, 4)
layer("attention_with_weights", lambda: Attend(need_weights=True), 3, 4)
layer("attention_without_bias", lambda: Attend(bias=False), 3, 4)
layer("attention_with_positions_first", lambda: Attend(batch_first=False), 3, 4)
layer("attention_over_as_many_positions_as_observations", lambda: Attend(batch_first=False), N, 4)
layer("attention_with_extra_keys", lambda: Attend(add_bias_kv=True), 3, 4)
layer(
    "attention_with_extra_keys_and_positions_first",
    lambda: Attend(add_bias_kv=True, add_zero_attn=True, batch_first=False),
    3,
    4,
)


def _cross_attention(batch_first: bool, **widths: int) -> Scenario:
    body = stir(Attend(batch_first=batch_first, **widths))
    width = widths.get("kdim", 4)
    return read(body, (torch.randn(N, 3, 4), torch.randn(N, N, width)))


animal("cross_attention", lambda: _cross_attention(True))
animal("cross_attention_of_other_widths", lambda: _cross_attention(True, kdim=3, vdim=3))
animal("cross_attention_with_positions_first", lambda: _cross_attention(False, kdim=3, vdim=3))


def _block(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    options = {"dim_feedforward": 5, "dropout": 0.5, "batch_first": True, **options}
    return kind(4, 2, **options)


layer("encoder_layer", _block, 3, 4)
layer("encoder_layer_norm_first", lambda: _block(norm_first=True, activation="gelu"), 3, 4)
layer(
    "encoder_layer_with_positions_first",
    lambda: PositionsFirst(_block(batch_first=False)),
    N,
    4,
)


def _freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


layer(
    "encoder_layer_frozen_below_a_head",
    lambda: _freeze(nn.Sequential(_block(), nn.Linear(4, 3)), "0"),
    3,
    4,
)
layer(
    "encoder_layer_frozen_above_a_stem",
    lambda: _freeze(nn.Sequential(nn.Linear(2, 4), _block()), "1"),
    3,
    2,
)
layer("encoder_layer_frozen_in_part", lambda: _freeze(_block(), "self_attn", "norm1"), 3, 4)


def _encoder(frozen: bool = False) -> Scenario:
    """An encoder of two layers, where some positions are padding."""
    encoder = stir(nn.TransformerEncoder(_block(), 2, norm=nn.LayerNorm(4)))
    if frozen:
        encoder.layers.requires_grad_(False)
    padding = torch.arange(3) >= torch.randint(1, 4, (N, 1))
    padding[1] = False
    body = Functional(
        lambda p, x, padding: p.encoder(x, src_key_padding_mask=padding).masked_fill(
            padding.unsqueeze(-1), 0
        )
    )
    body.encoder = encoder
    return read(body, (torch.randn(N, 3, 4), padding))


animal("encoder_with_padding", _encoder)
animal("encoder_with_padding_frozen", lambda: _encoder(frozen=True))


def _decoder(**options: Any) -> Scenario:
    body = stir(_block(nn.TransformerDecoderLayer, **options))
    inputs = torch.randn(N, 3, 4), torch.randn(N, N, 4)
    return read(body if options.get("batch_first", True) else PositionsFirst(body), inputs)


animal("decoder_layer", _decoder)
animal("decoder_layer_norm_first", lambda: _decoder(norm_first=True))
animal("decoder_layer_with_positions_first", lambda: _decoder(batch_first=False))
