"""Models that have no scores, since observations mix or since chance decides: all are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N, Scenario
from tests.zoo.hidden import MANY, OUTLIERS, far
from tests.zoo.registry import Functional, read, refused, stir

MIXES = "mixes observations"
DRAWS = "random numbers"


def mixing(name: str, f: Callable[..., Tensor], *shape: int, **shapes: Any) -> None:
    """Register a function of the inputs whose rows are not independent, before a linear map."""
    shapes = shapes or {"w": (4, 4)}

    def make() -> Scenario:
        return read(stir(Functional(f, **shapes)), torch.randn(N, *(shape or (4,))))

    refused(name, MIXES, make)


def module(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register a module that mixes the rows of its input."""
    refused(name, MIXES, lambda: read(stir(make()), torch.randn(N, *shape)))


# Before the first parameter

_BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "running_sum": lambda x: x.cumsum(0),
    "first_subtracted": lambda x: x - x[:1],
    "last_subtracted": lambda x: x - x[-1:],
    "mean_subtracted": lambda x: x - x.mean(0),
    "median_subtracted": lambda x: x - x.median(0).values,
    "divided_by_the_largest": lambda x: x / x.abs().max(),
    "divided_by_the_norm": lambda x: x / x.norm(),
    "divided_by_the_deviation": lambda x: x / (x.var(0, unbiased=False) + 0.1).sqrt(),
    "softmax_over_observations": lambda x: x.softmax(0),
    "sorted_columns": lambda x: x.sort(0).values,
    "ranks": lambda x: x.argsort(0).argsort(0).to(x),
    "neighbours_added": lambda x: x + x.roll(1, 0),
    "differences": lambda x: x - torch.cat([x[:1], x[:-1]]),
    "mirrored": lambda x: x + x.flip(0),
    "largest_so_far": lambda x: x.cummax(0).values,
    "similarities": lambda x: (x @ x.T).softmax(1) @ x,
    "nearest_other": lambda x: x + x[_nearest(x)],
    "batch_statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "number_of_observations": lambda x: x * len(x),
    "mixed_up": lambda x: 0.7 * x + 0.3 * x[torch.arange(len(x)) // 2],
}


def _nearest(x: Tensor) -> Tensor:
    distances = torch.cdist(x, x)
    return distances.fill_diagonal_(float("inf")).argmin(1)


for _name, _f in _BEFORE.items():
    mixing(f"{_name}_before", lambda p, x, f=_f: F.linear(f(x), p.w))
for _name in ("running_sum", "last_subtracted", "softmax_over_observations", "neighbours_added"):
    mixing(f"{_name}_behind", lambda p, x, f=_BEFORE[_name]: f(F.linear(x, p.w)))
for _name in ("first_subtracted", "last_subtracted", "sorted_columns", "similarities"):
    mixing(
        f"{_name}_between",
        lambda p, x, f=_BEFORE[_name]: torch.tanh(f(torch.tanh(x @ p.w))) @ p.v,
        w=(4, 5),
        v=(5, 3),
    )
mixing(
    "mean_of_what_no_rule_knows",
    lambda p, x: torch.einsum("ni,ij,jk->nk", x - x[-1:], p.u, p.v),
    u=(4, 2),
    v=(2, 3),
)


# Layers that take the wrong axis for that of the observations


class FirstOf(nn.Module):
    """The first output of a layer."""

    def __init__(self, inner: nn.Module, *, queries: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.queries = queries

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*(x,) * (3 if self.queries else 1))[0]


module("lstm_along_observations", lambda: FirstOf(nn.LSTM(4, 4)), 3, 4)
module("gru_along_observations", lambda: FirstOf(nn.GRU(4, 4)), N, 4)
module("rnn_without_a_batch", lambda: FirstOf(nn.RNN(4, 4)), 4)
module(
    "attention_along_observations",
    lambda: FirstOf(nn.MultiheadAttention(4, 2), queries=True),
    3,
    4,
)
module(
    "encoder_along_observations",
    lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0),
    3,
    4,
)
module(
    "convolution_along_observations",
    lambda: Functional(
        lambda p, x: F.conv1d(x.T.unsqueeze(0), p.w, padding=1).squeeze(0).T, w=(4, 4, 3)
    ),
    4,
)
module("batch_norm_without_statistics", lambda: nn.BatchNorm1d(4, track_running_stats=False), 4)
module(
    "batch_norm_of_images_without_statistics",
    lambda: nn.BatchNorm2d(2, track_running_stats=False),
    2,
    3,
    3,
)


