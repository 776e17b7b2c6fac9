"""Models that were exported, traced or scripted, and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.scenarios import N, Scenario
from tests.zoo.names import Low
from tests.zoo.registry import WORDS, Functional, animal, layer, read, refused, stir


def exported(make: Callable[[], nn.Module], *shape: int) -> Scenario:
    """Return a model that was exported for batches of any size; its mode cannot be set."""
    x = torch.randn(N, *shape, dtype=torch.float64)
    body = make().double().eval()
    body(x)
    stir(body)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(body, (x,), dynamic_shapes=({0: batch},))
    return Scenario(program.module(), x, "categorical", torch.randint(0, 3, (N, *shape[:-1])))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


animal("exported", lambda: exported(_mlp, 4))
animal("exported_on_sequences", lambda: exported(_mlp, 3, 4))
animal("exported_normalisation", lambda: exported(lambda: _between(nn.BatchNorm1d(5)), 4))
animal("exported_without_a_rule", lambda: exported(lambda: _between(Low()), 4))


def _between(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), inner, nn.LazyLinear(3))


class Inside(nn.Module):
    """A program between two layers."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.first, self.program, self.last = nn.Linear(4, 4), program, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.program(torch.tanh(self.first(x))))


layer("traced_between_layers", lambda: Inside(torch.jit.trace(_mlp(), torch.randn(2, 4))), 4)
layer("scripted_between_layers", lambda: Inside(torch.jit.script(_mlp())), 4)
layer("traced_convolution", lambda: torch.jit.trace(nn.Conv1d(2, 3, 2), torch.randn(2, 2, 5)), 2, 5)
layer("symbolically_traced", lambda: torch.fx.symbolic_trace(_mlp()), 3, 4)


@torch.jit.script
def _gate(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(x @ w) * x


layer(
    "scripted_function",
    lambda: Functional(lambda p, x: _gate(x, p.w) @ p.v, w=(4, 4), v=(4, 3)),
    4,
)


class Again(nn.Module):
    """Parts of a network that are computed again in the backward pass, in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.how = how

    def low(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("...i,ij,jk->...k", x, self.a, self.b))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in_segments":
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False) @ self.a
        if self.how == "twice":
            x = checkpoint(self.layers, x, use_reentrant=False)
            return checkpoint(self.layers, x, use_reentrant=False) @ self.a
        return checkpoint(self.low, self.layers(x), use_reentrant=False)


for _how in ("in_segments", "twice", "without_a_rule"):
    layer(f"checkpoint_{_how}", lambda how=_how: Again(how), 4)


# Hooks


def hooked(change: Callable[[nn.Module, list[Any]], Any], depth: int) -> Scenario:
    """Return a network with a hook, which may note something in a list."""
    body = stir(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    change(body[depth], [])
    return read(body, torch.randn(N, 4, dtype=torch.float64))


_HARMLESS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "of_a_parameter_that_notes": lambda m, notes: m.weight.register_hook(
        lambda g: notes.append(float(g.norm()))
    ),
    "of_a_module_that_notes": lambda m, notes: m.register_full_backward_hook(
        lambda module, g_in, g_out: notes.append(g_out[0].shape)
    ),
    "before_the_forward_pass": lambda m, notes: m.register_forward_pre_hook(
        lambda module, args: notes.append(args[0].shape)
    ),
    "that_changes_the_output": lambda m, notes: m.register_forward_hook(
        lambda module, args, output: 2 * output
    ),
    "that_changes_the_input": lambda m, notes: m.register_forward_pre_hook(
        lambda module, args: (args[0].square(),)
    ),
    "after_gradients_are_added": lambda m, notes: m.weight.register_post_accumulate_grad_hook(
        lambda p: notes.append(p.shape)
    ),
}
for _name, _change in _HARMLESS.items():
    animal(f"hook_{_name}", lambda change=_change: hooked(change, depth=2))

_CHANGING: dict[str, Callable[[Any, list[Any]], Any]] = {
    "clips": lambda m, notes: m.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3)),
    "clips_a_bias": lambda m, notes: m.bias.register_hook(lambda g: g.clamp(-1e-3, 1e-3)),
    "normalises": lambda m, notes: m.weight.register_hook(lambda g: g / g.norm()),
    "takes_the_sign": lambda m, notes: m.weight.register_hook(torch.sign),
}
for _name, _change in _CHANGING.items():
    for _depth in (0, 2):
        refused(
            f"hook_that_{_name}_of_layer_{_depth}",
            r"[Hh]ook",
            lambda change=_change, depth=_depth: hooked(change, depth),
        )


class Tied(nn.Module):
    """A table that is looked up in a program, and used outside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.jit.script(nn.Embedding(WORDS, 4))

    def forward(self, words: Tensor) -> Tensor:
        return torch.tanh(self.table(words)) @ self.table.weight.T


animal("scripted_table", lambda: read(stir(Tied()), torch.randint(0, WORDS, (N, 3))))
