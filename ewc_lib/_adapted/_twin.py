"""Copies of layers that have parameters of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib._parameters import Vector


def twin_of(module: nn.Module, parameters: Vector, kind: type[nn.Module]) -> nn.Module:
    """Return a module of some kind, which shares all but these parameters with another one."""
    twin = kind.__new__(kind)
    vars(twin).update(vars(module))
    for place in ("_parameters", "_modules", "_buffers"):
        vars(twin)[place] = dict(vars(module)[place])
    own: dict[str, Any] = twin._parameters
    own.update(parameters)
    return twin


def wide(tensor: Tensor) -> Tensor:
    """Bring half precision to single, in which a small update of a weight is not rounded away."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
