"""One Fisher information of several processes, each of which has a part of the data.

They may share the model, too, in parts or in a wrapper for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ewc_lib._alone import alone
from ewc_lib._loaders import unpadded, waits_for_others
from ewc_lib._names import plain_names
from ewc_lib._pooling import NOT_LINEAR, Ranks, add_up, initialised, not_linear, with_sums
from ewc_lib._selecting import fixed, select_parameters
from ewc_lib._sharded import any_sharded, is_sharded, owner_of, placed_like
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.structures import Diagonal, Fisher

if TYPE_CHECKING:
    from ewc_lib._gathering import Layers

Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"
"""The processes that have a part of the data each: these, only this one (False), or all."""


def taking_part(group: Group = None) -> Ranks | None:
    """Return those who have parts of the data, or None if this process has all of them."""
    if group is False or (group is None and not initialised()):
        return None
    found = Ranks.of(group or None)
    return None if group is None and found.size == 1 else found


def fisher_of_ranks(
    model: nn.Module,
    data: Any,
    likelihood: Any = None,
    *,
    group: Group = None,
    seed: int = 0,
    **options: Any,
) -> Fisher:
    """Return the Fisher information of the data of all ranks, on every rank.

    Parameters
    ----------
    model, likelihood, options
        As in :func:`ewc_lib.fisher_information`.
    data
        As there, the part of this rank.
    group
        Who has a part of the data.
    seed
        Of the random numbers, if no generator is given; each rank has others.
    """
    ranks = taking_part(group)
    if ranks and ranks.rank:
        options["progress"] = options.get("progress") or False
    given = options.get("params")
    options["params"] = attempted(lambda: fixed(model, given))

    def compute() -> Fisher:
        params = options["params"]()
        if ranks and options.get("structure") in NOT_LINEAR:
            raise ValueError(not_linear(f"structure={options['structure']!r}"))
        if options.get("generator") is None:
            device = next(iter(select_parameters(model, params).values())).device
            size, rank = (ranks.size, ranks.rank) if ranks else (1, 0)
            options["generator"] = torch.Generator(device).manual_seed(seed * size + rank)
        own = share_of(data, model) if ranks else data
        return fisher_information(model, own, likelihood, **options | {"params": params})

    return over_ranks(model, compute, ranks, wide=options.get("precision") != "high")


def share_of(data: Any, model: nn.Module) -> Any:
    """Return the data of this process, each observation once.

    Where processes meet for each layer, they cannot also meet for each batch.
    """
    own = unpadded(data)
    return list(own) if waits_for_others(data) and owner_of(model.parameters()) else own


def attempted(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function now, and return or raise what came out when it is asked for."""
    try:
        found = function()
    except ValueError as error:
        mistake = error

        def fail() -> Any:
            raise mistake

        return fail
    return lambda: found


def over_ranks(
    model: nn.Module, compute: Callable[[], Fisher], ranks: Ranks | None, wide: bool = True
) -> Fisher:
    """Compute on each rank, where no other takes part in the model, and merge what they find.

    ``wide`` tells whether what is sharded in half precision is run in single precision.
    """
    device = next(model.parameters(), torch.empty(0)).device
    layers = _layers(model, ranks, wide)
    with alone(model, layers):
        if ranks is None:
            F = with_sums(_served(compute, layers)(), layers)
        else:
            model_is = None if layers else _fingerprint(model)
            with _same_buffers(model, ranks):
                F = add_up(_served(compute, layers), device, ranks, model_is, layers)
    return _shard_like(model, F)


def _layers(model: nn.Module, ranks: Ranks | None, wide: bool) -> Layers | None:
    """Return what gathers the parameters that processes share, if they do."""
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    if not sharded:
        return None
    from ewc_lib._gathering import Layers  # which imports what takes half a second

    meshes = list(dict.fromkeys(p.device_mesh for p in sharded))
    group = ranks.group if ranks else _group_of(meshes)
    members = set(dist.get_process_group_ranks(group))
    if strangers := {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()} - members:
        raise ValueError(
            f"ranks {sorted(strangers)} share the parameters of the model, but are not in the group"
        )
    return Layers(model, group, ranks is not None, wide)


def _group_of(meshes: list[Any]) -> dist.ProcessGroup | None:
    """Return a group of all who share a model."""
    if len(meshes) == 1 and meshes[0].ndim == 1:
        group: dist.ProcessGroup = meshes[0].get_group()
        return group
    return None


def _served(compute: Callable[[], Fisher], layers: Layers | None) -> Callable[[], Fisher]:
    """Compute, then help the others to do so."""
    if layers is None:
        return compute

    def served() -> Fisher:
        try:
            layers.check_finite()
            return compute()
        finally:
            layers.serve()

    return served


def _fingerprint(model: nn.Module) -> tuple[float, float, float] | None:
    """Return two numbers that are others for other parameters, and what rounding makes of them."""
    with torch.no_grad():
        parameters = [p.detach() for p in model.parameters() if not p.is_meta and p.numel()]
        real = [torch.view_as_real(p) if p.is_complex() else p for p in parameters]
        sums = [float(p.double().sum()) for p in real if p.is_floating_point()]
        lengths = [float(p.double().norm()) for p in real if p.is_floating_point()]
    if not lengths:
        return None
    eps = max(torch.finfo(p.dtype).eps for p in real if p.is_floating_point())
    size = math.hypot(*lengths)
    return sum(sums), size, math.sqrt(eps) * size


@contextmanager
def _same_buffers(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Let all ranks have the buffers of the first, where each forward pass would do that.

    Running statistics differ between ranks after a step, until the next one.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    shared = [m for m in wrappers if m.broadcast_buffers]
    buffers = list({id(b): b for m in shared for b in m.buffers()}.values())
    before = [buffer.detach().clone() for buffer in buffers]
    members = dist.get_process_group_ranks(ranks.group)
    with torch.no_grad():
        for buffer in buffers:
            dist.broadcast(buffer, members[0], group=ranks.group)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _shard_like(model: nn.Module, F: Fisher) -> Fisher:
    """Keep of a diagonal what this rank keeps of the parameters."""
    given: dict[str, Tensor] = dict(model.named_parameters())
    if not isinstance(F, Diagonal) or not any_sharded(given.values()):
        return F
    parameters = {plain: given[name] for name, plain in plain_names(given).items()} | given
    return replace(F, values=placed_like({name: parameters[name] for name in F.values}, F.values))
