"""Whether a model is the one of a file: names, shapes and values of its parameters."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib._names import plain_names
from ewc_lib._sharded import whole

COMPARED = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions in which people load one checkpoint."""


def described(values: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and hashes of the values of each parameter.

    There is a hash in the parameter's own precision, and one in each of those in which the same
    checkpoint is loaded, so that a copy in another precision can be told from another checkpoint.
    """
    return {
        name: {
            "shape": list(value.shape),
            "dtype": _name(value.dtype),
            "values": {_name(dtype): _hash(value, dtype) for dtype in _precisions(value)},
        }
        for name, value in ((name, whole(value.detach())) for name, value in values.items())
    }


def of_all(parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one hash of all names, shapes and values, in any order of the names."""
    parts = sorted((n, p["shape"], p["values"][p["dtype"]]) for n, p in parameters.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def names_in(
    model: nn.Module, card: dict[str, Any], path: object, check_values: bool = True
) -> dict[str, str]:
    """Return the model's own name of each parameter on a card.

    Raise a ValueError if the model has no such names, other shapes, or other values.
    """
    try:
        own = values_in(model, card["parameters"])
    except ValueError as error:
        raise ValueError(f"{path} is of another model: {error}") from None
    if check_values:
        _check_values(own, card["parameters"], path)
    names = {plain: name for name, plain in plain_names(dict(model.named_parameters())).items()}
    return {name: names[name] for name in own}


def values_in(model: nn.Module, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the parameters of a model by their plain names, or raise a ValueError."""
    given = dict(model.named_parameters())
    own = {plain: given[name] for name, plain in plain_names(given).items()}
    problems = [f"the model has no {name!r}" for name in wanted if name not in own]
    problems += [
        f"{name!r} has shape {tuple(own[name].shape)} instead of {tuple(of['shape'])}"
        for name, of in wanted.items()
        if name in own and list(own[name].shape) != of["shape"]
    ]
    if problems:
        raise ValueError(_few(problems, "; "))
    return {name: own[name] for name in wanted}


def _check_values(own: Mapping[str, Tensor], said: Mapping[str, Any], path: object) -> None:
    if not all("values" in of for of in said.values()):
        warnings.warn(
            f"{path} was saved without a model: names and shapes fit, but whether it was computed "
            "at the values that the model has now is not known",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    if other := [repr(name) for name, of in said.items() if not _same(own[name], of)]:
        raise ValueError(
            f"{path} was computed at other values of {len(other)} of {len(said)} parameters: "
            f"{_few(other)}. Give the model as it was loaded from the checkpoint, before it is "
            "trained on; check_values=False takes the file nevertheless"
        )


def _same(parameter: Tensor, said: Mapping[str, Any]) -> bool:
    """Tell whether values are the same in the coarser precision of the two."""
    if parameter.is_meta:
        raise ValueError("a parameter on the meta device has no values to compare")
    value, kept = whole(parameter.detach()), said["values"]
    if kept.get(_name(value.dtype)) == _hash(value, value.dtype):
        return True
    same: bool = kept[said["dtype"]] == _hash(value, getattr(torch, said["dtype"]))
    return same


def _precisions(value: Tensor) -> list[torch.dtype]:
    """Return the precision of a tensor, and those in which a copy of it may be."""
    others = [d for d in COMPARED if d != value.dtype and value.is_floating_point()]
    return [value.dtype, *others]


def _hash(value: Tensor, dtype: torch.dtype) -> str:
    """Hash the bytes of values in a precision."""
    if value.is_complex() and not dtype.is_complex:
        return ""
    entries = value.cpu().to(dtype).resolve_conj().reshape(-1).contiguous()
    return hashlib.sha256(entries.view(torch.uint8).numpy().data).hexdigest()


def _few(parts: list[str], comma: str = ", ") -> str:
    more = f"{comma}and {len(parts) - 5} more" if len(parts) > 5 else ""
    return comma.join(parts[:5]) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
