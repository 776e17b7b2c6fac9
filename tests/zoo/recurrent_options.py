"""Recurrent layers with each of their options, packed, and written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.scenarios import N, Scenario
from tests.zoo.recurrent import recurrent
from tests.zoo.registry import First, animal, function, layer, read, stir

KINDS: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_OPTIONS: dict[str, dict[str, Any]] = {
    "without_bias": {"bias": False},
    "of_three_layers": {"num_layers": 3},
    "of_two_layers_in_both_directions": {"num_layers": 2, "bidirectional": True},
}
for _kind, _class in KINDS.items():
    for _name, _given in _OPTIONS.items():
        layer(f"{_kind}_{_name}", partial(recurrent, _class, **_given), 3, 2)
for _kind in ("gru", "rnn"):
    layer(f"{_kind}_in_both_directions", partial(recurrent, KINDS[_kind], bidirectional=True), 3, 2)
layer("rnn_of_rectified_units", lambda: recurrent(nn.RNN, nonlinearity="relu"), 3, 2)
layer("lstm_with_a_projection", lambda: recurrent(nn.LSTM, proj_size=1), 3, 2)
layer(
    "lstm_with_projections_in_both_directions",
    lambda: recurrent(nn.LSTM, proj_size=1, num_layers=2, bidirectional=True),
    3,
    2,
)
layer("lstm_of_one_position", lambda: recurrent(nn.LSTM), 1, 2)
layer("lstm_called_twice", lambda: nn.Sequential(*[_same_lstm()] * 2), 3, 2)
layer("lstm_between_layers", lambda: _sandwich(nn.LSTM), 3, 4)
layer("gru_between_layers", lambda: _sandwich(nn.GRU), 3, 4)


def _same_lstm() -> nn.Module:
    return First(nn.LSTM(2, 2, batch_first=True))


def _sandwich(kind: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2), recurrent(kind), nn.Tanh(), nn.Linear(2, 3))


class Last(nn.Module):
    """The last state of a recurrent network, which starts from a learned one."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner = kind(2, 2, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 2))
        self.memory = nn.Parameter(torch.randn(1, 1, 2)) if kind is nn.LSTM else None

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.start.expand(-1, len(x), -1).contiguous()
        if self.memory is not None:
            state = state, self.memory.expand(-1, len(x), -1).contiguous()
        last = self.inner(x, state)[1]
        return torch.cat(last, -1)[-1] if isinstance(last, tuple) else last[-1]


class Packed(nn.Module):
    """A recurrent network on a packed sequence, whose padding is not read."""

    def __init__(self, inner: nn.Module, enforce_sorted: bool) -> None:
        super().__init__()
        self.inner = inner
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=self.enforce_sorted)
        return pad_packed_sequence(self.inner(packed)[0], True, total_length=x.shape[1])[0]


def packed(kind: type[nn.Module], enforce_sorted: bool = False, **options: Any) -> Scenario:
    """Return a recurrent network on packed sequences of different lengths."""
    lengths = torch.randint(1, 4, (N,))
    lengths = lengths.sort(descending=True).values if enforce_sorted else lengths
    body = Packed(kind(2, 2, batch_first=True, **options), enforce_sorted)
    return read(stir(body), (torch.randn(N, 3, 2), lengths))


for _kind, _class in KINDS.items():
    layer(f"{_kind}_from_a_learned_state", partial(Last, _class), 3, 2)
    animal(f"{_kind}_packed", partial(packed, _class))
    animal(f"{_kind}_packed_in_order", partial(packed, _class, enforce_sorted=True))
    animal(f"{_kind}_packed_in_both_directions", partial(packed, _class, bidirectional=True))
animal("lstm_packed_with_a_projection", lambda: packed(nn.LSTM, proj_size=1))


class Steps(nn.Module):
    """A recurrent cell, called position by position from the end on."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in x.flip(1).unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


for _cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    layer(f"{_cell.__name__.lower()}_in_a_loop", lambda c=_cell: Steps(c(2, 3)), 3, 2)
layer("grucell_without_bias_in_a_loop", lambda: Steps(nn.GRUCell(2, 3, bias=False)), 3, 2)


def _weight_normed(kind: type[nn.Module], *names: str) -> nn.Module:
    body = recurrent(kind)
    for name in names:
        parametrizations.weight_norm(body.inner, name)
    return body


layer("lstm_with_weight_norm", lambda: _weight_normed(nn.LSTM, "weight_hh_l0"), 3, 2)
layer("gru_with_weight_norm", lambda: _weight_normed(nn.GRU, "weight_hh_l0", "weight_ih_l0"), 3, 2)


def _minimal(p: Any, x: Tensor) -> Tensor:
    """A gated unit written by hand."""
    state = torch.zeros_like(x[:, 0])
    for step in x.unbind(1):
        gate = torch.sigmoid(step @ p.gate + state @ p.back)
        state = torch.lerp(state, torch.tanh(step @ p.w), gate)
    return state


function("recurrent_unit_by_hand", (3, 2), _minimal, gate=(2, 2), back=(2, 2), w=(2, 2))
