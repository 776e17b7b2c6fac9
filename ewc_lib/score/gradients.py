"""The gradient of one parameter, observation by observation, from those of its uses' outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib.score import memory
from ewc_lib.score.batch_axis import Placement
from ewc_lib.score.record import ParameterUse
from ewc_lib.score.rules import Products, Rule
from ewc_lib.score.squares import SquareSums


def pull_back(source: Tensor, parameter: Tensor, values: Tensor) -> Tensor:
    """Turn a gradient of a tensor computed from parameters into one of the parameter.

    ``values`` has the shape of the source, or one more axis in front, for several gradients.
    """
    if source is parameter:
        return values
    if values.dim() == source.dim():
        return _pull(source, parameter, values)
    try:
        return _pull(source, parameter, values, batched=True)
    except RuntimeError:  # some operation cannot go backwards for several at once
        return torch.stack([_pull(source, parameter, value) for value in values])


def _pull(source: Tensor, parameter: Tensor, values: Tensor, batched: bool = False) -> Tensor:
    return torch.autograd.grad(
        source, parameter, values.to(source), retain_graph=True, is_grads_batched=batched
    )[0].to(values)


def selects_entries(source: Tensor, parameter: Tensor) -> bool:
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
class UseInBatch:
    """One use of a parameter and where its tensors hold the ``n`` observations of the batch."""

    use: ParameterUse
    axis: Placement
    n: int
    dtype: torch.dtype
    input: Tensor

    @classmethod
    def of(
        cls, use: ParameterUse, axis: Placement, n: int, dtype: torch.dtype, room: int = 0
    ) -> UseInBatch:
        """Cut the input, in the precision of the sums, before anything is squared."""
        a = axis.split(use.operand(), n)
        a = a.to(dtype) if a.is_floating_point() else a
        return cls(use, axis, n, dtype, use.rule.prepare(a, room))

    def cut(self, gradients: Float[Tensor, "K ..."]) -> Float[Tensor, "K N ..."]:
        """Cut gradients of the operation's output in the same way."""
        return self.axis.split_columns(gradients, self.n).to(self.dtype)

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
class ParameterGradients:
    """The gradients of one parameter along some output columns, from all of its uses.

    Attributes
    ----------
    parameter
        The parameter.
    uses
        Its uses.
    output_gradients
        For each use the gradients of the operation's output, one for each column and observation.
    selects_entries
        Whether all uses are of one tensor that holds entries of the parameter, none twice.
    """

    parameter: Tensor
    uses: list[UseInBatch]
    output_gradients: list[Float[Tensor, "K N ..."]]
    selects_entries: bool

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self.output_gradients[0])

    def column(self, k: int) -> ParameterGradients:
        """Return the gradients along one column."""
        return replace(self, output_gradients=[g[k : k + 1] for g in self.output_gradients])

    def absolute(self) -> ParameterGradients:
        """Take away all signs, so that a sum shows the size of its terms."""
        uses = [replace(use, input=use.input.abs()) for use in self.uses]
        return replace(self, uses=uses, output_gradients=[g.abs() for g in self.output_gradients])

    def add_total(self, out: Tensor) -> None:
        """Add the gradients of all observations along the only column to ``out``."""
        totals: dict[int, tuple[Tensor, Tensor]] = {}
        for use, g in zip(self.uses, self.output_gradients, strict=True):
            total = out
            if use.source is not self.parameter:
                start = use.source, out.new_zeros(use.source.shape)
                total = totals.setdefault(id(use.source), start)[1]
            use.rule.add_total(total, use.input, g[0])
        for source, total in totals.values():
            out += pull_back(source, self.parameter, total)

    def gradients(self, part: slice = slice(None)) -> Float[Tensor, "n ..."]:
        """Gradient along the only column for each observation of a part of the batch."""
        found = [piece._rows() for piece in self._pieces(part)]
        rows = torch.cat(found) if len(found) > 1 else found[0]
        return pull_back(self._source, self.parameter, rows) if self.selects_entries else rows

    def add_squares(self, out: Tensor, squares: SquareSums) -> None:
        """Add the squared gradients along all columns and of all observations to ``out``.

        Some of them are added when ``squares`` is finished.
        """
        common = out
        if self.selects_entries and self._source is not self.parameter:
            common = out.new_zeros(self._source.shape)
        for piece in self._pieces():
            piece._add_squares(common, squares)
        if common is not out:
            squares.finish()
            out += pull_back(self._source, self.parameter, common)

    @property
    def squares_factorise(self) -> bool:
        """Whether each entry of a gradient is one product, whose square is one of squares.

        Then the squares of several columns can be added up before they are multiplied.
        """
        if not self.selects_entries or len(self.uses) > 1:
            return False
        return self.uses[0].rule.squares_factorise(self.uses[0].input, self.output_gradients[0][0])

    def squared_terms(self) -> Float[Tensor, "N ..."]:
        """Return the squares of the output gradients, added up over columns."""
        g = self.output_gradients[0]
        return g.square().sum(0) if len(g) > 1 else g[0].square()

    def add_squares_of_terms(self, out: Tensor, squared: Float[Tensor, "N ..."]) -> None:
        """Add the squared gradients to ``out``, given those of the output gradients."""
        use = self.uses[0]
        uses = [replace(use, input=use.input.square())]
        replace(self, uses=uses, output_gradients=[squared.unsqueeze(0)]).add_total(out)

    @property
    def _source(self) -> Tensor:
        return self.uses[0].source

    def _rows(self) -> Float[Tensor, "n ..."]:
        """Gradients of the common tensor along the only column, or of the parameter."""
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        for use, g in zip(self.uses, self.output_gradients, strict=True):
            rows, key = use.rule.gradients(use.input, g[0]), id(use.source)
            sums[key] = use.source, sums[key][1] + rows if key in sums else rows
        if not self.selects_entries:
            sums = {k: (t, pull_back(t, self.parameter, rows)) for k, (t, rows) in sums.items()}
        first, *others = (rows for _, rows in sums.values())
        for other in others:
            first = first + other
        return first

    def _add_squares(self, common: Tensor, squares: SquareSums) -> None:
        """Add the squared gradients of the common tensor, or of the parameter."""
        if self.selects_entries and len(self.uses) == 1:
            use = self.uses[0]
            use.rule.add_squares(common, use.input, self.output_gradients[0], squares)
            return
        row_bytes = common.numel() * common.element_size()
        for k in range(len(self)):
            for part in squares.budget.pieces_of_squares(self.uses[0].n, row_bytes):
                squares.add(common, self.column(k)._of(part)._rows())

    def _of(self, part: slice) -> ParameterGradients:
        """Take a part of the batch."""
        n = len(range(self.uses[0].n)[part])
        if n == self.uses[0].n:
            return self
        uses = [replace(use, n=n, input=use.input[part]) for use in self.uses]
        output_gradients = [g[:, part] for g in self.output_gradients]
        return replace(self, uses=uses, output_gradients=output_gradients)

    def _pieces(self, part: slice = slice(None)) -> Iterator[ParameterGradients]:
        """Cut a part of the batch so that uses can be joined in the memory there is for rows."""
        own = self._of(part)
        if len(self.uses) == 1:
            yield own
            return
        pairs = zip(own.uses, own.output_gradients, strict=True)
        row_bytes = sum(_size(u, g) * g.element_size() for u, g in pairs if _is_small(u, g))
        room = memory.budget(self.parameter.device).rows
        for piece in memory.pieces(own.uses[0].n, row_bytes, room):
            yield own._of(piece)._joined()

    def _joined(self) -> ParameterGradients:
        """Join the uses of one tensor by one rule, which are the positions of a single one.

        A weight of a recurrent layer is used at every position. One large product is faster than
        many small ones, each of which has a gradient of its own for every observation. Uses with
        more rows than that are left alone: to copy them would cost more.
        """
        groups: dict[Any, list[tuple[UseInBatch, Tensor]]] = {}
        for use, g in zip(self.uses, self.output_gradients, strict=True):
            key = (id(use.source), use.rule) if _is_small(use, g) else id(use)
            groups.setdefault(key, []).append((use, g))
        uses, output_gradients = [], []
        for group in groups.values():
            first = group[0][0]
            if len(group) > 1:
                assert isinstance(first.rule, Products)
                rule, a, g = first.rule.join([(use.input, g) for use, g in group])
                group = [(replace(first, use=replace(first.use, rule=rule), input=a), g)]
            uses += [use for use, _ in group]
            output_gradients += [g for _, g in group]
        return replace(self, uses=uses, output_gradients=output_gradients)


def _is_small(use: UseInBatch, g: Tensor) -> bool:
    """Whether a product takes more memory than its factors."""
    return isinstance(use.rule, Products) and _size(use, g) < len(g) * use.rule.shape.numel()


def _size(use: UseInBatch, g: Tensor) -> int:
    return use.input[0].numel() + g[:, 0].numel()
