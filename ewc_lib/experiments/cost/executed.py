"""Multiply-adds as they are executed, and the work of a model as its modules see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ewc_lib.experiments.cost.benchmarks import Batches, Benchmark
from ewc_lib.experiments.cost.model import Layer, Work, total
from ewc_lib.experiments.cost.peers import plain_pass

__all__ = ["executed", "work_of"]


def executed(
    run: Callable[[Batches], object], batches: Callable[[int], Batches], n: int = 32
) -> float:
    """Return the multiply-adds for one observation, counted while they are executed.

    Two runs are compared, so that what does not depend on the number of observations, as the
    certificate, is left out. Attention is run written out, because fused code hides its
    operations from the counter.

    Parameters
    ----------
    run
        What to count: a function of the batches.
    batches
        Returns so many observations in batches.
    n
        Observations of the smaller run; the other one has twice as many. From 32 on the
        certificate looks at the same number in both.

    Examples
    --------
    >>> import torch
    >>> from ewc_lib import fisher_information
    >>> model = torch.nn.Linear(64, 10)
    >>> def draw(n):
    ...     return [(torch.randn(n, 64), torch.zeros(n, dtype=torch.long))]
    >>> executed(lambda data: fisher_information(model, data), draw)
    1280.0
    >>> Layer(10, 64, first=True).work.diagonal(columns=9)
    1280
    """

    def count(size: int) -> int:
        data = batches(size)
        counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
        with sdpa_kernel(SDPBackend.MATH), counter:
            run(data)
        return int(counter.get_total_flops())

    return (count(2 * n) - count(n)) / (2 * n)


def _flops(out: Any, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Count a product of matrices, or of a matrix and a vector, from the shapes of both."""
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


_IN_PLACE = {
    operation: _flops
    for operation in (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_, torch.ops.aten.addmv_)
}
"""Operations that PyTorch's counter does not know."""


def work_of(benchmark: Benchmark) -> tuple[Work, int]:
    """Return the work for one observation of any model, and how many columns its exact kind has.

    Linear maps and convolutions are seen while the model runs on a device without values, so that
    a large model costs no more than a small one. Products that belong to none of them are those of
    attention.

    Parameters
    ----------
    benchmark
        The model and its data.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
    >>> work, columns = work_of(BENCHMARKS["mlp"])
    >>> work == total([Layer(400, 784, first=True).work, Layer(400, 400).work, Layer(10, 400).work])
    True
    >>> columns
    9
    """
    there = benchmark._replace(device="meta", batch_size=64)
    with torch.device("meta"):
        model = benchmark.build().eval()
    seen: list[Layer] = []

    def see(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight, first = module.get_parameter("weight"), not inputs[0].requires_grad
        size, positions = weight[0].numel(), output[0].numel() // len(weight)
        bias = getattr(module, "bias", None) is not None
        seen.append(Layer(len(weight), size, positions, bias=bias, first=first))

    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [module.register_forward_hook(see) for module in matrices]
    columns = model(there.batches(1)[0][0]).shape[-1] - 1
    for hook in hooks:
        hook.remove()
    work = total(layer.work for layer in seen)
    attention = int(executed(lambda data: plain_pass(model, data), there.batches)) - work.plain
    work = total([work, Work(attention // 3, attention - attention // 3)])
    norms = sum(p.numel() for m in model.modules() if _is_norm(m) for p in m.parameters())
    return work._replace(squares=work.squares + norms), columns


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
