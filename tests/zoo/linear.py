"""Linear maps, however they are written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import function, layer

layer("linear", lambda: nn.Linear(4, 5), 4)
layer("linear_without_bias", lambda: nn.Linear(4, 5, bias=False), 4)
layer("linear_on_sequences", lambda: nn.Linear(4, 5), 7, 4)
layer("linear_where_all_sizes_are_equal", lambda: nn.Linear(N, N), N, N)
layer("linear_on_planes", lambda: nn.Linear(2, 4), 3, 2, 2)
layer("linear_on_single_numbers", lambda: nn.Linear(1, 1), 1)
layer("mlp", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), 4)

function(
    "linear_on_flattened_positions",
    (3, 4),
    lambda p, x: F.linear(x.reshape(-1, 4), p.w, p.b).unflatten(0, (-1, 3)),
    w=(5, 4),
    b=(5,),
)
function(
    "linear_on_positions_flattened_first",
    (N, 2),
    lambda p, x: (
        F.linear(x.transpose(0, 1).reshape(-1, 2), p.w, p.b).unflatten(0, (N, -1)).transpose(0, 1)
    ),
    w=(3, 2),
    b=(3,),
)
function(
    "linear_with_positions_first",
    (N, 2),
    lambda p, x: F.linear(x.transpose(0, 1), p.w, p.b).transpose(0, 1),
    w=(3, 2),
    b=(3,),
)
function("linear_of_one_observation_each", (4,), lambda p, x: _each(p, x), w=(5, 4), b=(5,))


def _each(p: Any, x: Tensor) -> Tensor:
    return torch.stack([F.linear(row, p.w, p.b) for row in x])


function(
    "addmm",
    (4,),
    lambda p, x: torch.addmm(p.b, x, p.w),
    b=(5,),
    w=(4, 5),
)
function(
    "addmm_on_flattened_positions",
    (3, 4),
    lambda p, x: torch.addmm(p.b, x.reshape(-1, 4), p.w).reshape(-1, 3, 5),
    b=(5,),
    w=(4, 5),
)
function(
    "addmm_with_factors",
    (4,),
    lambda p, x: torch.addmm(p.b, x, p.w, beta=0.5, alpha=-2),
    b=(5,),
    w=(4, 5),
)
function("matmul_on_the_right", (4,), lambda p, x: x @ p.w, w=(4, 5))
function("matmul_of_sequences", (3, 4), lambda p, x: torch.matmul(x, p.w), w=(4, 5))
function("matmul_by_reflection", (4,), lambda p, x: torch.mm(x, p.w), w=(4, 5))
function("matmul_with_a_transpose", (3, 4), lambda p, x: x @ p.w.T, w=(5, 4))
function("matmul_on_the_left", (4, 3), lambda p, x: p.w @ x, w=(5, 4))
function("matmul_on_the_left_of_columns", (4,), lambda p, x: (p.w @ x.mT).mT, w=(5, 4))
function("matmul_with_a_vector", (3, 4), lambda p, x: x @ p.w, w=(4,))
function("matmul_of_heads", (3, 4), lambda p, x: torch.matmul(x.unsqueeze(1), p.w), w=(2, 4, 5))
function("bmm_with_expand", (3, 4), lambda p, x: torch.bmm(x, p.w.expand(len(x), -1, -1)), w=(4, 5))
function("mixing_of_positions", (N, 2), lambda p, x: p.w @ x, w=(N, N))
function(
    "bilinear_form", (4,), lambda p, x: torch.outer((x @ p.w * x).sum(1), x.new_ones(2)), w=(4, 4)
)

function("einsum", (4,), lambda p, x: torch.einsum("ni,oi->no", x, p.w), w=(5, 4))
function(
    "einsum_with_the_parameter_first",
    (3, 4),
    lambda p, x: torch.einsum("io,nti->nto", p.w, x),
    w=(4, 5),
)
function(
    "einsum_into_heads",
    (3, 4),
    lambda p, x: torch.einsum("btd,hdk->bhtk", x, p.w),
    w=(2, 4, 3),
)
function(
    "einsum_out_of_heads",
    (2, 3, 2),
    lambda p, x: torch.einsum("bhtk,hkd->btd", x, p.w),
    w=(2, 2, 3),
)
function("einsum_with_dots", (3, 4), lambda p, x: torch.einsum("...i,io->...o", x, p.w), w=(4, 5))
function("einsum_without_arrow", (4,), lambda p, x: torch.einsum("ni,io", x, p.w), w=(4, 5))
function("einsum_of_numbers", (3, 4), lambda p, x: torch.einsum("ntd,d->ntd", x, p.w), w=(4,))
function("einsum_of_positions", (N, 2), lambda p, x: torch.einsum("nsd,ts->ntd", x, p.w), w=(N, N))
function(
    "einsum_of_three",
    (4,),
    lambda p, x: torch.einsum("ni,ir,ro->no", x, p.a, p.b),
    a=(4, 2),
    b=(2, 5),
)
