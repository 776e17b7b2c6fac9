"""The network of plain layers that one with adapters amounts to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ewc_lib._adapted.low_rank import UpdatedLayer
from ewc_lib._adapted.peft_layer import PeftLayer
from ewc_lib._names import plain_name
from ewc_lib._parameters import Vector

Layer: TypeAlias = UpdatedLayer | PeftLayer


@dataclass
class Unit:
    """A parameter, or a layer with adapters.

    Attributes
    ----------
    names
        What its tensors are called in a network without adapters and wrappers. A parameter that
        is in several places has several names.
    tensors
        Computes its tensors, differentiable.
    layer
        The layer with adapters, if it is one.
    places
        Where modules hold it, and under which path.
    """

    names: list[str]
    tensors: Callable[[], Vector]
    layer: Layer | None = None
    places: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that its tensors may depend on and that require grad."""
        if self.layer is None:
            own: Any = self.tensors()
            return [own[self.names[0]]]
        return [p for p in self.layer.module.parameters() if p.requires_grad]

    def trained(self) -> list[str]:
        """Return the names of what training changes: the weight of adapters, what has a graph."""
        first, *others = self.names
        found = self.tensors()
        if self.layer is None:
            return [first] if found[first].requires_grad else []
        return [first, *(name for name in others if name in found and found[name].requires_grad)]


def units(model: nn.Module) -> list[Unit]:
    """Return all that a network without adapters would have for parameters, once each."""
    found: dict[int, Unit] = {}
    for place, key, path, owner in _walk(model, {"": model}, "", "", set()):
        if id(owner) not in found:
            make = _unit_of_parameter if isinstance(owner, Tensor) else _unit_of_layer
            found[id(owner)] = make(path, owner)
        elif isinstance(owner, Tensor):
            found[id(owner)].names.append(plain_name(path))
        found[id(owner)].places.append((place, key, path))
    return list(found.values())


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has a layer with adapters."""
    return any(map(_is_adapted, model.modules()))


def factors(model: nn.Module) -> set[str]:
    """Return the plain names of the parameters that adapters train."""
    return {
        plain_name(f"{path}.{name}" if path else name)
        for path, module in model.named_modules()
        if _is_adapted(module)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter is not getattr(module, "bias", None)
    }


def below_adapters(model: nn.Module, held: Set[str]) -> list[str]:
    """Return the held weights that adapters of peft change, by what they train and is not held."""
    found: list[str] = []
    for path, module in model.named_modules():
        layer: Any = module
        if not PeftLayer.is_one(module) or layer.disable_adapters or layer.merged:
            continue
        plain = {n: plain_name(f"{path}.{n}" if path else n) for n, _ in module.named_parameters()}
        below = [n for n in plain if n.startswith("base_layer.")]
        trained = [n for n, p in module.named_parameters() if p.requires_grad and n not in below]
        if trained and held.isdisjoint(plain[n] for n in trained):
            found += [plain[n] for n in below if plain[n] in held and not n.endswith("bias")]
    return found


@dataclass
class PlainNetwork:
    """A network in which layers with adapters have one weight each.

    Attributes
    ----------
    model
        The network.
    parameters
        Its parameters, by plain name.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]


@contextmanager
def without_adapters(model: nn.Module, in_own_dtype: bool = False) -> Iterator[PlainNetwork]:
    """Put plain layers into the places of those with adapters, for as long as it lasts.

    No weight is changed: the layers with adapters come back as they were.

    Parameters
    ----------
    model
        The network with adapters.
    in_own_dtype
        Whether weights are rounded to the dtype of the layer below.
    """
    parameters: dict[str, nn.Parameter] = {}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    whole = model
    try:
        for unit in units(model):
            if unit.layer is None:
                own = unit.tensors()
                parameters.update(own)  # type: ignore[arg-type]
                continue
            unit.layer.check()
            dtype = unit.layer.dtype if in_own_dtype else None
            with torch.no_grad():
                values = {
                    name: nn.Parameter(t.to(dtype or t.dtype, copy=True), requires_grad=False)
                    for name, t in unit.tensors().items()
                }
            parameters |= values
            keys = {name.rpartition(".")[2]: p for name, p in values.items()}
            plain = unit.layer.plain(keys)  # type: ignore[arg-type]
            for place, key, _ in unit.places:
                changed.append((place, key, place[key]))
                place[key] = plain
            if model is unit.layer.module:
                whole = plain
        yield PlainNetwork(whole, parameters)
    finally:
        for place, key, module in changed:
            place[key] = module


def _walk(
    module: nn.Module, place: dict[str, Any], key: str, path: str, seen: set[nn.Module]
) -> Iterator[tuple[dict[str, Any], str, str, Any]]:
    """Yield layers with adapters, and the parameters of all other modules, with their places."""
    if _is_adapted(module):
        yield place, key, path, module
        return
    if module in seen:
        return
    seen.add(module)
    chosen = _saved(module)
    if chosen is not None:
        yield from _walk(chosen, place, key, path, seen)
        return
    prefix = f"{path}." if path else ""
    parameters: dict[str, Any] = module._parameters
    children: dict[str, Any] = module._modules
    for own, parameter in list(parameters.items()):
        if parameter is not None:
            yield parameters, own, f"{prefix}{own}", parameter
    for own, child in list(children.items()):
        if child is not None:
            yield from _walk(child, children, own, f"{prefix}{own}", seen)


def _saved(module: nn.Module) -> nn.Module | None:
    """Return the module that peft trains and runs in the place of this one."""
    copies = module._modules.get("modules_to_save")
    original = module._modules.get("original_module")
    if {"original_module", "token_adapter"} <= module._modules.keys():
        return module._modules["token_adapter"]
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return None
    off = getattr(module, "disable_adapters", False)
    active = [name for name in getattr(module, "active_adapters", []) if name in copies]
    return original if off or not active else copies[active[0]]


def _is_adapted(module: nn.Module) -> bool:
    return PeftLayer.is_one(module) or UpdatedLayer.is_one(module)


def _unit_of_parameter(path: str, parameter: nn.Parameter) -> Unit:
    names = [plain_name(path)]
    return Unit(names, lambda: dict.fromkeys(names, parameter))


def _unit_of_layer(path: str, module: nn.Module) -> Unit:
    layer = (PeftLayer if PeftLayer.is_one(module) else UpdatedLayer)(path, module)
    prefix = plain_name(f"{path}.weight" if path else "weight").removesuffix("weight")

    def tensors() -> Vector:
        return {prefix + key: tensor for key, tensor in layer.tensors().items()}

    return Unit([f"{prefix}weight", f"{prefix}bias"], tensors, layer)
