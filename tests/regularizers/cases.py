"""Every method, a small network with heads, and tasks to learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib import EWC
from ewc_lib.heads import MultiHead
from ewc_lib.regularizers import (
    EWCDR,
    L2,
    MAS,
    SI,
    KroneckerLaplace,
    LwF,
    Regularizer,
    Replay,
    RWalk,
)

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}

QUADRATIC: dict[str, Callable[[nn.Module, float], Any]] = {
    "EWC": EWC,
    "online EWC": lambda model, strength: EWC(model, strength, "online", decay=0.9),
    "L2": L2,
    "SI": SI,
    "MAS": MAS,
    "RWalk": lambda model, strength: RWalk(model, strength, interval=4),
    "EWC-DR": EWCDR,
    "Kronecker Laplace": KroneckerLaplace,
}
FUNCTION: dict[str, Callable[[nn.Module, float | None], Any]] = {
    "LwF": LwF,
    "replay": lambda model, strength=None: Replay(model, strength, capacity=3, batch_size=8),
    "joint": lambda model, strength=None: Replay(model, strength, batch_size=8),
}
METHODS: dict[str, Callable[..., Any]] = QUADRATIC | FUNCTION


def network(n_outputs: int = 4, dtype: torch.dtype = DOUBLE, seed: int = 0) -> MultiHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, n_outputs))
    return MultiHead(net.to(dtype))


def task(seed: int = 0, n: int = 20, classes: int = 2, dtype: torch.dtype = DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.arange(n) % classes


def move(model: nn.Module, seed: int = 0, size: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += (size * torch.randn(p.shape, generator=generator, dtype=DOUBLE)).to(p.dtype)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    data: tuple[Tensor, Tensor],
    steps: int = 10,
    proximal: bool = False,
    finish: bool = True,
) -> None:
    """Learn one task as a training loop does, with the same batches for every method."""
    x, y = data
    generator = torch.Generator().manual_seed(3)
    if regularizer is not None:
        regularizer.before_task()
    for _ in range(steps):
        batch = torch.randint(len(x), (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        if regularizer is not None:
            regularizer.before_step(x[batch])
            if not proximal:
                regularizer.add_gradient_()
        optimizer.step()
        if regularizer is not None:
            if proximal:
                regularizer.proximal_step_(optimizer)
            regularizer.after_step()
    if regularizer is not None and finish:
        regularizer.consolidate(data)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr)


def after_one_task(name: str, **options: Any) -> tuple[MultiHead, Any]:
    """Return a network that has learned its first head, and a method that remembers that."""
    model = network(**options)
    model.outputs = range(0, 2)
    regularizer = METHODS[name](model, 3.0)
    learn(model, sgd(model), regularizer, task(0, dtype=next(model.parameters()).dtype))
    return model, regularizer
