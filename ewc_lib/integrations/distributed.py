r"""The Fisher information of data that several processes hold, each a part of it.

Rank :math:`r` has :math:`N_r` observations and their mean :math:`F_r`. The mean over all is

.. math:: F = \sum_r \frac{N_r}{\sum_q N_q} F_r ,

so the ranks work alone and meet once, at the end: they first tell each other how it went and
how many observations they have, in a small message, and then add one flat buffer with all
numbers. A rank that fails says so in the message, and every rank raises an error.

:meth:`ewc_lib.EWC.consolidate` does the same by itself, where ``torch.distributed`` is initialised
with more than one process.

A model that ``fully_shard`` has distributed is run layer by layer. While a layer runs, forward and
backward, it is whole on the rank; the sum of the squares of one parameter is reduced as soon as it
is known, and each rank keeps its part. So no rank ever holds the whole model or the whole diagonal.
The ranks need not have equally many batches: they meet before each layer and say what they need,
and a rank that is done serves the others.

All this needs broadcasts, all-gathers and all-reduces only, which every backend has, gloo as well.
What it cannot do: parameters that ``FullyShardedDataParallel``, the older way, has flattened, are
refused by name. Those of tensor parallelism are made whole, but its modules then get other inputs
than they expect. Shards that are kept in main memory beside an accelerator need a group with a
backend for both. A parameter without a rule (:attr:`ewc_lib.Fisher.paths` says ``"generic"`` or
``"loop"``) makes the whole model present for a moment, since a transform of functions sees no
values that come later. Structures other than the diagonal are whole on every rank, as are the
importances of MAS while they are summed.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ewc_lib._pooling import Ranks, add_up, check_adds_up
from ewc_lib._processes import fisher_of_ranks
from ewc_lib.fisher import Fisher
from ewc_lib.likelihood.outputs import Likelihood

__all__ = ["all_reduce", "fisher_information"]


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
    begin with ``module.``. It has the buffers of the first rank then, as in each forward pass of
    the wrapper. Parameters that ``fully_shard`` has sharded are gathered layer by layer. The
    diagonal of these is sharded like the parameters; other structures are whole on every rank. The
    model computes in the dtype of its shards, without the mixed precision of ``fully_shard``, and
    those in half precision are widened layer by layer, unless ``precision="high"``.

    Parameters
    ----------
    model
        The same on every rank, with the same parameters.
    shard
        The data of this rank, as in :func:`ewc_lib.fisher_information`. No observation should
        be on two ranks; it would count twice. Those that only fill up the last batches are left
        out, where a loader has a ``DistributedSampler`` or was prepared by accelerate, as that of
        a ``Trainer`` of Hugging Face.
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
        different parameters or values of them, if others than the ranks of the group share a
        model, or for the reasons of :func:`ewc_lib.fisher_information`.
    RuntimeError
        If another rank has failed, with the number of that rank and its message; or if
        ``torch.distributed`` is not initialised. A rank whose process has ended cannot report:
        the others wait for it as long as the timeout of the group says.

    Warns
    -----
    RuntimeWarning
        If a loader may repeat observations of other ranks, and which they are cannot be told.

    Notes
    -----
    There are two collectives: a message of less than a hundred bytes for each parameter tensor,
    and one all-reduce of all numbers. For a sharded model there are three more for each layer and
    batch, and each way back: a message of 24 bytes, what gathers the layer, and what reduces its
    sums. With ``device="cpu"`` on an accelerator
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
    Ranks.of(group)  # fails now where there is none
    return fisher_of_ranks(model, shard, likelihood, group=group or dist.group.WORLD, **options)


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
    return add_up(lambda: check_adds_up(F), "cpu", Ranks.of(group))
