"""Rows in another order than the observations, and back.

The first eight of twenty-four observations are in order already wherever data decide about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.scenarios import Scenario
from tests.zoo.registry import WORDS, Functional, PositionsFirst, animal, read, stir

MANY = 24
LENGTHS = (3, 3, 3, 3, 2, 2, 1, 1) + (1, 3, 2, 2) * 4
Order = Callable[[nn.Module, Any], Tensor]


class Reordered(nn.Module):
    """A body that sees the observations in another order, and a scale that does not."""

    def __init__(self, body: nn.Module, order: Order) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.ones(()))
        self.order = order

    def forward(self, *inputs: Tensor) -> Tensor:
        order = self.order(self, inputs)
        h = self.body(*(x[order] for x in inputs[:1]))
        return torch.tanh(h[order.argsort()]) * self.scale


def by_length(model: nn.Module, inputs: Any) -> Tensor:
    return inputs[1].argsort(descending=True, stable=True)


def by_size(model: nn.Module, inputs: Any) -> Tensor:
    return inputs[0].flatten(1).sum(1).argsort(stable=True)


def backwards(model: nn.Module, inputs: Any) -> Tensor:
    return torch.arange(len(inputs[0]), device=inputs[0].device).flip(0)


def rolled(model: nn.Module, inputs: Any) -> Tensor:
    return torch.arange(len(inputs[0]), device=inputs[0].device).roll(1)


def even_before_odd(model: nn.Module, inputs: Any) -> Tensor:
    numbers = torch.arange(len(inputs[0]), device=inputs[0].device)
    return torch.cat([numbers[::2], numbers[1::2]])


def as_drawn(model: nn.Module, inputs: Any) -> Tensor:
    """Follow a permutation that the model holds, as far as there are observations."""
    order = model.body.get_buffer("order")
    return order[order < len(inputs[0])]


def by_a_learned_score(model: nn.Module, inputs: Any) -> Tensor:
    return model.body(inputs[0]).flatten(1)[:, 0].argsort(stable=True)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Return sequences and their lengths; the first eight grow in size, and shrink in length."""
    x = torch.randn(MANY, *shape)
    x[:8] = x[:8][x[:8].flatten(1).sum(1).argsort()]
    return x, torch.tensor(LENGTHS)


def _linear() -> nn.Module:
    body = nn.Linear(4, 5)
    body.register_buffer("order", torch.randperm(MANY))
    return body


def reordered(
    order: Order, *shape: int, make: Callable[[], nn.Module] = _linear
) -> Callable[[], Scenario]:
    """Return what makes a model that sees the observations in an order."""
    return lambda: read(Reordered(stir(make()), order), inputs(*(shape or (4,))))


for _order in (by_length, by_size, backwards, rolled, even_before_odd, as_drawn):
    animal(f"order_{_order.__name__}", reordered(_order))
    animal(f"order_{_order.__name__}_of_sequences", reordered(_order, 3, 4))
animal("order_by_a_learned_score", reordered(by_a_learned_score))

_BODIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a_convolution": (lambda: nn.Conv1d(2, 3, 2), (2, 4)),
    "a_normalisation": (lambda: nn.LayerNorm(4), (3, 4)),
    "two_layers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "what_no_rule_knows": (
        lambda: Functional(
            lambda p, x: torch.einsum("ni,ij,jk->nk", x, p.a, p.b), a=(4, 2), b=(2, 4)
        ),
        (4,),
    ),
    "a_scale": (lambda: Functional(lambda p, x: x * p.w + p.b, w=(4,), b=(4,)), (3, 4)),
    "positions_first": (lambda: PositionsFirst(nn.Linear(4, 3)), (3, 4)),
}
for _name, (_make, _shape) in _BODIES.items():
    animal(f"order_by_length_of_{_name}", reordered(by_length, *_shape, make=_make))
    animal(f"order_as_reversed_of_{_name}", reordered(backwards, *_shape, make=_make))


class OneSorted(nn.Module):
    """Two layers on the same input, of which one sees it sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        h = torch.tanh(self.shared(x[order]))[order.argsort()]
        return h + self.shared(x) * torch.sigmoid(self.own(x))


animal("order_of_one_use_of_two", lambda: read(stir(OneSorted()), inputs(4)))


class SortedPacked(nn.Module):
    """The usual code around a packed sequence: sort, embed, pack, run, unpack, unsort."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 2)
        self.inner = nn.GRU(2, 2, batch_first=True)
        self.out = nn.Linear(2, 2)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True, stable=True)
        packed = pack_padded_sequence(self.table(words[order]), lengths[order].cpu(), True)
        h, _ = pad_packed_sequence(self.inner(packed)[0], True, total_length=words.shape[1])
        return self.out(h)[order.argsort()]


animal(
    "order_of_packed_words",
    lambda: read(stir(SortedPacked()), (torch.randint(0, WORDS, (MANY, 3)), torch.tensor(LENGTHS))),
)


def _flipped(p: Any, x: Tensor) -> Tensor:
    return F.linear(x.flip(0), p.w, p.b).flip(0)


def _rolled(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x.roll(3, 0), p.w, p.b)).roll(-3, 0)


def _in_two_blocks(p: Any, x: Tensor) -> Tensor:
    """The later half first."""
    half = (len(x) + 1) // 2
    h = F.linear(torch.cat([x[half:], x[:half]]), p.w, p.b)
    return torch.cat([h[len(x) - half :], h[: len(x) - half]])


for _f in (_flipped, _rolled, _in_two_blocks):
    animal(
        f"order{_f.__name__}_by_an_operation",
        lambda f=_f: read(Functional(f, w=(5, 4), b=(5,)), torch.randn(MANY, 4)),
    )
