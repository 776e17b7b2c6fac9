"""Choosing parameters of a network: by name, or by the thing itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from glob import escape
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ewc_lib._names import plain_name, plain_names

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
        found = {pattern: _matches(pattern, model, trainable) for pattern in chosen}
        for pattern, names_of_it in found.items():
            if not names_of_it:
                raise _no_match(pattern, model, trainable)
        names = {name for names_of_it in found.values() for name in names_of_it}
    if not names:
        raise ValueError("params chooses no parameter")
    return {name: p for name, p in trainable.items() if name in names}


class Chooser:
    """Know the parameters of a model by their plain names, as long as it does not change.

    A model has changed if another module or parameter is in a place, or if a parameter was
    frozen or is no longer. Tensors that ``torch.func.functional_call`` puts in the places of
    parameters do not tell whether these are trained, so they are chosen by the names of the last
    choice; and so are those of names and patterns in a compiled step, which cannot match them.
    """

    def __init__(self) -> None:
        self._seen: list[object] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._plain: dict[str, str] = {}
        self._every: dict[str, nn.Parameter] = {}
        self._asked: list[object] = []
        self._chosen: dict[str, nn.Parameter] = {}

    def every(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return all parameters, the same dict as long as the model has not changed.

        A tied parameter is there by each of its names.
        """
        if torch.compiler.is_compiling():
            return self._named(model)
        seen = [model, *_content(self._modules), *(p.requires_grad for p in self._parameters)]
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._modules, self._parameters = list(model.modules()), list(model.parameters())
            self._seen = [model, *_content(self._modules)]
            self._seen += [p.requires_grad for p in self._parameters]
            self._every, self._asked = self._named(model), []
        return self._every

    def __call__(self, model: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
        """Return the trainable ones that ``params`` chooses, without those that have gone.

        The same dict as long as it holds. A predicate is asked every time: what it answers may
        depend on more than the model.
        """
        every = self.every(model)
        by_names = torch.compiler.is_compiling() and isinstance(params, list) and self._chosen
        if by_names or not all(isinstance(p, nn.Parameter) for p in every.values()):
            return {name: every[name] for name in self._chosen if name in every}
        asked = [*params] if isinstance(params, list) else [params]
        if not self._asked or callable(params) or asked != self._asked:
            self._asked, names = asked, _chosen(model, params)
            self._chosen = {self._plain[name]: p for name, p in names.items()}
        return self._chosen

    def plain(self, model: nn.Module) -> dict[str, str]:
        """Return the plain name for each name that a parameter has in the model."""
        self.every(model)
        return self._plain

    def _named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = {
            f"{place}.{name}" if place else name: p
            for place, module in model.named_modules()
            for name, p in module._parameters.items()
            if p is not None
        }
        if list(own) != list(self._plain):
            self._plain = plain_names(own)
        return {self._plain[name]: p for name, p in own.items()}


def _chosen(model: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
    """Choose as :func:`select_parameters` does, without names that have gone or are frozen."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = fixed(model, params)
    if chosen is None:
        return trainable
    if callable(chosen):
        return {name: p for name, p in trainable.items() if chosen(name, p)}
    names = {name for pattern in chosen for name in _matches(pattern, model, trainable)}
    return {name: p for name, p in trainable.items() if name in names}


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

    A generator is read once, and a parameter may be replaced by another one of its name. A
    module stands for all that it holds, also later.
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
    """Return the pattern of a module's parameters, the name of one, or the name itself."""
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
    for name, part in model.named_modules():
        if part is module:  # so that what it gets later is chosen too
            return [f"{escape(name)}.*" if name else "*"]
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


def _matches(pattern: str, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the trainable parameters of a name or pattern, with or without those of wrappers."""
    if pattern in trainable:  # also if it would be a pattern
        return [pattern]
    # a tied parameter has several names, of which the first is its own
    own = {id(p): name for name, p in trainable.items()}
    every = list(model.named_parameters(remove_duplicate=False))
    plain = plain_names(name for name, _ in every)
    named = [(name, own[id(p)]) for name, p in every if id(p) in own]
    short = plain_name(pattern)
    return (
        [first for name, first in named if fnmatchcase(name, pattern)]
        or [first for name, first in named if plain[name] in (pattern, short)]
        or [first for name, first in named if fnmatchcase(plain[name], pattern)]
        or [first for name, first in named if fnmatchcase(plain[name], short)]
    )


def _no_match(pattern: str, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> ValueError:
    """Say why there is no trainable parameter of a name or pattern."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if pattern in every or pattern in plain_names(every).values():
        return ValueError(f"parameter {pattern!r} does not require grad")
    if any(name == pattern for name, _ in model.named_modules()):
        return ValueError(f"{pattern!r} is a module; its parameters are '{pattern}.*'")
    near = difflib.get_close_matches(pattern, trainable, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the model has {', '.join(trainable)}"
    return ValueError(f"no trainable parameter is named {pattern!r}{hint}")
