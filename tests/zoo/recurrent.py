"""Recurrent networks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import First, PositionsFirst, layer


def recurrent(kind: type[nn.Module], **options: Any) -> nn.Module:
    """Return a small recurrent network that takes observations first."""
    options = {"batch_first": True, **options}
    inner = kind(2, 2, **options)
    return First(inner) if options["batch_first"] else PositionsFirst(inner)


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    _name = _kind.__name__.lower()
    layer(_name, partial(recurrent, _kind), 3, 2)
    layer(f"{_name}_with_positions_first", partial(recurrent, _kind, batch_first=False), N, 2)
layer("lstm_in_both_directions", lambda: recurrent(nn.LSTM, bidirectional=True), 3, 2)
layer("gru_of_two_layers", lambda: recurrent(nn.GRU, num_layers=2, dropout=0.5), 3, 2)


class Cells(nn.Module):
    """Recurrent cells, called position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(2, 2), nn.GRUCell(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, memory, other = None, None, None
        for at in range(x.shape[1]):
            state, memory = self.lstm(x[:, at], None if state is None else (state, memory))
            other = self.gru(state, other)
        return other


layer("recurrent_cells", Cells, 3, 2)
