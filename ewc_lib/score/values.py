"""Operations in which values, and not shapes alone, decide what happens to which row.

A boolean mask, an order by length or a choice of experts puts the rows of a batch in other places
in every batch. So may whatever a program does after it has looked at a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def _found(names: str) -> Iterator[Any]:
    """Return the operations of these names, as functions and as methods."""
    for name in names.split():
        for place in (torch, Tensor):
            if (operation := getattr(place, name, None)) is not None:
                yield operation


_LOOKS_AT_VALUES = set(
    _found(
        "item tolist numpy __array__ __bool__ __int__ __float__ __index__ __complex__ "
        "__contains__ __format__ equal allclose is_nonzero nonzero argwhere masked_select bincount "
        "unique unique_consecutive _pack_padded_sequence"
    )
)
"""The values of all operands decide the result or its shape, or become known to the program."""

_READS_PLACES = set(_found("__getitem__ index_select gather take take_along_dim repeat_interleave"))
_TAKES_PLACES = _READS_PLACES.union(
    _found(
        "__setitem__ index_put index_put_ index_copy index_copy_ index_add index_add_ index_fill "
        "index_fill_ index_reduce index_reduce_ put put_ scatter scatter_ scatter_add "
        "scatter_add_ scatter_reduce scatter_reduce_ masked_scatter masked_scatter_ "
        "tensor_split _grouped_mm"
    )
)
"""Whole numbers and marks among the later operands are places in the first one.

Each observation may read its rows of a table that is the same for all.
"""


def depend_on_values(
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    is_constant: Callable[[Tensor], bool],
) -> bool:
    """Whether values of the data decide which row goes where, or whether one goes at all."""
    if function in _LOOKS_AT_VALUES or (function is torch.where and len(args) == 1):
        deciding = tree_leaves((args, kwargs))
    elif function in _TAKES_PLACES:
        deciding = tree_leaves((args[1:2] if function is Tensor.__setitem__ else args[1:], kwargs))
        deciding = [t for t in deciding if isinstance(t, Tensor) and not _is_quantity(t)]
        if function in _READS_PLACES and is_constant(args[0]) and all(t.dim() for t in deciding):
            return False
    else:
        return False
    return not all(is_constant(t) for t in deciding if isinstance(t, Tensor))


def _is_quantity(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
