"""The diagonal Fisher information as plain PyTorch computes it, by loops or ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from ewc_lib.experiments.cost.benchmarks import Batches

Diagonal: TypeAlias = dict[str, Tensor]

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Size of the gradients of single observations that torch.func holds at a time, by device."""


def plain_pass(model: nn.Module, batches: Batches) -> Diagonal:
    """Run the unit of cost: forward, mean cross-entropy, gradients of all parameters."""
    for x, y in batches:
        model.zero_grad()
        (cross_entropy(model(x), y) / y.numel()).backward()
    return {}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood, summed over observations and their tokens."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


def mean_of(parts: Callable[..., Iterator[Diagonal]]) -> Callable[..., Diagonal]:
    """Turn a generator of sums over some observations into their mean over all of them."""

    @wraps(parts)
    def mean(model: nn.Module, batches: Batches, **options: Any) -> Diagonal:
        total = {name: torch.zeros_like(p).detach() for name, p in model.named_parameters()}
        for part in parts(model, batches, **options):
            for name, value in part.items():
                total[name] += value
        n = sum(len(target) for _, target in batches)
        return {name: value / n for name, value in total.items()}

    return mean


def cut(batches: Batches, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield from zip(x.split(size), y.split(size), strict=True)


@mean_of
def loop_empirical(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """One observation at a time: the square of the gradient of its log-likelihood."""
    for x, y in cut(batches, 1):
        yield _squared_gradient(model, cross_entropy(model(x), y))


@mean_of
def loop_exact(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """One observation at a time: the expected square over the model's own labels."""
    for x, _ in cut(batches, 1):
        log_p = model(x).log_softmax(-1)[0]
        for value in log_p:
            yield _squared_gradient(model, value, weight=value.detach().exp())


def _squared_gradient(model: nn.Module, value: Tensor, weight: Tensor | float = 1.0) -> Diagonal:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
    return {name: weight * g.square() for name, g in zip(parameters, found, strict=True)}


@mean_of
def func_empirical(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """``vmap`` of ``grad`` over observations."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(x: Tensor, y: Tensor) -> Diagonal:
        def loss(parameters: Diagonal) -> Tensor:
            return cross_entropy(functional_call(model, parameters, (x[None],)), y)

        found: Diagonal = grad(loss)(parameters)
        return found

    for x, y in cut(batches, _chunk(model, 1)):
        yield {name: g.square().sum(0) for name, g in vmap(gradient)(x, y).items()}


@mean_of
def func_exact(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """``vmap`` over observations of ``vmap`` of ``vjp`` over columns of a root."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(x: Tensor) -> Diagonal:
        output, pull, *_ = vjp(lambda p: functional_call(model, p, (x[None],))[0], parameters)
        p = output.softmax(-1)
        identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
        root = p.sqrt().unsqueeze(-1) * (identity - p)
        found: Diagonal = vmap(lambda column: pull(column)[0])(root)
        return found

    classes = model(batches[0][0][:1]).shape[-1]
    for x, _ in cut(batches, _chunk(model, classes)):
        yield {name: g.square().sum((0, 1)) for name, g in vmap(gradients)(x).items()}


def _chunk(model: nn.Module, columns: int) -> int:
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    budget = CHUNK_BYTES.get(parameters[0].device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (columns * size))
