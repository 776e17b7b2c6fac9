"""Refusing networks whose observations have no scores of their own."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.parameter import is_lazy

from ewc_lib._sharded import is_absent

T = TypeVar("T")

_BATCH_NORM = inspect.signature(F.batch_norm)

DTYPES_DIFFER = re.compile(
    r"(same|mixed) d(ata)?type|scalar type|type .* should be the same|have the type"
)
"""How PyTorch says that inputs and parameters are of two precisions, or no indices."""


class Problem(NamedTuple):
    """Something that may be wrong with numbers on a device.

    Attributes
    ----------
    found
        Whether it is, one truth value that is still on the device.
    explain
        Raises an error that names the first place, unless a closer look finds nothing.
    """

    found: Tensor
    explain: Callable[[], None]


def settle(problems: Sequence[Problem]) -> None:
    """Ask the device once whether there is any problem, and explain the first."""
    if not problems:
        return
    found = torch.stack([problem.found for problem in problems]).tolist()
    for wrong, problem in zip(found, problems, strict=True):
        if wrong:
            problem.explain()


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are known to be finite; their lengths are, unless these overflow."""
    if not tensors:
        return True
    found = torch._foreach_norm(tensors)
    lengths = torch.stack([length.to(found[0].device) for length in found]).tolist()
    return all(map(math.isfinite, lengths))


def check_finite_parameters(parameters: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first parameter with a NaN or infinity."""
    parameters = {name: p for name, p in parameters.items() if not is_absent(p)}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device: it has no values yet")
    if all_finite([parameter.detach() for parameter in parameters.values()]):
        return
    for name, parameter in parameters.items():
        if not parameter.detach().isfinite().all():
            raise ValueError(f"parameter {name!r} holds NaN or infinite values")


def check_operation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operation that mixes observations or loses gradients."""
    if function is torch.cond or isinstance(function, HigherOrderOperator):
        name = getattr(function, "__name__", "")
        if name in ("cond", "while_loop"):
            raise ValueError(
                f"the model uses torch.{name}, whose gradient is not known outside compiled code; "
                "use Python's own if or torch.where"
            )
    if function is F.batch_norm and _BATCH_NORM.bind(*args, **kwargs).arguments.get("training"):
        raise ValueError(
            "the model mixes observations: it normalises by the statistics of the batch in eval "
            "mode, too, so they have no scores of their own. Use running statistics"
        )


def explaining(batches: Iterable[T], model: nn.Module) -> Iterator[T]:
    """Yield what a model makes of data; where it cannot take their dtype, say which it takes."""
    try:
        yield from batches
    except RuntimeError as error:
        if not DTYPES_DIFFER.search(str(error)):
            raise
        own = sorted({str(p.dtype) for p in model.parameters()})
        raise ValueError(
            f"{type(model).__name__}, with parameters of {', '.join(own)}, cannot take inputs of "
            f"this dtype, so convert one, as by inputs.to(dtype) or model.to(dtype): {error}"
        ) from error


def check_finite_sums(sums: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first parameter whose sums have overflowed."""
    sums = {name: values for name, values in sums.items() if not values.is_meta}
    if all_finite(list(sums.values())):
        return
    for name, values in sums.items():
        if not values.isfinite().all():
            dtype = str(values.dtype).removeprefix("torch.")
            raise ValueError(
                f"the Fisher information of parameter {name!r} is not finite in {dtype}: some "
                "output is so large that its gradient, or the square of it, overflows"
            )


def check_modules(model: nn.Module) -> None:
    """Refuse, by name, what has no score of its own for each observation."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor: the forward pass uses another tensor
            raise ValueError(
                f"parameter {name!r} is sharded over processes; use "
                "ewc_lib.integrations.distributed.fisher_information"
            )
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was made under torch.inference_mode(), so that no gradient "
                "can be taken in it; copy.deepcopy(model) can be used"
            )
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            raise ValueError(
                f"buffer {name!r} of a lazy module has no shape yet: run the model once, "
                "model(inputs), before"
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
