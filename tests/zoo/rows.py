"""Rows of several observations in one tensor: some are left out, others come more than once.

The first eight of twenty-four observations are full, so that a look at them alone misleads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from tests.zoo.registry import WORDS, Functional, animal, read, stir

MANY = 24
POSITIONS = 4
LENGTHS = {
    "": (4,) * 8 + (2, 0, 1, 1) * 4,
    "_that_do_not_divide": (4,) * 8 + (3, 1, 2, 1) * 4,
    "_ragged_from_the_start": (1, 4, 2, 3, 1, 2, 4, 1) * 3,
    "_none_at_first": (0,) * 8 + (2, 3, 1, 4) * 4,
}
"""How many positions of each observation are there: sums of 48, 60, 54 and 40."""

Rows = Callable[[Any, Tensor, Tensor], Tensor]


def there(lengths: Sequence[int] = LENGTHS[""]) -> Tensor:
    """Return a mask of the positions that are there."""
    return torch.arange(POSITIONS) < torch.tensor(lengths).unsqueeze(1)


def ragged(name: str, f: Rows, lengths: Sequence[int] = LENGTHS[""], **shapes: Any) -> None:
    """Register a function of raw parameters on sequences and on a mask of what is there."""
    shapes = shapes or {"w": (5, 4), "b": (5,)}

    def make() -> Any:
        return read(Functional(f, **shapes), (torch.randn(MANY, POSITIONS, 4), there(lengths)))

    animal(name, make)


def put(mask: Tensor, rows: Tensor) -> Tensor:
    """Put rows where a mask is true, and zeros elsewhere."""
    result = rows.new_zeros(*mask.shape, *rows.shape[1:])
    result[mask] = rows
    return result


def _selected(p: Any, x: Tensor, m: Tensor) -> Tensor:
    at = m.flatten().nonzero().squeeze(1)
    rows = F.linear(x.flatten(0, 1).index_select(0, at), p.w, p.b)
    return rows.new_zeros(m.numel(), 5).index_add(0, at, rows).unflatten(0, m.shape)


def _by_number(p: Any, x: Tensor, m: Tensor) -> Tensor:
    n, t = m.nonzero(as_tuple=True)
    rows = F.linear(x[n, t], p.w, p.b)
    return rows.new_zeros(*m.shape, 5).index_put((n, t), rows)


def _scattered(p: Any, x: Tensor, m: Tensor) -> Tensor:
    rows = F.linear(x[m], p.w, p.b)
    return rows.new_zeros(*m.shape, 5).masked_scatter(m.unsqueeze(-1), rows)


def _pooled(p: Any, x: Tensor, m: Tensor) -> Tensor:
    rows = torch.tanh(F.linear(x[m], p.w, p.b))
    return rows.new_zeros(len(x), 5).index_add(0, m.nonzero()[:, 0], rows)


def _one_after_the_other(p: Any, x: Tensor, m: Tensor) -> Tensor:
    rows = torch.cat([row[here] for row, here in zip(x, m, strict=True)])
    parts = F.linear(rows, p.w, p.b).split(m.sum(1).tolist())
    padded = pad_sequence(list(parts), batch_first=True)
    return F.pad(padded, (0, 0, 0, POSITIONS - padded.shape[1]))


def _packed(p: Any, x: Tensor, m: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, m.sum(1).clamp(min=1).cpu(), True, enforce_sorted=False)
    mapped = PackedSequence(F.linear(packed.data, p.w, p.b), *packed[1:])
    return pad_packed_sequence(mapped, batch_first=True, total_length=POSITIONS)[0]


for _name, _lengths in LENGTHS.items():
    ragged(
        f"rows_by_mask{_name}",
        lambda p, x, m: put(m, torch.tanh(F.linear(x[m], p.w, p.b))),
        _lengths,
    )
    ragged(f"rows_of_a_packed_sequence{_name}", _packed, _lengths)
ragged("rows_by_number", _by_number)
ragged("rows_by_index_select", _selected)
ragged("rows_by_index_select_that_do_not_divide", _selected, LENGTHS["_that_do_not_divide"])
ragged("rows_by_masked_scatter", _scattered)
ragged("rows_by_masked_select", lambda p, x, m: put(m, F.linear(_flat(x, m), p.w, p.b)))
ragged("rows_pooled_by_observation", _pooled)
ragged("rows_joined_and_split", _one_after_the_other)
ragged("rows_into_a_matrix_product", lambda p, x, m: put(m, x[m] @ p.w), w=(4, 5))
ragged(
    "rows_into_an_einsum",
    lambda p, x, m: put(m, torch.einsum("ri,oi->ro", x[m], p.w)),
    w=(5, 4),
)
ragged(
    "rows_into_a_normalisation",
    lambda p, x, m: put(m, F.layer_norm(x[m], (4,), p.w, p.b)),
    w=(4,),
    b=(4,),
)
ragged("rows_into_a_sum_and_product", lambda p, x, m: put(m, x[m] * p.w + p.b), w=(4,), b=(4,))
ragged(
    "rows_into_a_convolution",
    lambda p, x, m: put(m, F.conv1d(x[m].unsqueeze(1), p.w, p.b).flatten(1)),
    w=(2, 1, 3),
    b=(2,),
)
ragged(
    "rows_and_all_of_them",
    lambda p, x, m: put(m, F.linear(x[m], p.w, p.b)) + torch.tanh(F.linear(x, p.w, p.b)),
)
ragged(
    "rows_chosen_for_a_second_layer",
    lambda p, x, m: put(m, torch.tanh(F.linear(x, p.a))[m] @ p.w),
    a=(4, 4),
    w=(4, 3),
)


def _flat(x: Tensor, m: Tensor) -> Tensor:
    return x.masked_select(m.unsqueeze(-1)).unflatten(0, (-1, 4))


def _of_words(name: str, make: Callable[[], nn.Module], first: int = 1) -> None:
    """Register a module on words, of which the first eight are all of one kind."""

    def case() -> Any:
        words = torch.randint(0, WORDS, (MANY, 3))
        words[:8] = first
        return read(make(), words)

    animal(name, case)


class HashLayer(nn.Module):
    """The expert of each token depends on which word it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, words: Tensor) -> Tensor:
        h = self.table(words)
        result = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            result[words % 3 == number] = expert(h[words % 3 == number])
        return result


