"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N, Scenario
from tests.zoo.registry import animal, function, layer, read, stir


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


class Chosen(nn.Module):
    """Each token goes to the best experts, of which some are not chosen by the first ones."""

    def __init__(self, k: int, bias: float = 0.0, normalised: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.k, self.bias, self.normalised = k, bias, normalised

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores = (self.router(tokens) + self.bias * torch.arange(4, device=x.device)).softmax(-1)
        gates, chosen = scores.topk(self.k)
        if self.normalised and self.k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            at, rank = (chosen == number).nonzero(as_tuple=True)
            result = result.index_add(0, at, expert(tokens[at]) * gates[at, rank].unsqueeze(1))
        return result.unflatten(0, x.shape[:-1])


def _chosen(*shape: int, **options: Any) -> Scenario:
    x = torch.randn(24, *shape, 4)
    x[:8] = x[:1]
    return read(stir(Chosen(**options)), x)


animal("experts_top_1", lambda: _chosen(k=1))
animal("experts_top_2", lambda: _chosen(k=2))
animal("experts_top_2_of_sequences", lambda: _chosen(3, k=2))
animal("experts_top_2_without_normalisation", lambda: _chosen(3, k=2, normalised=False))
animal("experts_of_whom_some_are_idle", lambda: _chosen(k=1, bias=-20.0))


class Sorted(nn.Module):
    """Tokens are sorted by expert, so that each expert gets one slice, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        parts = x[order].split(chosen.bincount(minlength=3).tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return rows[order.argsort()] * gate.unsqueeze(1)


animal("experts_of_sorted_tokens", lambda: read(stir(Sorted()), torch.randn(24, 4)))
