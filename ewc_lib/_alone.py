"""A model that no other process takes part in: without wrappers for training, parameters whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ewc_lib._sharded import hiding_modules, is_sharded, sharding_modules, whole


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let a model be run by this process alone, with the names of parameters that it has.

    Every process that shares its parameters has to enter.
    """
    check_not_hidden(model)
    with unwrapped(model), _whole_parameters(model), _without_sharding_hooks(model):
        yield


def check_not_hidden(model: nn.Module) -> None:
    """Raise a ValueError if the older way of sharding hides the parameters."""
    if hiding_modules(model):
        raise ValueError("FullyShardedDataParallel hides the parameters; use fully_shard")


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Let wrappers call what they wrap, and no more: they would wait for other processes."""
    kinds = DataParallel, DistributedDataParallel
    wrappers = [module for module in model.modules() if isinstance(module, kinds)]
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = wrapper.module.__call__
        yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("forward", None)


@contextmanager
def _whole_parameters(model: nn.Module) -> Iterator[None]:
    """Put whole parameters in the place of sharded ones."""
    for module in sharding_modules(model):
        module.reshard()
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_sharded(parameter)
    ]
    with torch.no_grad():
        found = {p: nn.Parameter(whole(p), p.requires_grad) for _, _, p in sharded}
    try:
        for module, name, parameter in sharded:
            setattr(module, name, found[parameter])
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)


@contextmanager
def _without_sharding_hooks(model: nn.Module) -> Iterator[None]:
    """Leave out the hooks of ``fully_shard``, which gather and free parameters."""
    modules = list(model.modules())
    tables = [table for m in modules for table in (m._forward_pre_hooks, m._forward_hooks)]
    entries = [dict(table) for table in tables]
    try:
        for table in tables:
            for key, hook in list(table.items()):
                if str(hook.__module__).startswith("torch.distributed.fsdp"):
                    del table[key]
        yield
    finally:
        for table, before in zip(tables, entries, strict=True):
            table.clear()
            table.update(before)
