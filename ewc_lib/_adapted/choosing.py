"""Choosing tensors of the network that adapters make, by the names of one without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from ewc_lib._adapted.network import Unit, units
from ewc_lib._names import plain_name
from ewc_lib._selecting import Selection

Choice: TypeAlias = Callable[[str, Tensor], bool]


def chooser(model: nn.Module, params: Selection) -> Choice:
    """Return what tells of a tensor, by its plain name and itself, whether it is chosen.

    Raises
    ------
    ValueError
        If a part matches nothing, or is none that can be chosen.
    """
    if params is None:
        return lambda name, tensor: True
    if callable(params) and not isinstance(params, nn.Module | type):
        return params
    parts = [params] if isinstance(params, str | nn.Module | Tensor) else params
    if not isinstance(parts, Iterable):
        raise ValueError(
            "params must be names, glob patterns or modules of the model, or a predicate of "
            f"(name, tensor); got {type(params).__name__}"
        )
    found, known = set[str](), units(model)
    for part in parts:
        found |= _matched(part, model, known)
    return lambda name, tensor: name in found


def _matched(part: object, model: nn.Module, known: list[Unit]) -> set[str]:
    if isinstance(part, str):
        names = {name for unit in known for name in unit.names if _fits(name, part)}
    elif isinstance(part, nn.Module):
        paths = [path for path, module in model.named_modules() if module is part]
        names = {
            name
            for unit in known
            for _, _, path in unit.places
            for name in unit.names
            if any(path == p or path.startswith(f"{p}." if p else "") for p in paths)
        }
    else:
        names = {name for unit in known for name in unit.names if unit.tensors().get(name) is part}
    if not names:
        what = repr(part) if isinstance(part, str) else f"a {type(part).__name__}"
        every = ", ".join(name for unit in known if unit.layer for name in unit.names[:1])
        raise ValueError(f"params has {what}, but no such tensor is held; adapters make {every}")
    return names


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern) or name == plain_name(pattern)
