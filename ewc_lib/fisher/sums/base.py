"""The sum over observations of the outer products of their gradients, in one structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ewc_lib._parameters import Vector, check_real
from ewc_lib.fisher.structures import Fisher
from ewc_lib.score.batch import BatchScores
from ewc_lib.score.forward_pass import Columns
from ewc_lib.score.gradients import ParameterGradients
from ewc_lib.score.memory import sum_dtype

MAX_BYTES = 2**34
"""Larger matrices are refused: nobody means to ask for them."""

DIAGONAL_ONLY = (
    "it has a diagonal only, the squared sizes of its gradients; choose structure='diagonal'"
)
"""What is to be done about a complex parameter."""


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """The parameters that a sum is about, and where and how precisely it is kept.

    Attributes
    ----------
    parameters
        The parameters, by name.
    dtype
        Precision of the sums; by default at least float32, else that of the parameters.
    device
        Where the sums are kept; by default with the parameters.
    """

    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""
        return {name: p.shape for name, p in self.parameters.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Precision of the sum for one parameter."""
        return self.dtype or sum_dtype(self.parameters[name]).to_real()

    def device_of(self, name: str) -> torch.device:
        """Where the sum for one parameter is."""
        return self.device or self.parameters[name].device

    def only(self, name: str) -> ParameterSpace:
        """Return the space of one parameter."""
        return replace(self, parameters={name: self.parameters[name]})

    def zeros(self, names: Iterable[str], *size: int) -> Tensor:
        """Return a sum to start with, for the given parameters."""
        names = list(names)
        check_real({name: self.parameters[name] for name in names}, DIAGONAL_ONLY)
        dtype = max(map(self.dtype_of, names), key=lambda d: d.itemsize)
        if (needed := torch.Size(size).numel() * dtype.itemsize) > MAX_BYTES:
            raise ValueError(
                f"a matrix of {' × '.join(map(str, size))} for {', '.join(map(repr, names[:3]))}"
                f"{' ...' if len(names) > 3 else ''} takes {needed / 2**30:.0f} GiB; choose "
                "fewer parameters, a smaller structure, or MatrixFree"
            )
        return torch.zeros(size, dtype=dtype, device=self.device_of(names[0]))


class Sum(ABC):
    """The sum over observations of one structure.

    Parameters
    ----------
    space
        The parameters.
    """

    def __init__(self, space: ParameterSpace) -> None:
        self.n = 0
        self.space = space

    def add(self, batch: BatchScores, columns: Iterator[Columns]) -> None:
        """Add all columns of one batch, block by block."""
        self.n += len(batch)
        with torch.no_grad():
            for block in columns:
                self.add_by_vmap(batch.by_function(block))
                self.add_block(batch, block)
                self.end_block()

    def add_block(self, batch: BatchScores, block: Columns) -> None:
        """Add the columns of one block."""
        start = 0
        for part in batch.parts(block):
            found = batch.by_rule(part)
            for k in range(len(part)):
                column = {name: gradients.column(k) for name, gradients in found.items()}
                self.add_column(column, start + k, len(batch))
            start += len(part)

    @abstractmethod
    def add_by_vmap(self, parts: Iterable[tuple[slice, Vector]]) -> None:
        """Take the gradients ``[K, n, *shape]`` of a block that go by vmap, part by part."""

    @abstractmethod
    def add_column(self, found: dict[str, ParameterGradients], k: int, n: int) -> None:
        """Add column number ``k`` of the block, of ``n`` observations."""

    def end_block(self) -> None:  # noqa: B027  (most have nothing to finish)
        """Finish what the columns of a block have in common."""

    @abstractmethod
    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        """Divide by the number of observations."""
