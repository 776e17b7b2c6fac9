"""Uses of a parameter that nobody sees, or that appear in some batches only.

Among twenty-four observations a few later ones are outliers, which are treated in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.scenarios import HiddenLinear
from tests.zoo.registry import WORDS, Functional, animal, read, stir

MANY = 24
OUTLIERS = {11: 4.5, 17: -3.5, 22: 6.0}


def with_outliers(name: str, f: Callable[..., Tensor], first: bool = False, **shapes: Any) -> None:
    """Register a function of raw parameters, ``p.w`` for all and ``p.far`` for outliers."""

    def make() -> Any:
        x = torch.randn(MANY, 4).clamp(-2, 2)
        for at, value in OUTLIERS.items():
            x[(at + 13) % MANY if first else at, at % 4] = value
        return read(stir(Functional(f, **shapes or {"w": (4, 4), "far": (4, 4)})), x)

    animal(name, make)


def far(x: Tensor) -> Tensor:
    """Return a column that is true for outliers."""
    return x.abs().amax(1, keepdim=True) > 3


def unseen(x: Tensor, w: Tensor) -> Tensor:
    """Return a linear map that no watcher of operations sees, of outliers alone."""
    return far(x) * torch.tanh(HiddenLinear.apply(x, w))


def _if_any(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + unseen(x, p.far) if far(x).any() else h


def _if_the_largest_is_large(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + unseen(x, p.far) if x.abs().max().item() > 3 else h


def _if_some_are_counted(p: Any, x: Tensor) -> Tensor:
    count = sum(max(map(abs, row)) > 3 for row in x.tolist())
    return F.linear(x, p.w) + (unseen(x, p.far) if count else 0)


def _rows(p: Any, x: Tensor) -> Tensor:
    h, at = F.linear(x, p.w), far(x).nonzero()[:, 0]
    return h.index_add(0, at, HiddenLinear.apply(x[at], p.far)) if len(at) else h


def _other_path(p: Any, x: Tensor) -> Tensor:
    """The whole batch takes the unseen way, which gives the same for those who are near."""
    if far(x).any():
        return HiddenLinear.apply(x, p.w) + far(x) * HiddenLinear.apply(x.square(), p.far)
    return F.linear(x, p.w)


def _seen_and_unseen(p: Any, x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(x, p.w))
    return h + unseen(x, p.w) if far(x).any() else h


def _seen(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + far(x) * F.linear(x, p.far) if far(x).any() else h


def _as_data(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + far(x) * torch.einsum("ni,ij,jk->nk", x, p.w, p.far) if far(x).any() else h


def _none_far(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h if far(x).all() else h + ~far(x) * torch.tanh(HiddenLinear.apply(x, p.far))


@torch.jit.script
def _scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(torch.matmul(x, w.t()))


def _in_a_script(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + far(x) * _scripted(x, p.far) if far(x).any() else h


def _seen_and_in_a_script(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p.w)
    return h + far(x) * _scripted(x, p.w) if far(x).any() else h


with_outliers("hidden_if_any_is_far", _if_any)
with_outliers("hidden_if_any_is_far_already_at_first", _if_any, first=True)
with_outliers("hidden_if_the_largest_is_large", _if_the_largest_is_large)
with_outliers("hidden_if_some_are_counted", _if_some_are_counted)
with_outliers("hidden_of_some_rows", _rows)
with_outliers("hidden_on_another_path", _other_path)
with_outliers("hidden_unless_all_are_far", _none_far, first=True)
with_outliers("hidden_and_seen", _seen_and_unseen, w=(4, 4))
with_outliers("hidden_and_seen_already_at_first", _seen_and_unseen, first=True, w=(4, 4))
with_outliers("hidden_in_a_script", _in_a_script)
with_outliers("hidden_in_a_script_and_seen", _seen_and_in_a_script, w=(4, 4))
with_outliers("seen_in_some_batches", _seen)
with_outliers("seen_in_some_batches_already_at_first", _seen, first=True)
with_outliers("used_in_some_batches_without_a_rule", _as_data)


class Small(torch.autograd.Function):
    """A linear map times a small number, which no watcher of operations sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, size: float) -> Tensor:
        return size * x @ w.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.size = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, w = ctx.saved_tensors
        g = ctx.size * grad_outputs[0]
        return g @ w, g.mT @ x, None


class Reversed(torch.autograd.Function):
    """The input itself, whose gradient gets the other sign, as adversarial training wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return -grad_outputs[0]


with_outliers(
    "hidden_small_use", lambda p, x: F.linear(x, p.w) + Small.apply(x, p.w, 1e-3), w=(4, 4)
)
with_outliers(
    "reversed_gradient",
    lambda p, x: torch.tanh(F.linear(Reversed.apply(F.linear(x, p.w)), p.far)) + F.linear(x, p.w),
)


def _rare_words() -> Any:
    """One word, which is not among the first ones, is looked up in a table of its own, unseen."""

    def f(p: Any, words: Tensor) -> Tensor:
        h = F.embedding(words, p.table)
        rare = (words == WORDS - 1).unsqueeze(-1)
        return h + rare * HiddenLinear.apply(h.flatten(0, 1), p.far).view_as(h) if rare.any() else h

    words = torch.randint(0, WORDS - 1, (MANY, 3))
    words[13, 1] = words[20, 2] = WORDS - 1
    return read(stir(Functional(f, table=(WORDS, 4), far=(4, 4))), words)


animal("hidden_of_rare_words", _rare_words)