_of_words("rows_routed_by_hash", HashLayer)
_of_words(
    "rows_of_words_that_are_there",
    lambda: Functional(lambda p, x: put(x > 0, F.embedding(x[x > 0], p.w)), w=(WORDS, 3)),
)


def _each_word_once(p: Any, x: Tensor) -> Tensor:
    """Map each word that occurs once, whoever uses it, and hand out the results."""
    found, where = x.unique(return_inverse=True)
    return torch.tanh(F.linear(F.one_hot(found, WORDS).to(p.w), p.w, p.b))[where]


_of_words(
    "rows_shared_by_observations", lambda: Functional(_each_word_once, w=(3, WORDS), b=(3,)), 2
)


class EarlyExit(nn.Module):
    """Observations about which the first layer is sure take no further layer."""

    def __init__(self, far: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.far = far

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        going = (x.abs().amax(1) < self.far).nonzero().squeeze(1)
        if len(going) == 0:
            return h
        return h.index_copy(0, going, torch.tanh(self.second(h[going])))


def _small_at_first() -> Tensor:
    x = torch.randn(MANY, 4)
    x[:8] /= 10
    return x


animal("rows_without_an_early_exit", lambda: read(stir(EarlyExit()), _small_at_first()))
animal("rows_with_late_exits", lambda: read(stir(EarlyExit(far=0.9)), 3 * _small_at_first()))


def _several(name: str, f: Callable[..., Tensor], **shapes: Any) -> None:
    body = {"w": (5, 4), "b": (5,), **shapes}
    animal(name, lambda: read(Functional(f, **body), torch.randn(MANY, 2, 4)))


_several(
    "rows_of_two_views_one_after_the_other",
    lambda p, x: torch.cat(F.linear(torch.cat([x[:, 0], x[:, 1]]), p.w, p.b).chunk(2), 1),
)
_several(
    "rows_of_two_views_in_turn",
    lambda p, x: F.linear(x.flatten(0, 1), p.w, p.b).unflatten(0, (-1, 2)).flatten(1),
)
_several(
    "rows_repeated",
    lambda p, x: F.linear(x[:, 0].repeat_interleave(3, 0), p.w, p.b).unflatten(0, (-1, 3)).mean(1),
)
_several(
    "rows_one_by_one_and_together",
    lambda p, x: torch.cat(
        [F.linear(part.flatten(0, 1), p.w, p.b).unflatten(0, (-1, 2)) for part in x.split(5)]
    ),
)
