"""States of penalties: what they say of themselves, and their tensors for the model of now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ewc_lib._names import listed, plain_names
from ewc_lib._parameters import Vector
from ewc_lib._sharded import whole
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.fisher.structures.states import decode, encode


def check_settings(state: dict[str, Tensor], settings: Mapping[str, str], name: str) -> None:
    """Raise a ValueError if a state says that it was made with other settings."""
    told = {key: decode(state[key]) for key in settings if key in state}
    if others := [key for key in told if told[key] != settings[key]]:
        pairs = (f"{told[key]}, but this {name} is {settings[key]} ({key})" for key in others)
        raise ValueError("; ".join(f"the state is {pair}" for pair in pairs))


def check_chosen(held: Iterable[str], trained: Collection[str], chosen: Collection[str]) -> None:
    """Raise a ValueError if a state holds what is trained and is not chosen."""
    if others := [name for name in held if name in trained and name not in chosen]:
        raise ValueError(
            f"the state holds {listed(others)}, which params does not choose here: give the params "
            "of the penalty that it is of"
        )


def settings_of(settings: Mapping[str, str], precision: Fisher | None) -> dict[str, Tensor]:
    """Return what a state says of itself: what was found, or else what is set."""
    said = dict(settings)
    if precision is not None and precision.likelihood is not None:
        said["likelihood"] = precision.likelihood
    if precision is not None and "kind" in said:
        said["kind"] = precision.kind
    return {key: encode(text) for key, text in said.items()}


def check_likelihood(given: Any, before: Fisher | None, new: Fisher) -> None:
    """Raise a ValueError if a likelihood that was not given is not that of the tasks so far."""
    old = None if before is None else before.likelihood
    if given is None and None not in (old, new.likelihood) and old != new.likelihood:
        raise ValueError(
            f"the tasks so far are of the likelihood {old}, and this one was read as "
            f"{new.likelihood}, because no likelihood was given: give the one that is meant to "
            "the constructor, or set it as the attribute likelihood for a task of another kind"
        )


def by_plain_names(values: Mapping[str, Tensor]) -> Vector:
    """Copy tensors, under the names that the parameters have without wrappers."""
    return {plain: values[n].clone().contiguous() for n, plain in plain_names(values).items()}


def precision_state(precision: Fisher | None) -> dict[str, Tensor]:
    """Return the state of a Fisher information, with the plain names of its parameters."""
    if precision is None:
        return {}
    return precision._renamed(plain_names(precision.shapes)).state_dict()


class Loader:
    """Puts what a state holds where a model is, under its names, and sharded as it is."""

    def __init__(self, parameters: Mapping[str, Tensor], device: torch.device) -> None:
        self.device = device
        self._parameters = parameters
        self._own = {plain: name for name, plain in plain_names(parameters).items()}

    def vector(self, values: Mapping[str, Tensor]) -> Vector:
        names = self._names(values)
        return {names[n]: self._placed(value, names[n]) for n, value in values.items()}

    def precision(self, state: dict[str, Tensor]) -> Fisher:
        found = Fisher.from_state_dict(state)
        found = found._renamed(self._names(found.shapes))
        if isinstance(found, Diagonal):
            return replace(found, values=self.vector(found.values))
        return found._map(lambda tensor: whole(tensor).to(self.device))

    def _names(self, names: Any) -> dict[str, str]:
        """Return the model's name of each parameter, or its own where the model has none."""
        return {name: self._own.get(plain, name) for name, plain in plain_names(names).items()}

    def _placed(self, value: Tensor, name: str) -> Tensor:
        """Copy a tensor; keep of it on this process what is kept of the parameter."""
        like: Any = self._parameters.get(name)
        if not hasattr(like, "full_tensor") or like.shape != value.shape:
            return whole(value).to(self.device, copy=True)
        from torch.distributed.tensor import distribute_tensor

        value = whole(value).to(self.device)
        return distribute_tensor(value, like.device_mesh, like.placements)
