"""Choosing parameters of a network by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

Selection: TypeAlias = Sequence[str] | str | Callable[[str, Tensor], bool] | None
"""Which parameters: names, glob patterns, a predicate of (name, tensor), or None for all."""


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``params`` chooses, in the model's order.

    Raises
    ------
    ValueError
        If nothing is trainable or chosen, or if a name or pattern matches no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    if params is None:
        return trainable
    if callable(params):
        chosen = {name for name, p in trainable.items() if params(name, p)}
    else:
        patterns = [params] if isinstance(params, str) else list(params)
        chosen = {name for pattern in patterns for name in _match(pattern, model, trainable)}
    if not chosen:
        raise ValueError("params chooses no parameter")
    return {name: p for name, p in trainable.items() if name in chosen}


def _match(pattern: str, model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
    found = [name for name in trainable if name == pattern or fnmatchcase(name, pattern)]
    if found:
        return found
    if any(name == pattern for name, _ in model.named_parameters()):
        raise ValueError(f"parameter {pattern!r} does not require grad")
    near = difflib.get_close_matches(pattern, trainable, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the model has {', '.join(trainable)}"
    raise ValueError(f"no trainable parameter is named {pattern!r}{hint}")
