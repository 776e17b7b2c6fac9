r"""The Fisher information of data that several processes hold, each a part of it.

Rank :math:`r` has :math:`N_r` observations and their mean :math:`F_r`. The mean over all is

.. math:: F = \sum_r \frac{N_r}{\sum_q N_q} F_r ,

so the ranks work alone and meet once, at the end: they first tell each other how it went and
how many observations they have, in a small message, and then add one flat buffer with all
numbers. A rank that fails says so in the message, and every rank raises an error.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ewc_lib import fisher
from ewc_lib._selecting import fixed, select_parameters
from ewc_lib.errors import EmptyData
from ewc_lib.fisher import BlockDiagonal, Diagonal, EigenKronecker, Fisher, LowRank
from ewc_lib.likelihood.outputs import Likelihood

__all__ = ["all_reduce", "fisher_information"]

NOT_LINEAR = "eigenkronecker", "lowrank"
"""Structures that those of parts of the data do not add up to."""


def fisher_information(
    model: nn.Module,
    shard: Any,
    likelihood: Likelihood | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Fisher:
    r"""Return the Fisher information of the data of all ranks, on every rank.

    .. math:: F = \sum_r \frac{N_r}{\sum_q N_q} F_r

    with :math:`F_r` the mean over the :math:`N_r` observations of rank :math:`r`: what
    :func:`ewc_lib.fisher_information` returns in one process for all data, up to rounding and
    to the random numbers of ``kind="sketch"`` and ``"sampled"``. Every rank of the group has
    to call it. The shards may be of different sizes, and empty on some ranks.

    A model in ``DistributedDataParallel`` or ``DataParallel`` is run without its wrapper, which
    would wait for other ranks in each forward pass; its parameters keep their names, which
    begin with ``module.``. Parameters that ``fully_shard`` has sharded are made whole first, so
    each rank needs the memory of the whole model and of the whole ``F`` while it works. The
    diagonal that it returns is sharded like the parameters; other structures stay whole. The
    model computes in the dtype of its shards, without the mixed precision of ``fully_shard``.

    Parameters
    ----------
    model
        The same on every rank, with the same parameters.
    shard
        The data of this rank, as in :func:`ewc_lib.fisher_information`. No observation should
        be on two ranks, as a ``DistributedSampler`` makes them to fill up its last batches;
        it would count twice.
    likelihood
        As in :func:`ewc_lib.fisher_information`.
    group
        The processes that take part; by default all.
    **options
        As in :func:`ewc_lib.fisher_information`. ``n_samples`` counts the observations of this
        rank. By default, the ``generator`` has the number of the rank as its seed: with the
        same random numbers everywhere, the errors of the ranks would not cancel. A generator of
        your own should be seeded differently on each rank for the same reason.

    Returns
    -------
    Fisher
        The same on every rank.

    Raises
    ------
    ValueError
        If ``structure`` is ``"eigenkronecker"`` or ``"lowrank"``: eigenvectors of parts of the
        data do not add up to those of all. If no rank has an observation, if the ranks have
        different parameters, or for the reasons of :func:`ewc_lib.fisher_information`.
    RuntimeError
        If another rank has failed, with the number of that rank and its message; or if
        ``torch.distributed`` is not initialised. A rank whose process has ended cannot report:
        the others wait for it as long as the timeout of the group says.

    Notes
    -----
    There are two collectives: a message of less than a hundred bytes for each parameter tensor,
    and one all-reduce of all numbers. With ``device="cpu"`` on an accelerator
    the group needs a backend for the CPU, as ``init_process_group()`` sets up by default.

    Examples
    --------
    One process alone is a group too; ``torchrun`` starts several.

    >>> import torch
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> rank, ranks = dist.get_rank(), dist.get_world_size()
    >>> F = fisher_information(model, (x[rank::ranks], y[rank::ranks]))
    >>> F.n_samples
    8
    >>> dist.destroy_process_group()
    """
    rank = _rank(group)
    options.setdefault("progress", False if rank else None)
    mistake = None
    try:  # while parameters that are sharded are still those that the caller knows
        options["params"] = fixed(model, options.get("params"))
    except ValueError as error:
        mistake = error
    device = options.get("device") or next(model.parameters(), torch.empty(0)).device

    def compute() -> Fisher | None:
        if mistake:
            raise mistake
        if options.get("structure") in NOT_LINEAR:
            raise ValueError(_not_linear(f"structure={options['structure']!r}"))
        if options.get("generator") is None:
            chosen = select_parameters(plain, options["params"])
            source = torch.Generator(next(iter(chosen.values())).device)
            options["generator"] = source.manual_seed(rank)
        try:
            return fisher.fisher_information(plain, shard, likelihood, **options)
        except EmptyData:
            return None

    with _plain(model) as plain:
        F = _add_up(compute, device, group)
    return _shard_like(model, F)


def all_reduce(F: Fisher, group: dist.ProcessGroup | None = None) -> Fisher:
    """Merge the Fisher informations that the ranks have computed, each of its own data.

    Parameters
    ----------
    F
        The Fisher information of the data of this rank; of the same parameters, kind and
        structure on every rank.
    group
        The processes that take part; by default all.

    Returns
    -------
    Fisher
        The mean over the observations of all ranks, as :meth:`ewc_lib.Fisher.pool` defines it;
        the same on every rank.

    Raises
    ------
    TypeError
        If the structures differ.
    ValueError
        If the kinds, parameters or dtypes differ, or if a block is an ``EigenKronecker`` or a
        ``LowRank``, whose eigenvectors differ between ranks.
    RuntimeError
        If another rank has failed, or if ``torch.distributed`` is not initialised.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from ewc_lib import fisher_information
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> F = fisher_information(torch.nn.Linear(3, 2), (torch.ones(8, 3), torch.arange(8) % 2))
    >>> all_reduce(F).n_samples
    8
    >>> dist.destroy_process_group()
    """
    _rank(group)

    def check() -> Fisher:
        for block in _blocks(F):
            if isinstance(block, EigenKronecker | LowRank):
                raise ValueError(_not_linear(f"{type(block).__name__} of {list(block.shapes)}"))
        if any(isinstance(tensor, DTensor) for tensor in F._numbers()):
            raise ValueError("F is sharded, so it is that of all ranks already")
        return F

    return _add_up(check, "cpu", group)


def _not_linear(what: str) -> str:
    return (
        f"{what}: the eigenvectors of parts of the data do not add up to those of all data; "
        "choose another structure, or compute it in one process"
    )


def _rank(group: dist.ProcessGroup | None) -> int:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start the processes with torchrun and call "
            "torch.distributed.init_process_group() in each"
        )
    if (rank := dist.get_rank(group)) < 0:
        raise RuntimeError(f"rank {dist.get_rank()} is not in the group")
    return rank


class Message(NamedTuple):
    """What a rank tells the others before the numbers are added.

    Attributes
    ----------
    error
        Type and first line of the error that it met, or None.
    form
        Its Fisher information without the numbers, or None if it has no observation.
    """

    error: str | None
    form: Fisher | None


def _add_up(
    compute: Callable[[], Fisher | None],
    device: torch.device | str,
    group: dist.ProcessGroup | None,
) -> Fisher:
    """Compute on this rank, and return the mean over the observations of all ranks.

    A rank without observations computes None, and adds zeros on the given device.
    """
    F, failure = None, None
    try:
        if F := compute():
            numbers = torch.cat([tensor.reshape(-1) for tensor in F._numbers()])
    except Exception as error:
        failure = error
    whole = _pool(_exchange(F, failure, group))
    if F:
        numbers *= F.n_samples / whole.n_samples
    else:
        like = torch.cat([tensor.reshape(-1) for tensor in whole._numbers()])
        numbers = torch.zeros_like(like, device=device)
    dist.all_reduce(numbers, group=group)
    pieces = iter(numbers.split([tensor.numel() for tensor in whole._numbers()]))
    return whole._map(lambda tensor: next(pieces).view(tensor.shape).to(tensor.dtype))


def _exchange(
    F: Fisher | None, failure: Exception | None, group: dist.ProcessGroup | None
) -> list[Fisher | None]:
    """Return what every rank has, without the numbers, or raise if one has failed."""
    own = Message(_first_line(failure) if failure else None, F and F.to("meta"))
    messages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, own, group)
    if failure:
        raise failure
    if failed := [f"rank {rank} failed: {m.error}" for rank, m in enumerate(messages) if m.error]:
        raise RuntimeError("; ".join(failed))
    return [message.form for message in messages]


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


def _blocks(F: Fisher) -> list[Fisher]:
    if isinstance(F, BlockDiagonal):
        return [part for block in F.blocks for part in _blocks(block)]
    return [F]


class _Unwrapped(nn.Module):
    """The model in a wrapper, with the names that the wrapper gives, without what it adds."""

    def __init__(self, wrapper: DataParallel[nn.Module] | DistributedDataParallel) -> None:
        super().__init__()
        self.module = wrapper.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@contextmanager
def _plain(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model that no other process takes part in: unwrapped, with whole parameters."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        model = _Unwrapped(model)
    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError("FullyShardedDataParallel hides the parameters; use fully_shard")
    with _whole(modules), _without_sharding_hooks(modules):
        yield model


@contextmanager
def _whole(modules: list[nn.Module]) -> Iterator[None]:
    """Put whole parameters in the place of sharded ones."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
    sharded = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    with torch.no_grad():
        whole = {p: nn.Parameter(p.full_tensor(), p.requires_grad) for _, _, p in sharded}
    try:
        for module, name, parameter in sharded:
            setattr(module, name, whole[parameter])
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)


@contextmanager
def _without_sharding_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Leave out the hooks of ``fully_shard``, which gather and free parameters."""
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


def _shard_like(model: nn.Module, F: Fisher) -> Fisher:
    """Keep of a diagonal what this rank keeps of the parameters."""
    parameters = dict(model.named_parameters())
    if not isinstance(F, Diagonal):
        return F
    values = {name: _part(value, parameters[name]) for name, value in F.values.items()}
    return replace(F, values=values)


def _part(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, parameter.device_mesh, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)
