r"""The Fisher information of data that several processes hold, each a part of it.

Rank :math:`r` has :math:`N_r` observations and their mean :math:`F_r`. The mean over all is

.. math:: F = \sum_r \frac{N_r}{\sum_q N_q} F_r ,

so the ranks work alone and meet once, at the end: they first tell each other how it went and
how many observations they have, in a small message, and then add one flat buffer with all
numbers. A rank that fails says so in the message, and every rank raises an error.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ewc_lib._alone import alone
from ewc_lib._checking import check_finite_sums
from ewc_lib._loaders import unpadded, waits_for_others
from ewc_lib._names import plain_names
from ewc_lib._parameters import Vector
from ewc_lib._selecting import fixed, select_parameters
from ewc_lib._sharded import any_sharded, is_sharded, owner_of, placed_like
from ewc_lib.errors import EmptyData
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.structures import BlockDiagonal, Diagonal, EigenKronecker, Fisher, LowRank

if TYPE_CHECKING:
    from ewc_lib._gathering import Layers

Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"
"""The processes that have a part of the data each: these, only this one (False), or all."""

NOT_LINEAR = "eigenkronecker", "lowrank"
"""Structures that those of parts of the data do not add up to."""


class Ranks(NamedTuple):
    """This process among those that have a part of the data each.

    Attributes
    ----------
    group
        The processes; None for all.
    rank
        The number of this one.
    size
        How many there are.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Raise a RuntimeError if there is no group, or if this process is not in it."""
        if not _initialised():
            raise RuntimeError(
                "torch.distributed is not initialised: start the processes with torchrun and call "
                "torch.distributed.init_process_group() in each"
            )
        if (rank := dist.get_rank(group)) < 0:
            raise RuntimeError(f"rank {dist.get_rank()} is not in the group")
        return cls(group, rank, dist.get_world_size(group))


def taking_part(group: Group = None) -> Ranks | None:
    """Return those who have parts of the data, or None if this process has all of them."""
    if group is False or (group is None and not _initialised()):
        return None
    found = Ranks.of(group or None)
    return None if group is None and found.size == 1 else found


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


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
            F = _with_sums(_served(compute, layers)(), layers)
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


def _with_sums(F: Fisher, layers: Layers | None) -> Fisher:
    """Fill in the means of sums that processes share, each of which has its part."""
    if layers is None or not isinstance(F, Diagonal):
        return F
    numbers = layers.names()
    means = {
        name: layers.sum_of(numbers[name], value.dtype) / F.n_samples
        for name, value in F.values.items()
        if value.is_meta
    }
    _check_finite(means, layers)
    return replace(F, values={**F.values, **means})


def _check_finite(shared: Vector, layers: Layers) -> None:
    """Raise the same ValueError on all ranks if a part of some mean has overflowed."""
    if not shared:
        return
    finite = layers.finite(shared.values())
    for (name, value), fine in zip(shared.items(), finite, strict=True):
        if not fine:
            check_finite_sums({name: torch.full((), torch.nan, dtype=value.dtype)})


def not_linear(what: str) -> str:
    """Say why parts of some structures do not add up."""
    return (
        f"{what}: the eigenvectors of parts of the data do not add up to those of all data; "
        "choose another structure, or compute it in one process"
    )


class Message(NamedTuple):
    """What a rank tells the others before the numbers are added.

    Attributes
    ----------
    error
        Type and first line of the error that it met, or None.
    form
        Its Fisher information without the numbers, or None if it has no observation.
    model
        Sum and length of its parameters, and how much these may differ.
    away
        Whether the processes keep some of its numbers in parts.
    """

    error: str | None
    form: Fisher | None
    model: tuple[float, float, float] | None
    away: bool


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


def add_up(
    compute: Callable[[], Fisher],
    device: torch.device | str,
    ranks: Ranks,
    model: tuple[float, float, float] | None = None,
    layers: Layers | None = None,
) -> Fisher:
    """Compute on this rank, and return the mean over the observations of all ranks.

    A rank without observations adds zeros on the given device.
    """
    F, failure = None, None
    try:
        F = compute()
    except EmptyData:
        pass
    except Exception as error:
        failure = error
    found, away = _exchange(F, failure, ranks, model)
    whole = _pool(found)
    if not away or layers is None or not isinstance(whole, Diagonal):
        return _reduced(F, whole, device, ranks)
    names = layers.names().keys()  # of what is in parts, which are those of all ranks already
    there: Vector = {}
    if whole.values.keys() - names:
        own = _without(F, names) if isinstance(F, Diagonal) else None
        there = _reduced(own, _without(whole, names), device, ranks).diagonal()
    return _with_sums(replace(whole, values=whole.values | there), layers)


def _without(F: Diagonal, names: Collection[str]) -> Diagonal:
    return replace(F, values={n: d for n, d in F.diagonal().items() if n not in names})


def _reduced(F: Fisher | None, whole: Fisher, device: torch.device | str, ranks: Ranks) -> Fisher:
    """Add the numbers of all ranks, each with its weight."""
    if F is None:
        like = torch.cat([tensor.reshape(-1) for tensor in whole._numbers()])
        numbers = torch.zeros_like(like, device=device)
    else:
        numbers = torch.cat([tensor.reshape(-1) for tensor in F._numbers()])
        numbers *= F.n_samples / whole.n_samples
    dist.all_reduce(numbers, group=ranks.group)
    pieces = iter(numbers.split([tensor.numel() for tensor in whole._numbers()]))
    return whole._map(lambda tensor: next(pieces).view(tensor.shape).to(tensor.dtype))


def _exchange(
    F: Fisher | None,
    failure: Exception | None,
    ranks: Ranks,
    model: tuple[float, float, float] | None,
) -> tuple[list[Fisher | None], bool]:
    """Return what every rank has, without the numbers, or raise if one has failed.

    The second tells whether some numbers are kept in parts, elsewhere.
    """
    away = F is not None and any(tensor.is_meta for tensor in F._numbers())
    own = Message(_first_line(failure) if failure else None, F and F.to("meta"), model, away)
    messages: list[Any] = [None] * ranks.size
    dist.all_gather_object(messages, own, ranks.group)
    if failure:
        raise failure
    if failed := [f"rank {rank} failed: {m.error}" for rank, m in enumerate(messages) if m.error]:
        raise RuntimeError("; ".join(failed))
    _check_same_model(messages)
    return [message.form for message in messages], any(message.away for message in messages)


def _check_same_model(messages: list[Message]) -> None:
    """Raise a ValueError if a rank has other values of the parameters than the first."""
    first = messages[0].model
    for rank, message in enumerate(messages):
        if first is None or message.model is None:
            continue
        apart = max(abs(a - b) for a, b in zip(first[:2], message.model[:2], strict=True))
        if apart > first[2]:
            raise ValueError(
                f"the parameters on rank {rank} have other values than those on rank 0, so there "
                "is no Fisher information of both; with group=False each process works for itself"
            )


def _first_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].partition("\n")[0]


def _pool(forms: list[Fisher | None]) -> Fisher:
    """Return what all ranks have together, without the numbers."""
    present = [(rank, form) for rank, form in enumerate(forms) if form is not None]
    if not present:
        raise EmptyData("data is empty: no rank holds an observation")
    (first, example), *others = present
    whole = example
    for rank, form in others:
        try:
            whole = whole.pool(form)
            if _order(form) != _order(example):
                raise ValueError("the parameters are of another order or dtype")
        except (TypeError, ValueError) as error:
            raise type(error)(f"rank {rank} does not fit rank {first}: {error}") from None
    return whole


def _order(F: Fisher) -> Any:
    return list(F.shapes), [tensor.dtype for tensor in F._numbers()]


def check_adds_up(F: Fisher) -> Fisher:
    """Return what can be added to that of other ranks, or raise a ValueError."""
    for block in _blocks(F):
        if isinstance(block, EigenKronecker | LowRank):
            raise ValueError(not_linear(f"{type(block).__name__} of {list(block.shapes)}"))
    if any_sharded(F._numbers()):
        raise ValueError("F is sharded, so it is that of all ranks already")
    return F


def _blocks(F: Fisher) -> list[Fisher]:
    if isinstance(F, BlockDiagonal):
        return [part for block in F.blocks for part in _blocks(block)]
    return [F]


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