class AlwaysTraining(nn.BatchNorm1d):
    """A normalisation by the batch, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


module("batch_norm_that_always_trains", lambda: AlwaysTraining(4), 4)


class Observer(nn.Module):
    """A linear map whose input is rounded by the largest value seen so far, in any batch."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.momentum = momentum
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().abs().max()
        if self.momentum is None:
            self.largest.copy_(torch.maximum(self.largest, now))
        else:
            self.largest.lerp_(now, self.momentum)
        return self.linear((x / self.largest).mul(8).round() / 8)


def _fresh_observer() -> Scenario:
    case = read(stir(Observer(None)), torch.randn(N, 4))
    case.model.body.largest.zero_()  # to find its width, the body was run on all observations
    return case


refused("running_maximum", MIXES, _fresh_observer)
module("running_average_of_maxima", lambda: Observer(0.5), 4)


class Capacity(nn.Module):
    """An expert that takes three observations at most; the others get nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x) * (torch.arange(len(x), device=x.device) < 3).unsqueeze(1)


class Competing(nn.Module):
    """An expert that takes those half of the observations that want it most."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        score = self.router(x).squeeze(1)
        chosen = score.topk((len(x) + 1) // 2).indices
        return x.index_add(0, chosen, self.expert(x[chosen]))


class Queue(nn.Module):
    """Features compared with those of the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("queue", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.queue.copy_(h.detach().mean(0))
        return h * self.queue.clone()


module("expert_with_a_capacity", Capacity, 4)
module("expert_for_which_observations_compete", Competing, 4)
module("queue_of_features", Queue, 4)


# Mixing that the first observations do not show


def late(name: str, f: Callable[[Tensor], Tensor], *sizes: int) -> None:
    """Register a mixture that happens where there is an outlier, which is not at first."""

    def make() -> Scenario:
        x = torch.randn(MANY, 4).clamp(-2, 2)
        for at, value in OUTLIERS.items():
            x[at, at % 4] = value

        def body(p: Any, x: Tensor) -> Tensor:
            return F.linear(f(x) if far(x).any() else x, p.w)

        return read(stir(Functional(body, w=(4, 4))), x)

    refused(f"{name}_{'and'.join(map(str, sizes)) or 'all'}", MIXES, make, *sizes)


for _sizes in ((), (8,), (12,)):
    late("last_subtracted_if_any_is_far", lambda x: x - x[-1:], *_sizes)
    late("mean_subtracted_if_any_is_far", lambda x: x - x.mean(0), *_sizes)
    late("others_shrunk_if_any_is_far", lambda x: torch.where(far(x), x, x / 2), *_sizes)


# Random numbers in evaluation mode

_DRAWING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda p, x: F.linear(F.dropout(x, 0.5, training=True), p.w),
    "dropout_behind": lambda p, x: F.dropout(F.linear(x, p.w), 0.5, training=True),
    "noise": lambda p, x: F.linear(x + torch.randn_like(x), p.w),
    "one_noise_for_all": lambda p, x: F.linear(x * torch.rand((), dtype=x.dtype), p.w),
    "noisy_weights": lambda p, x: F.linear(x, p.w + torch.randn_like(p.w)),
    "choice_of_channels": lambda p, x: F.linear(x, p.w)[:, torch.randperm(4)],
    "gumbel_softmax": lambda p, x: F.gumbel_softmax(F.linear(x, p.w)),
    "reparametrised_sample": lambda p, x: torch.distributions.Normal(
        F.linear(x, p.w), 1.0, validate_args=False
    ).rsample(),
}
for _name, _draw in _DRAWING.items():
    for _sizes in ((), (1,)):
        refused(
            f"random_{_name}{'_alone' if _sizes else ''}",
            f"{MIXES}|{DRAWS}",
            lambda f=_draw: read(stir(Functional(f, w=(4, 4))), torch.randn(N, 4)),
            *_sizes,
        )
