"""The gradient of one parameter, observation by observation, from what arrived at its uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ewc_lib.fisher.capture import Use
from ewc_lib.fisher.layout import Layout, weigh
from ewc_lib.fisher.rules import Rule, add_rows, chunks


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of sums and squares: they would underflow or overflow in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def pull_through(
    output: Tensor, ends: Sequence[Tensor] | Sequence[GradientEdge], column: Tensor
) -> tuple[Tensor | None, ...]:
    """Bring an output column back to tensors or edges of the graph; None where it does not reach.

    It goes as the gradient of a scalar. A vector-Jacobian product is the same, but the first one
    in a process makes torch import sympy, which takes half a second and 40 MiB.
    """
    with torch.enable_grad():
        along = (output * column).sum()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        along, ends, retain_graph=True, allow_unused=True
    )
    return found


def pull_back(source: Tensor, parameter: Tensor, values: Tensor) -> Tensor:
    """Turn a gradient of a tensor computed from parameters into one of the parameter.

    ``values`` has the shape of the source, or one more axis in front, for several gradients.
    """
    if source is parameter:
        return values
    batched = values.dim() > source.dim()
    return torch.autograd.grad(
        source, parameter, values.to(source), retain_graph=True, is_grads_batched=batched
    )[0].to(values)


def is_rearranged(source: Tensor, parameter: Tensor) -> bool:
    """Whether the source holds entries of the parameter, none twice: a transpose, slice, lookup.

    Then squares can be pulled back like gradients. Random numbers that are pulled back come out
    as they went in if and only if nothing is summed or scaled.
    """
    if source is parameter:
        return True
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(source.shape, generator=generator).to(source)
    back = pull_back(source, parameter, values)
    return bool(torch.isin(back[back != 0], values).all())


@dataclass(frozen=True, eq=False)
class Reading:
    """One use of a parameter and where its tensors hold the ``n`` observations of the batch."""

    use: Use
    layout: Layout
    n: int
    dtype: torch.dtype
    input: Tensor

    @classmethod
    def of(cls, use: Use, layout: Layout, n: int, dtype: torch.dtype, room: int = 0) -> Reading:
        """Cut the input, in the precision of the sums, before anything is squared."""
        a = layout.split(use.input, n)
        a = a.to(dtype) if a.is_floating_point() else a
        return cls(use, layout, n, dtype, use.rule.prepare(a, room))

    def cut(self, gradient: Tensor) -> Float[Tensor, "N ..."]:
        """Cut the gradient of the operation's output in the same way."""
        return self.layout.split(gradient, self.n).to(self.dtype)

    @property
    def copied(self) -> int:
        """Bytes that the cut input takes beside the input itself."""
        own, used = (t.untyped_storage() for t in (self.input, self.use.input))
        return own.nbytes() if own.data_ptr() != used.data_ptr() else 0

    @property
    def rule(self) -> Rule:
        """How the gradient follows."""
        return self.use.rule

    @property
    def source(self) -> Tensor:
        """The parameter, or what was computed from it and used."""
        return self.use.source


@dataclass(frozen=True, eq=False)
class Pulled:
    """The gradient of one output column, as it arrived at all uses of one parameter.

    Attributes
    ----------
    parameter
        The parameter.
    readings
        Its uses.
    arrived
        For each use the gradient of the operation's output, one row for each observation.
    rearranged
        Whether all uses are of one tensor that holds entries of the parameter, none twice.
    """

    parameter: Tensor
    readings: list[Reading]
    arrived: list[Float[Tensor, "N ..."]]
    rearranged: bool

    def weighted(self, weights: Float[Tensor, " N"]) -> Pulled:
        """Weigh the observations."""
        return replace(self, arrived=[weigh(g, weights) for g in self.arrived])

    def absolute(self) -> Pulled:
        """Take away all signs, so that a sum shows the size of its terms."""
        readings = [replace(reading, input=reading.input.abs()) for reading in self.readings]
        return replace(self, readings=readings, arrived=[g.abs() for g in self.arrived])

    def add_total(self, out: Tensor) -> None:
        """Add the gradients of all observations to ``out``."""
        for reading, g in zip(self.readings, self.arrived, strict=True):
            if reading.source is self.parameter:
                reading.rule.add_total(out, reading.input, g)
            else:
                total = out.new_zeros(reading.source.shape)
                reading.rule.add_total(total, reading.input, g)
                out += pull_back(reading.source, self.parameter, total)

    def gradients(self, part: slice = slice(None)) -> Float[Tensor, "n ..."]:
        """Gradient of the parameter for each observation of a part of the batch."""
        rows = self._rows(part)
        return pull_back(self._source, self.parameter, rows) if self.rearranged else rows

    def add_squares(self, out: Tensor) -> None:
        """Add the squared gradients of all observations to ``out``."""
        common = out
        if self.rearranged and self._source is not self.parameter:
            common = out.new_zeros(self._source.shape)
        if self.rearranged and len(self.readings) == 1:
            reading = self.readings[0]
            reading.rule.add_squares(common, reading.input, self.arrived[0])
        else:
            for part in chunks(self.readings[0].n, common.numel() * common.element_size()):
                add_rows(common, self._rows(part).square())
        if common is not out:
            out += pull_back(self._source, self.parameter, common)

    @property
    def one_term(self) -> bool:
        """Whether each entry of a gradient is one product, whose square is one of squares.

        Then the squares of several columns can be added up before they are multiplied.
        """
        if not self.rearranged or len(self.readings) > 1:
            return False
        return self.readings[0].rule.one_term(self.readings[0].input, self.arrived[0])

    def add_squares_of_terms(self, out: Tensor, squared: Float[Tensor, "N ..."]) -> None:
        """Add the squared gradients to ``out``, given the squares of what arrived."""
        reading = self.readings[0]
        readings = [replace(reading, input=reading.input.square())]
        replace(self, readings=readings, arrived=[squared]).add_total(out)

    @property
    def _source(self) -> Tensor:
        return self.readings[0].source

    def _rows(self, part: slice) -> Float[Tensor, "n ..."]:
        """Gradients of the common tensor, or of the parameter if there is none."""
        rows = []
        for reading, g in zip(self.readings, self.arrived, strict=True):
            row = reading.rule.gradients(reading.input[part], g[part])
            rows.append(row if self.rearranged else pull_back(reading.source, self.parameter, row))
        first, *others = rows
        for other in others:
            first = first + other
        return first
