"""Drawing a part of data, where the data can be asked for any of their observations."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

from ewc_lib._forms import Picked, is_whole, pair, picked
from ewc_lib._parameters import count


def random_part(data: Any, n_samples: int | None, generator: torch.Generator) -> Any:
    """Draw observations without replacement; return other data as they are, to be cut short.

    They are drawn of one tuple of tensors, and of a loader that goes through a data set in order:
    there every observation has a number. The order of the data is kept.
    """
    if n_samples is None:
        return data
    if isinstance(data, Picked):
        return picked(random_part(data.data, n_samples, generator), data.pick)
    if is_whole(data):
        data = pair(data, "data")
        rows = _draw(count(data), n_samples, generator)
        return tree_map(lambda t: t[rows.to(t.device)], data)
    if _goes_in_order(data):
        return _over(data, _draw(len(data.dataset), n_samples, generator).tolist())
    return data


def _draw(n: int, n_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw numbers of observations; all of them, where that is not enough."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[:n_samples].sort().values


def _goes_in_order(data: Any) -> bool:
    """Tell whether a loader does no more than to go through a data set from end to end."""
    return (
        type(data) is DataLoader
        and type(data.sampler) is SequentialSampler
        and type(data.batch_sampler) is BatchSampler
        and not data.drop_last
    )


def _over(loader: DataLoader[Any], rows: list[int]) -> DataLoader[Any]:
    """Return a loader that does to a part of the data set what this one does to all."""
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
