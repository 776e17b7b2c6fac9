"""How much memory the engine takes beside the model, and in which precision it adds.

Each budget is a size in bytes that one piece of the work may take. Larger pieces cost memory and
leave the cache; smaller ones cost the fixed price of an operation more often.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SQUARES_BYTES = 2**22
"""Per-observation gradients are squared in pieces of this size, which stay in the cache."""

ROWS_BYTES = 2**25
"""Rows of single observations that are written out at a time: their gradients in all parameters,
or the positions of all uses of one."""

VMAP_BYTES = 2**26
"""Gradients of all columns and observations that exist at once on the way by vmap."""

WINDOW_BYTES = 2**26
"""Copies of convolution windows that are kept for all columns of a batch."""

BATCH_BYTES = 2**24
"""Batches are joined until the results of all operations take so much: a pass has fixed costs."""


def pieces(n: int, row_bytes: int, budget: int) -> Iterator[slice]:
    """Cut ``n`` rows into pieces within a budget, of one row at least."""
    step = max(1, budget // max(1, row_bytes))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of sums and squares: they would underflow or overflow in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
