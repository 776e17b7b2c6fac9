"""Ways of running a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.scenarios import HiddenLinear
from tests.zoo.registry import function, layer


class Saving(nn.Module):
    """A body whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.inner, self.stem(x), use_reentrant=self.reentrant)
        return h


layer("checkpoint", Saving, 3, 4)
layer(
    "compiled",
    lambda: torch.compile(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5)), backend="eager"
    ),
    3,
    4,
)
layer("traced", lambda: torch.jit.trace(nn.Linear(4, 5), torch.randn(2, 4)), 4)
layer(
    "scripted",
    lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    4,
)
function(
    "custom_function",
    (4,),
    lambda p, x: torch.tanh(HiddenLinear.apply(x, p.hidden)) @ p.seen,
    hidden=(5, 4),
    seen=(5, 3),
)
