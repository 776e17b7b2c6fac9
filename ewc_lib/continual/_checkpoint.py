"""What is kept of a stream after each task, so that another process can go on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ewc_lib._heads import MultiHead
from ewc_lib.regularizers.protocol import Regularizer


def plain(value: Any) -> Any:
    """Turn settings into values that a checkpoint keeps as they are."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def save(
    path: Path,
    configuration: dict[str, Any],
    model: MultiHead,
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
    model: MultiHead,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer | None,
    found: dict[str, Any],
) -> None:
    """Read what :func:`save` wrote, if it is whole and of this configuration."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        before = state["configuration"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as problem:
        raise ValueError(f"{path} is damaged, or no checkpoint of a stream: {problem}") from problem
    for key, value in configuration.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} is a checkpoint of another configuration: {key} was {before.get(key)!r} "
                f"and is {value!r}"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if regularizer is not None:
        regularizer.load_state_dict(state["regularizer"])
    found.update(state["found"])
