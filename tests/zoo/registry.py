"""The list of entries, and models around one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.scenarios import CLASSES, N, Scenario
from tests.zoo.truth import call

WORDS = 5
"""Size of the vocabulary of models that read tokens."""

ZOO: dict[str, Callable[[], Scenario]] = {}


class Refusal(NamedTuple):
    """A model without scores, what the error says, and batches that show it."""

    make: Callable[[], Scenario]
    message: str
    sizes: tuple[int, ...]


REFUSED: dict[str, Refusal] = {}


def animal(name: str, make: Callable[[], Scenario]) -> None:
    """Register an entry; it is the same every time, and the global random state is kept."""
    assert name not in ZOO, f"two entries are called {name}"
    ZOO[name] = partial(_seeded, make)


def refused(name: str, message: str, make: Callable[[], Scenario], *sizes: int) -> None:
    """Register a model that has to be refused, by default in one batch of all observations."""
    assert name not in REFUSED, f"two entries are called {name}"
    REFUSED[name] = Refusal(partial(_seeded, make), message, sizes)


def _seeded(make: Callable[[], Scenario]) -> Scenario:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, likelihood, y = make()
        return Scenario(model.double(), tree_map(_double, x), likelihood, _double(y))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


# Models around one layer


class Reader(nn.Module):
    """A body that holds all parameters, and a fixed map from what it returns to three classes."""

    def __init__(self, body: nn.Module, x: Any) -> None:
        super().__init__()
        self.body = body
        self.eval()
        width = call(body, tree_map(torch.clone, x)).flatten(1).shape[1]
        self.train()
        self.register_buffer("head", 2 * torch.randn(width, CLASSES) / math.sqrt(width))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tanh(self.body(*args, **kwargs)).flatten(1) @ self.head


def read(body: nn.Module, x: Any) -> Scenario:
    """Classify by what a body returns."""
    n = len(tree_leaves(x)[0])
    return Scenario(Reader(body, x), x, "categorical", torch.randint(0, CLASSES, (n,)))


def stir(model: nn.Module) -> nn.Module:
    """Move every parameter and running statistic away from its special starting value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.5 * torch.rand_like(buffer))
    return model


def layer(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register one layer on random inputs of a shape."""
    animal(name, lambda: read(stir(make()), torch.randn(N, *shape)))


def on_words(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register one layer on random tokens."""
    animal(name, lambda: read(make(), torch.randint(0, WORDS, (N, *shape))))


class Functional(nn.Module):
    """A function of the inputs and of raw parameters, called ``p.<name>`` in it."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def function(name: str, shape: tuple[int, ...], f: Callable[..., Tensor], **shapes: Any) -> None:
    """Register a function of raw parameters on random inputs of a shape."""
    layer(name, lambda: Functional(f, **shapes), *shape)


class PositionsFirst(nn.Module):
    """A layer that wants positions before observations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.inner(*(x.transpose(0, 1) for x in inputs))
        output = output[0] if isinstance(output, tuple) else output
        return output.transpose(0, 1)


class First(nn.Module):
    """The first of several outputs of a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)[0]
