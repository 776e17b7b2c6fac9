"""Data as people have it, cut into batches on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ewc_lib._arguments import check_whole
from ewc_lib._checking import Problem, settle
from ewc_lib._forms import check_iterable, is_whole, pair
from ewc_lib._parameters import count, form
from ewc_lib.errors import EmptyData

BATCH_SIZE = 128
"""For data given as one tuple of tensors. The size changes the speed, and no result that sums over
observations."""


class Batch(NamedTuple):
    """Observations that come together.

    Attributes
    ----------
    inputs, target
        Inputs and targets.
    first
        The number of the first observation.
    last
        Whether no batch follows.
    problems
        What may be wrong with the inputs, to be settled by whoever reads them.
    sizes
        The lengths of the batches that were joined to this one.
    """

    inputs: Any
    target: Tensor
    first: int
    last: bool = False
    problems: tuple[Problem, ...] = ()
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.target)

    def checked(self) -> Batch:
        """Raise a ValueError if an input holds NaN, else return the batch."""
        settle(self.problems)
        return self

    def apart(self) -> Iterator[Batch]:
        """Yield the batches that were joined to this one."""
        start = 0
        for size in self.sizes:
            part = slice(start, start + size)
            inputs, target = tree_map(lambda t, part=part: t[part], (self.inputs, self.target))
            last = self.last and part.stop == len(self)
            problems = tuple(_problems(inputs, self.first + start))
            yield Batch(inputs, target, self.first + start, last, problems)
            start += size


class Reading:
    """Data whose first batches can be looked at before all are read.

    Parameters
    ----------
    data
        In any of the forms that :func:`batches` takes.
    change
        What is done to every batch that is read.
    """

    def __init__(self, data: Any, change: Callable[[Any], Any]) -> None:
        self._data = data
        self.change = change
        self._seen: list[Any] = []
        self._rest: Iterator[Any] | None = None

    def ahead(self) -> Iterator[Any]:
        """Look at the first batches, unchanged; they are kept for whoever reads first."""
        self._rest = iter(_raw_batches(self._data))
        for raw in self._rest:
            self._seen.append(raw)
            yield raw

    def __iter__(self) -> Iterator[Any]:
        """Read all batches."""
        source = iter(_raw_batches(self._data)) if self._rest is None else self._rest
        read, self._seen, self._rest = chain(self._seen, source), [], None
        return map(self.change, read)


def batches(data: Any, device: torch.device, n_samples: int | None = None) -> Iterator[Batch]:
    """Yield batches of ``(inputs, targets)``, and stop after exactly ``n_samples`` observations.

    Raises
    ------
    ValueError
        If there is no observation, fewer than ``n_samples``, a batch of another form, or inputs
        and targets of different lengths. A NaN among the inputs is left to :meth:`Batch.checked`.
    """
    check_whole(n_samples=n_samples)
    seen = 0
    for number, raw in enumerate(_raw_batches(data)):
        inputs, target = pair(raw, f"batch {number}")
        n = _length(inputs, target, number)
        keep = n if n_samples is None else min(n, n_samples - seen)
        inputs, target = tree_map(
            lambda t, keep=keep: _ordinary(t[:keep].detach().to(device)), (inputs, target)
        )
        if keep:
            yield Batch(inputs, target, seen, problems=tuple(_problems(inputs, seen)))
        seen += keep
        if seen == n_samples:
            return
    if seen == 0:
        raise EmptyData("data is empty: it yielded no observation (was an iterator used up?)")
    if n_samples is not None and seen < n_samples:
        raise ValueError(f"n_samples={n_samples}, but data holds only {seen} observations")


def marking_last(pieces: Iterable[Batch]) -> Iterator[Batch]:
    """Look one batch ahead, and tell of each whether it is the last."""
    waiting: Batch | None = None
    for piece in pieces:
        if waiting is not None:
            yield waiting
        waiting = piece
    if waiting is not None:
        yield Batch(waiting.inputs, waiting.target, waiting.first, True, waiting.problems)


def join(pieces: Iterable[Batch], enough: Callable[[], int]) -> Iterator[Batch]:
    """Join batches until they hold enough observations, where their shapes allow it.

    ``enough`` is asked again after each batch that is handed out.
    """
    waiting: list[Batch] = []
    for piece in pieces:
        if waiting and form(waiting[0][:2]) != form(piece[:2]):
            yield _joined(waiting)
            waiting = []
        waiting.append(piece)
        if sum(map(len, waiting)) >= enough():
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    pairs = [(part.inputs, part.target) for part in parts]
    inputs, target = tree_map(lambda *leaves: torch.cat(leaves), *pairs)
    problems = tuple(chain.from_iterable(part.problems for part in parts))
    sizes = tuple(map(len, parts))
    return Batch(inputs, target, parts[0].first, parts[-1].last, problems, sizes)


def _raw_batches(data: Any) -> Iterable[Any]:
    if is_whole(data):
        return cut(pair(data, "data"), BATCH_SIZE)
    return check_iterable(data)


def cut(data: tuple[Any, Tensor], size: int) -> Iterator[Any]:
    """Yield the inputs and targets of so many observations after another."""
    for start in range(0, count(data), size):
        yield tree_map(lambda t, start=start: t[start : start + size], data)


def _ordinary(tensor: Tensor) -> Tensor:
    """Copy what was made in inference mode, of which autograd can save nothing."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _length(inputs: Any, target: Tensor, number: int) -> int:
    lengths = [len(leaf) for leaf in tree_leaves((inputs, target))]
    if len(set(lengths)) > 1:
        raise ValueError(f"inputs and targets of batch {number} have different lengths: {lengths}")
    return lengths[0]


def _problems(inputs: Any, first: int) -> Iterator[Problem]:
    for leaf in tree_leaves(inputs):
        if leaf.is_floating_point():
            # A sum that is a number tells that there is no NaN, in a third of the time.
            yield Problem(leaf.sum().isnan(), partial(_refuse_nan, leaf, first))


def _refuse_nan(leaf: Tensor, first: int) -> None:
    if (bad := leaf.isnan().reshape(len(leaf), -1).any(1)).any():
        raise ValueError(f"the input of observation {first + int(bad.nonzero()[0])} holds NaN")
