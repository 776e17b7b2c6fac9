r"""The Fisher information of data that several processes hold, each a part of it.

Rank :math:`r` has :math:`N_r` observations and their mean :math:`F_r`. The mean over all is

.. math:: F = \sum_r \frac{N_r}{\sum_q N_q} F_r ,

so the ranks work alone and meet once, at the end: they first tell each other how it went and
how many observations they have, in a small message, and then add one flat buffer with all
numbers. A rank that fails says so in the message, and every rank raises an error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ewc_lib._checking import check_finite_sums
from ewc_lib._parameters import Vector
from ewc_lib._sharded import any_sharded
from ewc_lib.errors import EmptyData
from ewc_lib.fisher.structures import BlockDiagonal, Diagonal, EigenKronecker, Fisher, LowRank

if TYPE_CHECKING:
    from ewc_lib._gathering import Layers

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
        if not initialised():
            raise RuntimeError(
                "torch.distributed is not initialised: start the processes with torchrun and call "
                "torch.distributed.init_process_group() in each"
            )
        if (rank := dist.get_rank(group)) < 0:
            raise RuntimeError(f"rank {dist.get_rank()} is not in the group")
        return cls(group, rank, dist.get_world_size(group))


def initialised() -> bool:
    """Tell whether there are processes to speak with."""
    return dist.is_available() and dist.is_initialized()


def with_sums(F: Fisher, layers: Layers | None) -> Fisher:
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
    return with_sums(replace(whole, values=whole.values | there), layers)


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
