"""Choosing parameters of a network: by name, or by the thing itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = str | nn.Module | Tensor
"""One or several parameters: a name or glob pattern, a module with parameters, a parameter."""

Selection: TypeAlias = Part | Iterable[Part] | Callable[[str, Tensor], bool] | None
"""Which parameters: parts of a model, a predicate of (name, tensor), or None for all."""


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``params`` chooses, in the model's order.

    Raises
    ------
    ValueError
        If nothing is trainable or chosen, if a name or pattern matches no trainable parameter, if
        a module or parameter is not of this model, or if a parameter has no shape yet.
    """
    trainable = _trainable(model)
    chosen = fixed(model, params)
    if chosen is None:
        return trainable
    if callable(chosen):
        names = {name for name, p in trainable.items() if chosen(name, p)}
    else:
        names = {name for pattern in chosen for name in _match(pattern, model, trainable)}
    if not names:
        raise ValueError("params chooses no parameter")
    return {name: p for name, p in trainable.items() if name in names}


class Chooser:
    """Choose again and again, and look for names only where the model has changed.

    A model has changed if another module or parameter is in a place, or if a parameter was
    frozen or is no longer. A predicate is asked every time: what it answers may depend on more.
    Tensors that ``torch.func.functional_call`` puts in the places of parameters do not tell
    whether these are trained, so they are chosen by the names of the last choice.
    """

    def __init__(self) -> None:
        self._seen: list[object] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._trainable: list[str] = []
        self._chosen: dict[str, nn.Parameter] = {}

    def __call__(self, model: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
        """Return what :func:`select_parameters` does, the same dict as long as it holds."""
        if not (params is None or isinstance(params, list)):
            return select_parameters(model, params)
        if torch.compiler.is_compiling():  # which does not know how to match patterns
            trainable = _trainable(model)
            if params is not None and list(trainable) == self._trainable:
                return {name: trainable[name] for name in self._chosen}
            return select_parameters(model, params)
        seen = [*(params or ()), params is None, model, *_content(self._modules)]
        seen += [p.requires_grad for p in self._parameters]
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._look(model, params)
        return self._chosen

    def _look(self, model: nn.Module, params: list[str] | None) -> None:
        """Choose, and note on what the choice depends."""
        asked = [*(params or ()), params is None, model]
        again = self._seen[: len(asked)] == asked
        self._chosen = (again and self._stand_ins(model)) or select_parameters(model, params)
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._seen = [*asked, *_content(self._modules)]
        self._seen += [p.requires_grad for p in self._parameters]

    def _stand_ins(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what has the names of the last choice, if some of it is no parameter."""
        own = dict(model.named_parameters())
        if all(isinstance(p, nn.Parameter) for p in own.values()):
            return {}
        return {name: own[name] for name in self._chosen if name in own}


def _content(modules: list[nn.Module]) -> list[object]:
    """Return all on which the names of parameters depend: what modules hold, and where."""
    found: list[object] = []
    for module in modules:
        for holder in (module._parameters, module._modules):
            found += holder.keys()
            found += holder.values()
    return found


def fixed(model: nn.Module, params: Selection) -> list[str] | Callable[[str, Tensor], bool] | None:
    """Return a choice that can be made again and again: names instead of modules and parameters.

    A generator is read once, and a parameter may be replaced by another one of its name.
    """
    if isinstance(params, str | nn.Module | Tensor):  # a module can be called too
        params = [params]
    if params is None:
        return None
    if isinstance(params, type) or not (callable(params) or isinstance(params, Iterable)):
        raise _no_part(params)
    if callable(params):
        return params
    return [name for part in params for name in _names(part, model)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {_kind_of(model)}")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of a lazy module has no shape yet: run the model once, "
                "model(inputs), before"
            )
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return trainable


def _names(part: Part, model: nn.Module) -> list[str]:
    """Return the names of a module's trainable parameters, of one parameter, or the name itself."""
    if isinstance(part, str):
        return [part]
    names = {id(p): name for name, p in model.named_parameters()}
    if isinstance(part, nn.Module):
        return _names_within(part, model, names)
    if not isinstance(part, Tensor):
        raise _no_part(part)
    if id(part) not in names:
        raise ValueError(_stranger(part, model))
    return [names[id(part)]]


def _names_within(module: nn.Module, model: nn.Module, names: dict[int, str]) -> list[str]:
    for name, parameter in module.named_parameters():
        if id(parameter) not in names:
            own = type(model).__name__
            raise ValueError(
                f"params holds a {_kind_of(module)} that is no part of this {own}: its parameter "
                f"{name!r} of shape {tuple(parameter.shape)} is not one of the model's"
            )
    found = [names[id(p)] for p in module.parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"{_kind_of(module)} in params has no trainable parameter")
    return found


def _stranger(tensor: Tensor, model: nn.Module) -> str:
    """Say what a tensor is that is no parameter of the model."""
    for name, buffer in model.named_buffers():
        if buffer is tensor:
            return f"params holds the buffer {name!r}, which is not trained and has no information"
    for name, parameter in model.named_parameters():
        if parameter.is_set_to(tensor):
            return f"params holds the values of {name!r}, not the parameter itself; give its name"
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    return (
        f"params holds a {kind} of shape {tuple(tensor.shape)} that is not one of this "
        f"{type(model).__name__}"
    )


def _no_part(value: object) -> ValueError:
    return ValueError(
        "params must be names, glob patterns, modules or parameters of the model, or a predicate "
        f"of (name, parameter); got {_kind_of(value)}"
    )


def _kind_of(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _match(pattern: str, model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
    if pattern in trainable:  # also if it would be a pattern
        return [pattern]
    # a tied parameter has several names, of which the first is its own
    own = {id(p): name for name, p in trainable.items()}
    every = list(model.named_parameters(remove_duplicate=False))
    found = [own[id(p)] for name, p in every if id(p) in own and fnmatchcase(name, pattern)]
    if found:
        return found
    if any(name == pattern for name, _ in every):
        raise ValueError(f"parameter {pattern!r} does not require grad")
    if any(name == pattern for name, _ in model.named_modules()):
        raise ValueError(f"{pattern!r} is a module; its parameters are '{pattern}.*'")
    near = difflib.get_close_matches(pattern, trainable, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the model has {', '.join(trainable)}"
    raise ValueError(f"no trainable parameter is named {pattern!r}{hint}")
