"""Refusing networks whose observations have no scores of their own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def check_finite_parameters(parameters: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first parameter with a NaN or infinity."""
    for name, parameter in parameters.items():
        parameter = parameter.detach()
        # One finite sum tells that all are finite, in a third of the time.
        if not parameter.sum().isfinite() and not parameter.isfinite().all():
            raise ValueError(f"parameter {name!r} holds NaN or infinite values")


def check_operation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operation that mixes the observations of a batch."""
    if function is F.batch_norm and _trains(*args, **kwargs):
        raise ValueError(
            "the model mixes observations: it normalises by the statistics of the batch in eval "
            "mode, too, so they have no scores of their own. Use running statistics"
        )


def _trains(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *others: Any,
    **options: Any,
) -> bool:
    return training


def check_modules(model: nn.Module) -> None:
    """Refuse, by name, what has no score of its own for each observation."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor: the forward pass uses another tensor
            raise ValueError(
                f"parameter {name!r} is sharded over processes; use "
                "ewc_lib.integrations.distributed.fisher_information"
            )
    for name, module in model.named_modules():
        who = f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{who} has no running statistics, so it mixes observations: they have no scores "
                "of their own. Use track_running_stats=True"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None:
                raise ValueError(
                    f"{who} has max_norm={module.max_norm}: it changes its own parameter whenever "
                    "it is called, so there is no fixed model to take scores of"
                )
            if module.scale_grad_by_freq:
                raise ValueError(
                    f"{who} has scale_grad_by_freq=True: what it returns for a gradient depends "
                    "on the batch and is not the gradient of its output"
                )
