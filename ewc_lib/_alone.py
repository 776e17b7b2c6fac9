"""A model that is run by one process: without what wrappers for training add to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ewc_lib._sharded import hiding_modules, reshard

if TYPE_CHECKING:
    from ewc_lib._gathering import Layers


@contextmanager
def alone(model: nn.Module, layers: Layers | None = None) -> Iterator[None]:
    """Let a model be run by this process, with the names of parameters that it has.

    Sharded parameters are gathered layer by layer, and all who share them have to enter.
    """
    check_not_hidden(model)
    reshard(model)
    gathered = nullcontext() if layers is None else layers.held()
    with unwrapped(model), _without_sharding_hooks(model), gathered:
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
