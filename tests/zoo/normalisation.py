"""Normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import function, layer


def after_linear(make: Callable[[], nn.Module], inputs: int, outputs: int) -> Callable[..., Any]:
    """Put a layer without parameters behind one that has some."""
    return lambda: nn.Sequential(nn.Linear(inputs, outputs), make())


layer("layer_norm", lambda: nn.LayerNorm(4), 4)
layer("layer_norm_of_sequences", lambda: nn.LayerNorm(4), N, 4)
layer("layer_norm_of_planes", lambda: nn.LayerNorm((3, 4)), 3, 4)
layer("layer_norm_without_bias", lambda: nn.LayerNorm(4, bias=False), 3, 4)
layer(
    "layer_norm_without_affine",
    after_linear(lambda: nn.LayerNorm(4, elementwise_affine=False), 3, 4),
    3,
)
layer("rms_norm", lambda: nn.RMSNorm(4), 4)
layer("rms_norm_of_sequences", lambda: nn.RMSNorm(4), 7, 4)
layer(
    "rms_norm_without_affine",
    after_linear(lambda: nn.RMSNorm(4, elementwise_affine=False), 3, 4),
    3,
)
function(
    "rms_norm_by_hand",
    (3, 4),
    lambda p, x: p.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    w=(4,),
)
layer("group_norm", lambda: nn.GroupNorm(2, 4), 4, 3)
layer("group_norm_of_images", lambda: nn.GroupNorm(2, N), N, 2, 2)
layer("group_norm_without_affine", after_linear(lambda: nn.GroupNorm(2, 4, affine=False), 3, 4), 3)
layer("instance_norm1d", lambda: nn.InstanceNorm1d(3, affine=True), 3, 4)
layer("instance_norm2d", lambda: nn.InstanceNorm2d(2, affine=True), 2, 3, 3)
layer(
    "instance_norm_with_running_statistics",
    lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    2,
    3,
    3,
)
layer(
    "instance_norm_without_affine",
    lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3)),
    2,
    4,
)
layer("batch_norm1d", lambda: nn.BatchNorm1d(4), 4)
layer("batch_norm1d_of_sequences", lambda: nn.BatchNorm1d(N), N, N)
layer("batch_norm2d", lambda: nn.BatchNorm2d(2), 2, 3, 3)
layer("batch_norm3d", lambda: nn.BatchNorm3d(2), 2, 2, 2, 2)
layer("batch_norm_without_affine", after_linear(lambda: nn.BatchNorm1d(4, affine=False), 3, 4), 3)


def _functional_norm(p: Any, x: Tensor) -> Tensor:
    mean, variance = torch.linspace(-1, 1, 3).double(), torch.linspace(0.5, 2, 3).double()
    return F.batch_norm(x, mean.to(x), variance.to(x), p.w, p.b, training=False)


function("functional_batch_norm", (3, 4), _functional_norm, w=(3,), b=(3,))
