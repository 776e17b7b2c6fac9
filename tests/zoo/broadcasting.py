"""Sums and products that broadcast, and parameters that become part of the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import animal, function, layer, read

# Sums and products that broadcast

for _name, _shape in {
    "a_row": (4,),
    "a_row_of_its_own_axis": (1, 4),
    "a_column": (3, 1),
    "a_plane": (3, 4),
    "a_plane_with_an_axis_for_observations": (1, 3, 4),
    "one_number": (),
    "one_number_in_brackets": (1, 1, 1),
}.items():
    function(f"sum_with_{_name}", (3, 4), lambda p, x: x + p.b, b=_shape)
    function(f"product_with_{_name}", (3, 4), lambda p, x: x * p.w, w=_shape)
function("sum_from_the_left", (3, 4), lambda p, x: p.b + x, b=(4,))
function("product_from_the_left", (3, 4), lambda p, x: p.w * x, w=(4,))
function("sum_with_a_factor", (4,), lambda p, x: torch.add(x, p.b, alpha=2), b=(4,))
function("sum_in_place", (4,), lambda p, x: x.clone().add_(p.b).mul_(p.w), b=(4,), w=(4,))
function("difference", (4,), lambda p, x: (x - p.a) + (p.b - x.square()), a=(4,), b=(4,))
function("quotient", (3, 4), lambda p, x: x / p.w, w=(4,))
function("sum_over_as_many_positions_as_observations", (N, 2), lambda p, x: x + p.b, b=(N, 1))
function("product_over_as_many_channels_as_observations", (N,), lambda p, x: x * p.w, w=(N,))
function("sum_that_makes_the_input_larger", (1, 4), lambda p, x: torch.tanh(x + p.b), b=(3, 4))
function(
    "product_of_an_input_and_itself",
    (4,),
    lambda p, x: torch.tanh(x * p.w) * p.w + x.mean(1, keepdim=True),
    w=(4,),
)
function("learned_temperature", (4,), lambda p, x: x.log_softmax(-1) / p.t, t=())
function("learned_log_scale", (3, 4), lambda p, x: x * p.s.exp(), s=(4,))
function(
    "gated_units",
    (4,),
    lambda p, x: F.silu(x @ p.gate) * (x @ p.up),
    gate=(4, 5),
    up=(4, 5),
)
layer("gated_linear_unit", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), 4)
layer("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), 4)
layer("prelu_by_channel", lambda: nn.PReLU(N), N, 3)
animal("bilinear", lambda: read(nn.Bilinear(3, 2, 4), (torch.randn(N, 3), torch.randn(N, 2))))


# A raw parameter that becomes part of the data

function(
    "class_token",
    (3, 4),
    lambda p, x: torch.cat([p.token.expand(len(x), -1, -1), x], 1).cumsum(1),
    token=(1, 1, 4),
)
function(
    "class_token_repeated",
    (N, 2),
    lambda p, x: torch.cat([p.token.repeat(len(x), 1, 1), x], 1).cumsum(1),
    token=(1, 1, 2),
)
function(
    "class_token_without_axes",
    (3, 4),
    lambda p, x: torch.cat([p.token.expand(len(x), 1, 4), x], 1).cumsum(1),
    token=(4,),
)
function(
    "prompt",
    (3, 4),
    lambda p, x: torch.tanh(torch.cat([p.words.unsqueeze(0).expand(len(x), -1, -1), x], 1) @ p.w),
    words=(2, 4),
    w=(4, 4),
)
function("mask_token", (3, 4), lambda p, x: torch.where(x > 0, x, p.token), token=(4,))
function("positions_added", (N, 2), lambda p, x: x + p.at, at=(1, N, 2))
function("positions_sliced", (3, 4), lambda p, x: x + p.at[:, : x.shape[1]], at=(1, 5, 4))
function("positions_repeated", (4, 2), lambda p, x: x + p.at.repeat(2, 1), at=(2, 2))
function("positions_expanded", (3, 4), lambda p, x: x + p.at.expand_as(x), at=(3, 1))
function(
    "positions_looked_up",
    (N, 2),
    lambda p, x: x + F.embedding(torch.arange(x.shape[1]), p.at),
    at=(N, 2),
)
function(
    "positions_looked_up_for_each",
    (3, 2),
    lambda p, x: x + F.embedding(torch.arange(3).expand(len(x), -1), p.at),
    at=(5, 2),
)
function(
    "positions_looked_up_with_an_axis",
    (3, 2),
    lambda p, x: x + F.embedding(torch.arange(3).unsqueeze(0), p.at),
    at=(5, 2),
)
function("start_state", (3, 4), lambda p, x: _scan(p, x), start=(4,), w=(4, 4))


def _scan(p: Any, x: Tensor) -> Tensor:
    """Run over the positions, from a learned state on."""
    state = p.start.expand(len(x), -1)
    for at in range(x.shape[1]):
        state = torch.tanh(state @ p.w + x[:, at])
    return state
