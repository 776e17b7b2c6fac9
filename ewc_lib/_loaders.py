"""Which observations of a loader only fill up the last batches, so that all processes have as many.

Whoever trains in several processes gets some observations twice in each epoch. In a mean over all
observations they would count twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

Keep = Callable[[int, int], int]
"""From observations seen so far, and in a batch, to those at its beginning that count."""


class Unpadded:
    """A loader without the observations that fill up its last batches.

    It is read to its end in any case: other processes may wait for this one there.

    Parameters
    ----------
    loader
        Yields batches.
    keep
        Which observations count.
    """

    def __init__(self, loader: Any, keep: Keep) -> None:
        self.loader = loader
        self.keep = keep

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for raw in self.loader:
            n = _length(raw)
            if n is None:
                yield raw  # refused where it is read
                continue
            kept = self.keep(seen, n)
            seen += n
            if kept:
                yield raw if kept == n else _first(raw, kept)


def unpadded(data: Any) -> Any:
    """Return the data of this process without observations that another one has, too.

    Warns
    -----
    RuntimeWarning
        If a loader may have such observations, and which they are cannot be told.
    """
    try:
        keep = _of_accelerate(data) or _of_sampler(data)
    except UnknownError as unknown:
        warnings.warn(
            f"{unknown} gives some observations to two processes to fill up its last batches, and "
            "which they are cannot be told, so they may count twice; give a loader with a "
            "DistributedSampler, or each process its own part of the data",
            RuntimeWarning,
            stacklevel=2,
        )
        return data
    return data if keep is None else Unpadded(data, keep)


def waits_for_others(data: Any) -> bool:
    """Tell whether processes get each batch from one of them, which all have to ask for."""
    return "DataLoaderDispatcher" in _accelerate_classes(data)


class UnknownError(Exception):
    """Something that repeats observations in a way that is not known."""


def _up_to(total: int) -> Keep:
    return lambda seen, n: max(0, min(n, total - seen))


def _of_sampler(data: Any) -> Keep | None:
    """Return what counts of a loader with a ``DistributedSampler``."""
    batches = getattr(data, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None) or getattr(data, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    n, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
    if sampler.total_size <= n:
        return None
    in_order = batches is None or type(batches) is BatchSampler
    if not in_order or not _is_known(type(sampler)):
        raise UnknownError(type(sampler).__name__ if in_order else type(batches).__name__)
    return _up_to(len(range(sampler.rank, n, ranks)))


def _is_known(kind: Any) -> bool:
    """Tell whether a sampler gives the places of PyTorch's: those that fill up come last."""
    of_lightning = kind.__module__.startswith(("lightning.", "pytorch_lightning."))
    return of_lightning or kind.__iter__ is DistributedSampler.__iter__


def _of_accelerate(data: Any) -> Keep | None:
    """Return what counts of a loader that accelerate has prepared, as a Trainer's is."""
    names = _accelerate_classes(data)
    if "DataLoaderDispatcher" in names:
        return None if data._drop_last else lambda _, n: _dispatched(data, n)
    if "DataLoaderShard" not in names:
        return None
    if "IterableDatasetShard" in _accelerate_classes(data.dataset):
        return _of_stream(data.dataset)
    batches: Any = data.sampler if isinstance(data.sampler, BatchSampler) else data.batch_sampler
    if "SkipBatchSampler" in _accelerate_classes(batches):
        raise UnknownError(type(batches).__name__)
    if "BatchSamplerShard" not in _accelerate_classes(batches):
        return None
    if batches.num_processes == 1 or batches.drop_last or not batches.even_batches:
        return None
    inner = batches.batch_sampler
    if data.skip_batches or batches.batch_size is None or type(inner) is not BatchSampler:
        raise UnknownError(type(inner).__name__)
    return _in_turn(len(inner.sampler), batches)  # type: ignore[arg-type]


def _of_stream(dataset: Any) -> Keep | None:
    if dataset.drop_last or dataset.num_processes == 1:
        return None
    try:
        return _in_turn(len(dataset.dataset), dataset)
    except TypeError:
        raise UnknownError(type(dataset.dataset).__name__) from None


def _in_turn(total: int, shard: Any) -> Keep:
    """Return what counts where processes take batches, or parts of each, in turn."""
    size = shard.batch_size // (shard.num_processes if shard.split_batches else 1)
    rounds, rest = divmod(total, size * shard.num_processes)
    own = min(max(rest - shard.process_index * size, 0), size)
    return _up_to(rounds * size + own)


def _dispatched(loader: Any, n: int) -> int:
    """Return what counts of a batch that process 0 has cut for all; the last is filled up."""
    if not loader.end_of_dataloader:
        return n
    own: int = loader.remainder - loader.state.process_index * n
    return min(max(own, 0), n)


def _accelerate_classes(value: Any) -> set[str]:
    kinds = type(value).__mro__
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("accelerate.")}


def _length(raw: Any) -> int | None:
    """Return the number of observations in a batch."""
    if isinstance(raw, Tensor | np.ndarray):
        return len(raw) if raw.ndim else None
    if isinstance(raw, Mapping | tuple | list):
        parts = raw.values() if isinstance(raw, Mapping) else raw
        return next((n for n in map(_length, parts) if n is not None), None)
    return None


def _first(raw: Any, n: int) -> Any:
    """Return the first observations of a batch."""
    if isinstance(raw, Mapping):
        return {key: _first(value, n) for key, value in raw.items()}
    if isinstance(raw, tuple | list):
        return tuple(_first(value, n) for value in raw)
    return raw[:n] if isinstance(raw, Tensor | np.ndarray) and raw.ndim else raw
