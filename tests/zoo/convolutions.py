"""Convolutions."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from tests.scenarios import N
from tests.zoo.registry import function, layer

layer("conv1d", lambda: nn.Conv1d(2, 3, 2), 2, 5)
layer("conv1d_where_all_sizes_are_equal", lambda: nn.Conv1d(N, N, 1), N, N)
layer("conv1d_with_stride", lambda: nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=1), 2, 8)
layer("conv1d_with_a_remainder", lambda: nn.Conv1d(2, 3, 2, stride=3), 2, 7)
layer("conv1d_grouped", lambda: nn.Conv1d(4, 6, 2, groups=2), 4, 5)
layer("conv1d_depthwise", lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), 4, 5)
layer("conv1d_same", lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), 2, 8)
layer("conv1d_valid", lambda: nn.Conv1d(2, 3, 3, padding="valid"), 2, 7)
layer("conv2d", lambda: nn.Conv2d(2, 3, 2), 2, 4, 4)
layer("conv2d_pointwise", lambda: nn.Conv2d(3, 2, 1), 3, 2, 2)
layer("conv2d_of_a_whole_plane", lambda: nn.Conv2d(2, 3, 4), 2, 4, 4)
layer(
    "conv2d_asymmetric",
    lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0)),
    2,
    5,
    4,
)
layer("conv2d_grouped", lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), 4, 4, 4)
layer("conv2d_depthwise", lambda: nn.Conv2d(N, N, 2, groups=N), N, 3, 3)
layer("conv2d_same", lambda: nn.Conv2d(2, 3, 3, padding="same"), 2, 4, 4)
layer("conv3d", lambda: nn.Conv3d(1, 2, 2), 1, 3, 3, 3)
layer("conv3d_grouped", lambda: nn.Conv3d(2, 4, 2, groups=2, padding=1, stride=2), 2, 3, 3, 2)
for _mode in ("zeros", "circular", "reflect", "replicate"):
    for _padding in (1, "same"):
        _make = partial(nn.Conv1d, 2, 3, 3, padding=_padding, padding_mode=_mode)
        layer(f"conv1d_{_mode}_{_padding}", _make, 2, 5)
    layer(
        f"conv2d_{_mode}",
        partial(nn.Conv2d, 1, 2, 3, padding=(1, 2), padding_mode=_mode, groups=1),
        1,
        4,
        4,
    )
layer("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 2), 2, 4)
layer(
    "conv_transpose1d_with_stride",
    lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    4,
    3,
)
layer("conv_transpose1d_dilated", lambda: nn.ConvTranspose1d(2, 2, 2, dilation=2), 2, 3)
layer("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), 2, 2, 3)
layer(
    "conv_transpose2d_grouped",
    lambda: nn.ConvTranspose2d(4, 4, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=4),
    4,
    2,
    2,
)
layer("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), 2, 1, 2, 2)
function("functional_conv1d", (2, 4), lambda p, x: F.conv1d(x, p.w, padding=1), w=(3, 2, 2))
