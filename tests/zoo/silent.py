"""Parameters without any gradient, and numbers that are not finite where nobody needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import WORDS, Functional, animal, function, layer, read, stir


class Beside(nn.Module):
    """A network that has something beside what it uses."""

    def __init__(self, **others: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


layer("unused_parameter", lambda: Beside(idle=nn.Parameter(torch.ones(2))), 4)
layer("unused_layer", lambda: Beside(idle=nn.Linear(3, 2)), 4)
layer("unused_convolution", lambda: Beside(idle=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)), 4)
layer("unused_recurrent_layer", lambda: Beside(idle=nn.GRU(2, 2)), 4)


def _frozen(value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value), requires_grad=False)


layer("unused_frozen_infinity", lambda: Beside(idle=_frozen(float("inf"), 3)), 4)
layer("unused_frozen_nan", lambda: Beside(idle=_frozen(float("nan"), 3)), 4)

function("zero_gradient_times_zero", (4,), lambda p, x: x @ p.w + 0 * (x @ p.v), w=(4, 3), v=(4, 3))
function(
    "zero_gradient_detached", (4,), lambda p, x: x @ p.w * (x @ p.v).detach(), w=(4, 3), v=(4, 3)
)
function(
    "zero_gradient_in_a_dead_unit",
    (4,),
    lambda p, x: x @ p.w + torch.relu(x @ p.v - 1e3),
    w=(4, 3),
    v=(4, 3),
)
function(
    "zero_gradient_by_rounding", (4,), lambda p, x: x @ p.w + (x @ p.v).round(), w=(4, 3), v=(4, 3)
)
function(
    "zero_gradient_before_a_softmax",
    (4,),
    lambda p, x: (x @ p.w + (x @ p.v).unsqueeze(1)).softmax(1),
    w=(4, 3),
    v=(4,),
)


class DeadUnits(nn.Module):
    """Two layers of rectified units, none of which is ever active in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.relu(self.dead(h) - 100))


class ZeroInitialised(nn.Module):
    """A branch that starts at zero, as adapters and residual blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x) + self.up(self.down(x))
        return h + self.gate * torch.tanh(self.inner(h))


def _at_zero() -> Any:
    body = stir(ZeroInitialised())
    body.up.weight.data.zero_()
    body.gate.data.zero_()
    return read(body, torch.randn(N, 4))


layer("zero_gradient_of_dead_layers", DeadUnits, 4)
animal("zero_gradient_at_the_start", _at_zero)


def _blank(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register a layer on inputs of which the first ones are zero."""

    def case() -> Any:
        x = torch.randn(24, *shape)
        x[:10] = 0
        return read(stir(make()), x)

    animal(name, case)


_blank("blank_at_first", lambda: nn.Linear(4, 5), 4)
_blank("blank_at_first_without_bias", lambda: nn.Linear(4, 5, bias=False), 4)
_blank("blank_at_first_in_a_convolution", lambda: nn.Conv1d(2, 3, 2, bias=False), 2, 4)
_blank(
    "blank_at_first_without_a_rule",
    lambda: Functional(lambda p, x: torch.einsum("ni,ij,jk->nk", x, p.a, p.b), a=(4, 2), b=(2, 3)),
    4,
)
_blank(
    "blank_at_first_in_two_layers",
    lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    4,
)


# Numbers that are not finite


class Masked(nn.Module):
    """Attention whose mask of minus infinities is a buffer, a frozen parameter or made anew."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        mask = torch.full((3, 3), float("-inf")).triu(1)
        if kind == "buffer":
            self.register_buffer("mask", mask)
        else:
            self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / 2 + self.mask
        return scores.softmax(-1) @ x


def _mask(kind: str) -> Any:
    body = Masked(kind)
    for layer_ in (body.query, body.key):
        stir(layer_)
    return read(body, torch.randn(N, 3, 4))


animal("infinite_mask_in_a_buffer", lambda: _mask("buffer"))
animal("infinite_mask_in_a_frozen_parameter", lambda: _mask("parameter"))


def _bias_of_minus_infinity() -> Any:
    """A frozen bias that forbids a class; the classes that are left are read."""
    body = Functional(lambda p, x: F.softmax(p.linear(x) + p.forbid, -1))
    body.linear = stir(nn.Linear(4, 5))
    body.forbid = nn.Parameter(torch.tensor([0.0, 0, float("-inf"), 0, 0]), requires_grad=False)
    return read(body, torch.randn(N, 4))


def _infinite_table() -> Any:
    """A frozen table with a row of infinities that no word of the data looks up."""
    table = nn.Embedding(WORDS + 1, 3)
    table.weight.data[WORDS] = float("inf")
    body = nn.Sequential(table.requires_grad_(False), nn.Linear(3, 4))
    return read(body, torch.randint(0, WORDS, (N, 3)))


animal("infinite_frozen_bias", _bias_of_minus_infinity)
animal("infinite_row_that_nobody_looks_up", _infinite_table)
function(
    "infinite_scores_where_masked",
    (3, 4),
    lambda p, x: (
        torch.where(x[..., 0] > -0.5, x @ p.w, float("-inf")).clamp(-1e9).softmax(-1).unsqueeze(-1)
        * x
    ),
    w=(4,),
)
