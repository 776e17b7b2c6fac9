"""Models that keep something: attributes, caches, counters, merged weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N, Scenario
from tests.zoo.registry import animal, layer, read, stir


class MergedAdapter(nn.Linear):
    """A low-rank change of a weight, which is merged into it in evaluation mode, as by loralib."""

    def __init__(self, inputs: int, outputs: int, merged: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))
        self.weight.requires_grad_(merged)
        self.merged = False

    def train(self, mode: bool = True) -> MergedAdapter:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if self.merged else h + x @ self.down.T @ self.up.T


class Averaged(nn.Linear):
    """A weight whose running average takes its place in evaluation mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("other", torch.randn(outputs, inputs))

    def train(self, mode: bool = True) -> Averaged:
        if mode != self.training:
            kept = self.weight.data.clone()
            self.weight.data.copy_(self.other)
            self.other.copy_(kept)
        return super().train(mode)


class FrozenNorm(nn.Sequential):
    """A network whose normalisation stays in evaluation mode."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self[1].eval()
        return self


class Rounded(nn.Linear):
    """A weight that is rounded in evaluation mode, and remembered exactly."""

    kept: Tensor | None = None

    def train(self, mode: bool = True) -> Rounded:
        if not mode and self.kept is None:
            self.kept = self.weight.data.clone()
            self.weight.data = self.weight.data.mul(4).round().div(4)
        elif mode and self.kept is not None:
            self.weight.data, self.kept = self.kept, None
        return super().train(mode)


class Switched(nn.Linear):
    """A layer that counts how often its mode is set, and returns nothing when it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.switches: list[bool] = []

    def train(self, mode: bool = True) -> None:
        self.switches.append(mode)
        super().train(mode)


def _two(kind: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(4, 5), nn.Tanh(), nn.Linear(5, 3))


layer("adapter_that_merges", _two(MergedAdapter), 4)
layer("adapter_that_merges_into_a_trained_weight", _two(lambda i, o: MergedAdapter(i, o, True)), 4)
layer("adapter_that_merges_on_sequences", _two(MergedAdapter), 3, 4)
layer("average_in_evaluation_mode", _two(Averaged), 4)
layer("weight_rounded_in_evaluation_mode", _two(Rounded), 4)
layer("modes_are_counted", _two(Switched), 4)
layer(
    "norm_that_stays_in_evaluation_mode",
    lambda: FrozenNorm(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    4,
)


def _merged() -> Scenario:
    case = read(stir(_two(MergedAdapter)()), torch.randn(N, 4))
    case.model.eval()
    return case


animal("adapter_that_is_merged_already", _merged)


# What a forward pass stores


class Storing(nn.Module):
    """A network that stores something whenever it runs, and has a parameter without a rule."""

    def __init__(self, store: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.u, self.v = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 3))
        self.store = store
        self.features: Tensor | None = None
        self.kept: list[Any] = []
        self.last: deque[Any] = deque(maxlen=2)
        self.cache: dict[Any, Any] = {"nested": {}}
        self.calls = 0
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        self.store(self, h)
        return torch.einsum("ni,ij,jk->nk", h, self.u, self.v)


def features(model: Any, h: Tensor) -> None:
    model.features = h


def features_for_later(model: Any, h: Tensor) -> None:
    model.kept.append(h)
    model.last.append(h.detach())


def in_a_dict(model: Any, h: Tensor) -> None:
    model.cache["nested"][len(h)] = h
    model.cache["weight"] = model.u


def a_new_list(model: Any, h: Tensor) -> None:
    model.kept = [*model.kept, h]


def a_new_attribute(model: Any, h: Tensor) -> None:
    model.hidden = h
    model.linear.input_of_the_next = h


def counts(model: Any, h: Tensor) -> None:
    model.calls += 1
    model.seen.add(len(h))


for _store in (features, features_for_later, in_a_dict, a_new_list, a_new_attribute, counts):
    layer(f"stores_{_store.__name__}", lambda s=_store: Storing(s), 4)


class Hooked(nn.Module):
    """A network whose features are stored by a hook, and used for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.features: dict[str, Tensor] = {}
        self.first.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features["first"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.second(torch.tanh(self.features["first"]))


layer("stores_by_a_hook", Hooked, 4)


class Positions(nn.Module):
    """A table of positions that is made when it is needed, and kept."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.as_buffer = as_buffer
        self.table: Tensor | None
        if as_buffer:
            self.register_buffer("table", None, persistent=False)
        else:
            self.table = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            at = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
            self.table = torch.outer(at, x.new_tensor([1.0, 0.5, 0.1, 0.01])).sin()
        return torch.tanh(self.linear(x + self.table))


layer("stores_a_table", lambda: Positions(as_buffer=False), 3, 4)
layer("stores_a_table_as_a_buffer", lambda: Positions(as_buffer=True), 3, 4)


class Buffers(nn.Module):
    """Buffers that change in evaluation mode, on which no output depends."""

    def __init__(self, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.change = change
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("largest", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return self.linear(x)


def counted(model: Any, x: Tensor) -> None:
    model.calls += 1


def replaced(model: Any, x: Tensor) -> None:
    model.calls = model.calls + len(x)


def observed(model: Any, x: Tensor) -> None:
    model.largest.copy_(torch.maximum(model.largest, x.detach().abs().amax(0)))


def observed_unseen(model: Any, x: Tensor) -> None:
    model.largest.data = torch.maximum(model.largest, x.detach().abs().amax(0))


for _change in (counted, replaced, observed, observed_unseen):
    layer(f"buffer_{_change.__name__}", lambda c=_change: Buffers(c), 4)
