"""Lengths of many tensors, for which a device is asked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from ewc_lib._parameters import Vector, zeros_of
from ewc_lib.score.memory import sum_dtype

T = TypeVar("T")


def norm(values: Tensor) -> float:
    """Return the length of a vector, in the precision of sums."""
    return norms([values])[0][0]


def norms(*groups: Sequence[Tensor]) -> list[list[float]]:
    """Return the length of every tensor of some groups; the device is asked once."""
    return read(*map(of, groups))


def of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the length of each tensor, on its device, in the precision of sums."""
    every = [wide(tensor.detach()) for tensor in tensors]
    return list(torch._foreach_norm(every)) if every else []


def read(*groups: list[Tensor]) -> list[list[float]]:
    """Read numbers from the device, all at once; those on other devices are brought to one."""
    every = [number for group in groups for number in group]
    numbers = iter(torch.stack([n.to(every[0].device) for n in every]).tolist() if every else [])
    return [list(islice(numbers, len(group))) for group in groups]


def wide(tensor: Tensor) -> Tensor:
    """Bring a tensor to the precision of sums; whole numbers and truth values, too."""
    return tensor.to(sum_dtype(tensor))


def differences(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Subtract the second of each pair from the first, in the precision of sums."""
    if not a:
        return []
    return list(torch._foreach_sub([*map(wide, a)], [*map(wide, b)]))


def zeros(like: dict[str, Tensor]) -> Vector:
    """Return sums to start with, in the shapes of some tensors and the precision of sums."""
    return zeros_of({name: (t.shape, sum_dtype(t), t.device) for name, t in like.items()})


def in_pieces(items: list[T], nbytes: Callable[[T], int], room: int) -> Iterator[list[T]]:
    """Take together what fits one piece of memory."""
    ends = accumulate(map(nbytes, items))
    for _, group in groupby(zip(items, ends, strict=True), lambda pair: pair[1] // room):
        yield [item for item, _ in group]
