"""What is kept of a stream after each task, so that another process can go on."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ewc_lib.regularizers.protocol import Regularizer


def plain(value: Any) -> Any:
    """Turn settings into values that a checkpoint keeps as they are."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def described(**functions: Any) -> dict[str, str]:
    """Return what tells functions apart in another process, of those that there are."""
    return {name: _told(value) for name, value in functions.items() if value is not None}


def _told(value: Any) -> str:
    if isinstance(value, partial):
        return f"{_told(value.func)} {plain(value.args)} {plain(value.keywords)}"
    if isinstance(value, nn.Module):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def description(
    model: nn.Module, regularizer: Regularizer | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return what a checkpoint has to agree on about those who learn."""
    return {
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "regularizer": _settings(regularizer),
        "optimizer": {"type": type(optimizer).__name__, **plain(optimizer.defaults)},
    }


def _settings(regularizer: Regularizer | None) -> dict[str, Any]:
    """Return the public arguments of a regularizer that are plain values."""
    if regularizer is None:
        return {"type": None}
    public = {k: v for k, v in vars(regularizer).items() if not k.startswith("_")}
    simple = {k: v for k, v in public.items() if isinstance(v, bool | int | float | str | None)}
    strength = getattr(regularizer, "strength", None)  # a property of most
    return {"type": type(regularizer).__name__, **simple, "strength": strength}


def save(
    path: Path,
    configuration: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    found: dict[str, Any],
) -> None:
    """Write all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    state = {
        "configuration": configuration,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "regularizer": None if regularizer is None else regularizer.state_dict(),
        "found": found,
    }
    try:
        torch.save(state, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def restore(
    path: Path,
    configuration: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
) -> dict[str, Any]:
    """Read what :func:`save` wrote, if it is whole and of this configuration."""
    state = _read(path)
    if differing := _differences(state["configuration"], configuration):
        few = "; ".join(differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{path} is a checkpoint of another configuration: {few}{more}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if regularizer is not None:
        regularizer.load_state_dict(state["regularizer"])
    found: dict[str, Any] = state["found"]
    return found


KEYS = {"configuration", "model", "optimizer", "regularizer", "found"}


def _read(path: Path) -> dict[str, Any]:
    """Read a file whose every part has the checksum that was written with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = torch.load(path, weights_only=True, map_location="cpu") if broken is None else None
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
        raise ValueError(f"{path} is damaged, or no checkpoint of a stream: {problem}") from problem
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise ValueError(f"{path} is damaged, or no checkpoint of a stream")
    return state


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say which settings differ, by their names."""
    one, other = _flat(before), _flat(now)
    return [
        f"{name} was {_shown(one, name)} and is {_shown(other, name)}"
        for name in {**one, **other}
        if _shown(one, name) != _shown(other, name)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _shown(settings: dict[str, Any], name: str) -> str:
    """Return a value as it is compared: NaN is NaN, and None is not the same as absent."""
    return repr(settings[name]) if name in settings else "absent"
