"""Tensors of which each process holds a part: all of one, and the part of this process.

What ``fully_shard`` makes of parameters is told by its ``full_tensor``, so that nobody who has no
such tensors waits for the import of their module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ewc_lib._parameters import Vector

OWNER = "_layers_of_a_sharded_model"
"""An attribute of parameters that stand for sharded ones: what gathers their values."""


def owner_of(tensors: Iterable[Tensor]) -> Any:
    """Return what gathers the values of some parameters, or None if they have values."""
    return next((getattr(t, OWNER) for t in tensors if hasattr(t, OWNER)), None)


def is_absent(tensor: Tensor) -> bool:
    """Tell whether a parameter stands for a sharded one whose values are not there now."""
    return hasattr(tensor, OWNER) and not any(tensor.stride())


def present(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Have the values of all parameters, if some of these stand for sharded ones."""
    owner = owner_of(tensors)
    found: AbstractContextManager[None] = nullcontext() if owner is None else owner.all_present()
    return found


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Tell whether processes share a tensor."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Tell whether processes share one of some tensors."""
    return any(map(is_sharded, tensors))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, differentiable; every process that shares it has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def total(numbers: list[Tensor]) -> Tensor:
    """Add scalars, of which each process may have a part only."""
    if not any_sharded(numbers):
        return torch.stack(numbers).sum()
    alike: dict[Any, list[Tensor]] = {}
    for number in numbers:
        key = (number.device_mesh, number.placements) if is_sharded(number) else None
        alike.setdefault(key, []).append(number)
    return torch.stack([whole(torch.stack(some).sum()) for some in alike.values()]).sum()


def part_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Shard a tensor as another one is, of which every process has all, or make it whole."""
    if not is_sharded(like):
        return whole(tensor)
    if is_sharded(tensor):
        everywhere: Any = tensor
    else:
        from torch.distributed.tensor import DTensor  # where there is one, it is imported

        everywhere = DTensor.from_local(tensor, like.device_mesh, run_check=False)
    part: Tensor = everywhere.redistribute(like.device_mesh, like.placements)
    return part


def placed_like(like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Vector:
    """Shard tensors as those of the same names are."""
    if not any_sharded([*like.values(), *values.values()]):
        return dict(values)
    return {name: part_like(like[name], value) for name, value in values.items()}


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called with."""
    return _instances(model, "FSDPModule")


def hiding_modules(model: nn.Module) -> list[Any]:
    """Return the modules that the older way of sharding has wrapped."""
    return _instances(model, "FullyShardedDataParallel")


def _instances(model: nn.Module, name: str) -> list[Any]:
    """Return modules of a class that exists only where somebody has imported it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), name, ())
    return [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Let all modules hold their part again, which is what an optimizer changes.

    After a forward pass, the outermost ones go on holding whole parameters for the way back.
    """
    for module in sharding_modules(model):
        module.reshard()
