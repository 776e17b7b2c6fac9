"""How much memory the engine takes beside the model, and in which precision it adds.

Each budget is a size in bytes that one piece of the work may take. Larger pieces cost memory;
smaller ones cost the fixed price of an operation more often. What is best depends on the device:

* A *CPU* starts an operation in no time and waits for its memory. Pieces stay in the cache, and
  output columns go back one after the other.
* An *accelerator* (CUDA, XPU, MPS) takes longer to start an operation than to do a small one. So
  pieces are large and few, as far as a share of the free memory allows, output columns go back
  together, and sums of squares are one reduction, which writes no squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """What the pieces of the work may take on one device, in bytes.

    Attributes
    ----------
    squares
        Per-observation gradients are squared in pieces of this size.
    rows
        Rows of single observations that are written out at a time: their gradients in all
        parameters, or the positions of all uses of one.
    vmap
        Gradients of all columns and observations that exist at once on the way by vmap.
    windows
        Copies of convolution windows: those that are kept for all columns of a batch, or those
        of some observations at a time.
    batch
        Batches are joined until the results of all operations take so much: a pass has fixed
        costs.
    columns
        Gradients of the results of all operations, for output columns that go back together.
        With nothing, they go one after the other.
    limit
        No piece takes more.
    cuts
        Into how many pieces one layer is cut at most, within the limit; None for any number.
    by_reduction
        Whether squares are added by one reduction, which writes no squares; else by a product of
        what was squared in its place, in the cache, with ones.
    """

    squares: int
    rows: int
    vmap: int
    windows: int
    batch: int
    columns: int
    limit: int
    cuts: int | None = None
    by_reduction: bool = False

    def pieces_of_squares(self, n: int, row_bytes: int) -> Iterator[slice]:
        """Cut ``n`` rows whose squares are to be added, of which each has so many bytes."""
        return self._pieces_of_a_layer(n, row_bytes, self.squares)

    def pieces_of_windows(self, n: int, row_bytes: int) -> Iterator[slice]:
        """Cut ``n`` rows of which copies of so many bytes each are needed for a moment."""
        return self._pieces_of_a_layer(n, row_bytes, self.windows)

    def _pieces_of_a_layer(self, n: int, row_bytes: int, size: int) -> Iterator[slice]:
        few = 0 if self.cuts is None else -(-n * row_bytes // self.cuts)
        return pieces(n, row_bytes, min(self.limit, max(size, few)))


CPU = Budget(
    squares=2**22,
    rows=2**25,
    vmap=2**26,
    windows=2**26,
    batch=2**24,
    columns=0,
    limit=2**26,
)
"""Pieces of squares stay in the cache; two or three of the others fit into any memory."""

SHARE = 1 / 8
"""Of the free memory of an accelerator, for each kind of piece."""

MOST = 2**30
"""A kernel on so much takes far longer than its start: larger pieces have nothing to win."""

_pretended: tuple[str, int] | None = None


def budget(device: torch.device) -> Budget:
    """Return what pieces of the work may take on a device, as its memory is now."""
    kind, free = _pretended or (device.type, None)
    if kind in ("cpu", "meta"):
        return CPU
    return accelerator(_free(device) if free is None else free)


def accelerator(free: int) -> Budget:
    """Return the budget of an accelerator with so many free bytes."""
    limit = min(MOST, max(2**20, int(free * SHARE)))
    moderate = min(limit, 2**26)
    return Budget(
        squares=moderate,
        rows=moderate,
        vmap=limit,
        windows=moderate,
        batch=moderate,
        columns=limit,
        limit=limit,
        cuts=8,
        by_reduction=True,
    )


@contextmanager
def as_on(kind: str, free: int = 2**35) -> Iterator[None]:
    """Work as on a device of another kind, with so many free bytes, wherever the tensors are.

    So what an accelerator would be asked to do can be counted, and tested, on any machine.
    """
    global _pretended
    before, _pretended = _pretended, (kind, free)
    try:
        yield
    finally:
        _pretended = before


def _free(device: torch.device) -> int:
    """Return how many bytes can still be had, those included that the allocator keeps unused."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        kept = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + kept)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return 2**33  # an accelerator that cannot tell


def pieces(n: int, row_bytes: int, budget: int) -> Iterator[slice]:
    """Cut ``n`` rows into pieces within a budget, of one row at least."""
    step = max(1, budget // max(1, row_bytes))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of sums and squares: they would underflow or overflow in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
