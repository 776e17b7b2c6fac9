"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import (
    function,
    layer,
)


class Experts(nn.Module):
    """Each token goes to the expert that the router likes best: tokens are sorted by expert."""

    def __init__(self, by_index: bool, n_experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(4, n_experts, bias=False)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(n_experts)])
        self.by_index = by_index

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        parts = []
        for number, expert in enumerate(self.experts):
            if self.by_index:
                at = (chosen == number).nonzero().squeeze(1)
                parts.append(torch.zeros_like(tokens).index_add(0, at, expert(tokens[at])))
            else:
                parts.append(expert(tokens) * (chosen == number).unsqueeze(1))
        return (torch.stack(parts).sum(0) * gate.unsqueeze(1)).reshape(x.shape)


layer("experts_by_index", lambda: Experts(by_index=True), 3, 4)
layer("experts_by_mask", lambda: Experts(by_index=False), N, 4)
function(
    "experts_in_one_product", (3, 4), lambda p, x: _expert_products(p, x), w=(2, 4, 5), r=(4, 2)
)


def _expert_products(p: Any, x: Tensor) -> Tensor:
    gate = (x @ p.r).softmax(-1)
    return torch.einsum("nte,nti,eio->nto", gate, x, p.w)
