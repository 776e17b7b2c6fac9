"""The data of a task, as they are trained on and as they are measured: batch after batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, Subset

from ewc_lib._batches import BATCH_SIZE
from ewc_lib._drawing import random_part
from ewc_lib._forms import (
    Picked,
    check_iterable,
    is_data_set,
    is_read_once,
    is_whole,
    pair,
    picked,
)
from ewc_lib.errors import EmptyData


class Piece(NamedTuple):
    """One batch.

    Attributes
    ----------
    inputs, target
        On the device of the model.
    labelled
        Whether it was a dict with labels, from which a model may compute its own loss.
    """

    inputs: Any
    target: Tensor
    labelled: bool


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter; None for a model without any."""
    return next((p.device for p in model.parameters()), None)


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[None]:
    """Use a seed for what draws from the global random state, as dropout does, and restore it."""
    on_accelerator = device is not None and device.type == "cuda"
    everywhere = range(torch.cuda.device_count()) if on_accelerator else ()
    with torch.random.fork_rng(devices=everywhere):
        if device is None or device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the accelerators keep their states
        else:
            torch.manual_seed(seed)
        yield


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[Int[Tensor, " B"]]:
    """Yield the rows of each batch; all rows come once before one comes again."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:size]
        order = order[size:]


class Training:
    """The data of one task in the order in which they are trained on.

    Parameters
    ----------
    data
        One tuple of tensors and a data set that can be asked for any observation are shuffled
        before each pass. A data set that is read from end to end is cut into batches. Loaders and
        other iterables of batches are read as they are, over and over.
    steps, epochs
        Updates, or passes over the data: exactly one of them.
    batch_size
        Where the data are no batches yet.
    seed
        Of the order.

    Attributes
    ----------
    steps
        Number of updates, None where the data do not tell.

    Raises
    ------
    ValueError
        If a number is none, or the data hold nothing.
    """

    def __init__(
        self, data: Any, *, steps: int | None, epochs: int | None, batch_size: int, seed: int
    ) -> None:
        if (steps is None) == (epochs is None):
            raise ValueError("give either steps or epochs")
        amount, what = (epochs, "epochs") if steps is None else (steps, "steps")
        if amount is None or amount < 0 or batch_size < 1:
            raise ValueError(
                f"{what} must not be negative and batch_size be positive, "
                f"got {amount} and {batch_size}"
            )
        self.steps, self._epochs = steps, epochs
        self._size, self._seed = batch_size, seed
        self._pick = data.pick if isinstance(data, Picked) else None
        data = data.data if isinstance(data, Picked) else data
        self._whole = pair(data, "data") if is_whole(data) else None
        self._n = _n_observations(data if self._whole is None else self._whole)
        if self._n is not None and epochs is not None:
            self.steps = epochs * math.ceil(self._n / batch_size)
        elif epochs is not None:
            with suppress(TypeError):  # not all know how many batches they have
                self.steps = epochs * len(data)
        self._data = data

    def pieces(self, device: torch.device | None) -> Iterator[Piece]:
        """Yield the batch of each update."""
        if self._whole is None:
            for number, raw in enumerate(picked(self._raw(), self._pick)):
                piece = _piece(raw, number, device)
                if len(piece.target):
                    yield piece
            return
        leaves, form = tree_flatten(self._whole)
        for rows in self._rows():
            parts = [leaf[rows.to(leaf.device)].to(device or leaf.device) for leaf in leaves]
            inputs, target = tree_unflatten(parts, form)
            yield Piece(inputs, target, False)

    def _rows(self) -> Iterator[Tensor]:
        assert self._n is not None
        assert self.steps is not None
        return batches(self._n, self._size, self.steps, self._seed)

    def _raw(self) -> Iterator[Any]:
        if self._n is not None:
            orders = (rows.tolist() for rows in self._rows())
            own = torch.Generator().manual_seed(self._seed)
            return iter(DataLoader(self._data, batch_sampler=orders, generator=own))
        return self._again(in_batches(self._data, self._size))

    def _again(self, source: Any) -> Iterator[Any]:
        """Read data over and over."""
        done = 0
        for passed in count():
            if passed == self._epochs or (self._epochs is None and done == self.steps):
                return
            before = done
            rest = None if self._epochs is not None or self.steps is None else self.steps - done
            for raw in islice(check_iterable(source), rest):
                yield raw
                done += 1
            if done == before == 0:
                raise EmptyData("data is empty: it yielded no batch (was an iterator used up?)")
            if done == before:
                raise ValueError(
                    f"data ended after {done} batches, and cannot be read again: give a DataLoader"
                )


def _n_observations(data: Any) -> int | None:
    """Return how many observations there are to choose from, or None where there is no choice."""
    if is_whole(data):
        inputs, target = data
        lengths = {len(leaf) for leaf in tree_leaves(inputs)}
        n = lengths.pop() if lengths else 0
        if not n or lengths or n != len(target):
            raise ValueError(f"data must have one label for each input, got {n} and {len(target)}")
        return n
    if not is_data_set(data) or isinstance(data, IterableDataset):
        return None
    if not len(data):
        raise EmptyData("data is empty: there is no observation")
    return len(data)


def in_order(data: Any, device: torch.device | None, chunk: int = BATCH_SIZE) -> Iterator[Piece]:
    """Yield all data once, in batches on a device.

    Parameters
    ----------
    data
        As for :class:`Training`.
    device
        Where the batches go; None to leave them where they are.
    chunk
        Observations of one tuple of tensors that come at a time.
    """
    if is_whole(data):
        whole = pair(data, "data")
        n = _n_observations(whole)
        assert n is not None
        raw: Iterable[Any] = (
            tree_map(lambda t, start=start: t[start : start + chunk], whole)
            for start in range(0, n, chunk)
        )
    else:
        raw = check_iterable(in_batches(data))
    seen = 0
    for number, one in enumerate(raw):
        piece = _piece(one, number, device)
        if len(piece.target):
            yield piece
        seen += len(piece.target)
    if not seen:
        raise EmptyData("data is empty: it yielded no observation (was an iterator used up?)")


def in_batches(data: Any, size: int = BATCH_SIZE) -> Any:
    """Cut a data set into batches, from end to end; return other data as they are."""
    if isinstance(data, Picked):
        return picked(in_batches(data.data, size), data.pick)
    return DataLoader(data, batch_size=size) if is_data_set(data) else data


def some(data: Any, n: int | None, seed: int) -> Any:
    """Return all data, or as many observations as wanted, drawn at random where that can be."""
    if n is None:
        return in_batches(data)
    own: Any = data.data if isinstance(data, Picked) else data
    pick = data.pick if isinstance(data, Picked) else None
    own = pair(own, "data") if is_whole(own) else own
    generator, known = torch.Generator().manual_seed(seed), _n_observations(own)
    if known is None:
        return _Beginning(picked(random_part(own, n, generator), pick), n)
    if n >= known:
        return in_batches(data)
    rows = torch.randperm(known, generator=generator)[:n]
    if is_whole(own):
        return tree_map(lambda t: t[rows.to(t.device)], own)
    return picked(in_batches(Subset(own, rows.tolist())), pick)


class _Beginning:
    """The first observations of batches."""

    def __init__(self, data: Any, n: int) -> None:
        self._data, self._n = in_batches(data), n

    def __iter__(self) -> Iterator[Any]:
        rest = self._n
        for number, raw in enumerate(check_iterable(self._data)):
            inputs, target, labelled = _piece(raw, number, None)
            inputs, target = tree_map(lambda t, rest=rest: t[:rest], (inputs, target))
            yield {**inputs, "labels": target} if labelled else (inputs, target)
            rest -= len(target)
            if rest <= 0:
                return


def check_again(data: Any, what: str) -> None:
    """Raise a ValueError if data that are read several times can be read only once."""
    if is_read_once(data):
        raise ValueError(
            f"the {what} are an iterator, which can be read only once, but they are read "
            "several times: give a DataLoader, a Dataset, a list of batches or tensors"
        )


def _piece(raw: Any, number: int, device: torch.device | None) -> Piece:
    inputs, target = pair(raw, f"batch {number}")
    if device is not None:
        inputs, target = tree_map(lambda t: t.to(device), (inputs, target))
    return Piece(inputs, target, isinstance(raw, Mapping))
