r"""Recurrent layers and cells as code out of linear maps, whose uses of the weights can be watched.

PyTorch computes them by one operation each, which shows nothing of what happens at a position.
Here the inputs of all positions are mapped at once, and only the map of the states waits for the
position before. A layer of the rows of a packed sequence works at each position on the sequences
that are that long, which come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]
"""The output of the position before, and the memory of an LSTM."""

Advance: TypeAlias = Callable[..., State]
"""The next state, from the mapped input, the state, its weight and bias, and a projection."""


def _tanh(x: Tensor, state: State, weight: Tensor, bias: Tensor | None = None) -> State:
    return ((x + F.linear(state[0], weight, bias)).tanh(),)


def _relu(x: Tensor, state: State, weight: Tensor, bias: Tensor | None = None) -> State:
    return ((x + F.linear(state[0], weight, bias)).relu(),)


def _gru(x: Tensor, state: State, weight: Tensor, bias: Tensor | None = None) -> State:
    x_reset, x_update, x_new = x.chunk(3, 1)
    h_reset, h_update, h_new = F.linear(state[0], weight, bias).chunk(3, 1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return (new + (x_update + h_update).sigmoid() * (state[0] - new),)


def _lstm(
    x: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None = None,
    projection: Tensor | None = None,
) -> State:
    output, memory = state
    enter, keep, new, leave = (x + F.linear(output, weight, bias)).chunk(4, 1)
    memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
    output = leave.sigmoid() * memory.tanh()
    return output if projection is None else F.linear(output, projection), memory


# Layers


class Weights(NamedTuple):
    """The weights of one level and direction.

    Attributes
    ----------
    of_input
        Weight and bias of the map of the inputs.
    of_state
        Weight and bias of the map of the state, and a projection of the output if there is one.
    """

    of_input: tuple[Tensor, Tensor | None]
    of_state: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where the positions lie in the input and the output of a layer.

    Attributes
    ----------
    axis
        Their axis.
    rows
        How many rows there are at each position of a packed sequence, which has no axis for them.
    """

    axis: int = 0
    rows: list[int] | None = None

    def cut(self, sequence: Tensor) -> Sequence[Tensor]:
        """Return the rows at each position."""
        return sequence.unbind(self.axis) if self.rows is None else sequence.split(self.rows)

    def join(self, positions: list[Tensor]) -> Tensor:
        """Put the rows at all positions together again."""
        return torch.stack(positions, self.axis) if self.rows is None else torch.cat(positions)


@dataclass(frozen=True)
class Layer:
    """A recurrent layer of several levels, with the arguments of PyTorch's operations.

    Attributes
    ----------
    advance
        How the state goes from one position to the next.
    """

    advance: Advance

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Compute the outputs at all positions and the last states."""
        padded = "batch_first" in kwargs or (len(args) == 9 and isinstance(args[3], bool))
        return (self.padded if padded else self.packed)(*args, **kwargs)

    def padded(
        self,
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        """Read an input with an axis for the positions."""
        weights = _by_run(params, has_biases, num_layers * (1 + bidirectional))
        layout = Layout(int(batch_first))
        return self._run(input, layout, hx, weights, num_layers, dropout if train else 0.0)

    def packed(
        self,
        data: Tensor,
        batch_sizes: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        """Read the rows of a packed sequence."""
        weights = _by_run(params, has_biases, num_layers * (1 + bidirectional))
        layout = Layout(rows=batch_sizes.tolist())
        return self._run(data, layout, hx, weights, num_layers, dropout if train else 0.0)

    def _run(
        self,
        sequence: Tensor,
        layout: Layout,
        hx: Any,
        weights: list[Weights],
        num_layers: int,
        dropout: float,
    ) -> tuple[Tensor, ...]:
        """Go through the levels, each in one direction or both."""
        first = zip(*[h.unbind() for h in _states(hx)], strict=True)
        runs, last = list(zip(weights, first, strict=True)), []
        directions = len(runs) // num_layers
        for level in range(num_layers):
            if level and dropout:
                sequence = F.dropout(sequence, dropout)
            outputs = []
            for i, (own, state) in enumerate(runs[level * directions : (level + 1) * directions]):
                output, state = self._one_way(sequence, layout, state, own, backwards=i == 1)
                outputs.append(output)
                last.append(state)
            sequence = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return sequence, *(torch.stack(states) for states in zip(*last, strict=True))

    def _one_way(
        self,
        sequence: Tensor,
        layout: Layout,
        first: State,
        weights: Weights,
        backwards: bool,
    ) -> tuple[Tensor, State]:
        """Return the outputs at all positions and the last state of each sequence."""
        positions = layout.cut(F.linear(sequence, *weights.of_input))
        state = tuple(h[: len(positions[-1 if backwards else 0])] for h in first)
        ended: list[State] = []
        outputs = []
        for x in reversed(positions) if backwards else positions:
            running, n = len(state[0]), len(x)
            if n < running:
                ended.append(tuple(h[n:] for h in state))
                state = tuple(h[:n] for h in state)
            elif n > running:
                state = tuple(
                    torch.cat([h, new[running:n]]) for h, new in zip(state, first, strict=True)
                )
            state = self.advance(x, state, *weights.of_state)
            outputs.append(state[0])
        if ended:
            state = tuple(map(torch.cat, zip(state, *reversed(ended), strict=True)))
        return layout.join(outputs[::-1] if backwards else outputs), state


def _states(hx: Any) -> Sequence[Tensor]:
    return (hx,) if isinstance(hx, Tensor) else hx


def _by_run(params: Sequence[Tensor], has_biases: bool, n: int) -> list[Weights]:
    size, runs = len(params) // n, []
    for start in range(0, len(params), size):
        of_input, of_state, *others = params[start : start + size]
        biases = others[:2] if has_biases else (None, None)
        projection = others[2 * has_biases :]
        runs.append(Weights((of_input, biases[0]), (of_state, biases[1], *projection)))
    return runs


# Cells


@dataclass(frozen=True)
class Cell:
    """A recurrent cell, with the arguments of PyTorch's operations.

    Attributes
    ----------
    advance
        How the state goes from one position to the next.
    """

    advance: Advance

    def __call__(
        self,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        """Compute the next state."""
        state = self.advance(F.linear(input, w_ih, b_ih), tuple(_states(hx)), w_hh, b_hh)
        return state[0] if isinstance(hx, Tensor) else state


RECURRENT: dict[Any, Layer | Cell] = {
    torch.lstm: Layer(_lstm),
    torch.gru: Layer(_gru),
    torch.rnn_tanh: Layer(_tanh),
    torch.rnn_relu: Layer(_relu),
    torch.lstm_cell: Cell(_lstm),
    torch.gru_cell: Cell(_gru),
    torch.rnn_tanh_cell: Cell(_tanh),
    torch.rnn_relu_cell: Cell(_relu),
}
"""Each operation as code that computes the same."""
