"""Calling a network without leaving a trace in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map


def forward(model: nn.Module, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Call a model, optionally with other parameters, and return its output tensor.

    A dict of inputs is passed by keyword, a tuple or list by position. The output is a tensor,
    the first entry of a tuple, or what an object or dict calls ``logits``.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    else:
        args = (inputs,)
    with nullcontext() if parameters is None else _exchanged(model, parameters):
        return output_tensor(model(*args, **kwargs))


def output_tensor(output: Any) -> Tensor:
    """Return what a model says about the targets.

    Raises
    ------
    TypeError
        If its output has another form.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    elif isinstance(found, tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "the model must return a tensor or have .logits, got "
            f"{type(output)}; a tuple whose first entry is a tensor and a dict with 'logits' will "
            "do, and a module of your own can pick from anything else"
        )
    return found


class Caller:
    """Prepares the calls of one model, which may edit its inputs, buffers and attributes.

    The first call with inputs of some form gets copies, and attributes are put back. Later ones
    do where that has shown an edit, so that nothing of the user's changes and no batch depends
    on those before it.

    Parameters
    ----------
    model
        The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held = held_tensors(model)
        self._harmless: set[Any] = set()

    @contextmanager
    def prepared(self, inputs: Any) -> Iterator[Any]:
        """Give inputs for one call."""
        if _form(inputs) in self._harmless:
            yield inputs
            return
        with _own_buffers(self.model), _same_attributes(self.model):
            yield tree_map(torch.clone, inputs)

    def learn(self, inputs: Any, harmless: bool) -> None:
        """Take note whether a call with inputs of this form has left everything as it was."""
        (self._harmless.add if harmless else self._harmless.discard)(_form(inputs))

    def constants(self) -> list[Tensor]:
        """Return all tensors of the model, which do not depend on the data."""
        return [*self.model.parameters(), *self.model.buffers(), *self._held]

    def state(self, inputs: Any) -> list[Any]:
        """Return what differs before and after a call that edits something."""
        tensors = [*tree_leaves(inputs), *self.model.buffers()]
        attributes = [
            (id(value), len(value) if isinstance(value, _CONTAINERS) else 0)
            for module in self.model.modules()
            for value in vars(module).values()
        ]
        return [*attributes, *((id(t), t._version, t.data_ptr()) for t in tensors)]


_CONTAINERS = (dict, list, set, deque)


def _form(inputs: Any) -> Any:
    """Everything about inputs but the number of observations and their values."""
    leaves, structure = tree_flatten(inputs)
    return structure, *((leaf.dtype, leaf.shape[1:]) for leaf in leaves)


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Let a model work on copies of its buffers."""
    places = [module._buffers for module in _open_modules(model)]
    before = [dict(buffers) for buffers in places]
    copies = {id(b): b.clone() for named in before for b in named.values() if b is not None}
    try:
        for buffers in places:
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = copies[id(buffer)]
        yield
    finally:
        for buffers, named in zip(places, before, strict=True):
            _refill(buffers, named)


@contextmanager
def _exchanged(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters, wherever and under however many names."""
    new = {id(p): tensors[name] for name, p in model.named_parameters() if name in tensors}
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    lists = [m._flat_weights for m in recurrent]
    places: list[tuple[Any, Any, Any]] = [
        *((m._parameters, key, p) for m in model.modules() for key, p in m._parameters.items()),
        *((weights, key, p) for weights in lists for key, p in enumerate(weights)),
    ]
    places = [(place, key, p) for place, key, p in places if id(p) in new]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    try:
        # A module that converts itself, as by `to`, must not write into what is no parameter.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for place, key, p in places:
            place[key] = new[id(p)]
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for place, key, p in places:
            place[key] = p
        for module, weights in zip(recurrent, lists, strict=True):
            vars(module)["_flat_weights"] = weights  # it makes another list of other parameters


def _open_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules whose content can be exchanged; that of scripted ones cannot."""
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _refill(container: Any, content: Any) -> None:
    """Give a container the very objects that it held."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and give every module its own mode back, also after an exception.

    Where a module acts when its mode changes, as adapters do that merge into their weight, it is
    asked to act back, and its tensors get their exact values again.
    """
    modes = [(module, module.training) for module in model.modules()]
    acting = [m for m, mode in modes if type(m).train is not nn.Module.train and mode]
    touched = {id(t): t for m in acting for t in [*m.parameters(), *m.buffers()]}
    values = [(t, t.detach().clone()) for t in touched.values()]
    try:
        _switch_to_eval(model)
        yield
    finally:
        for module, mode in modes:
            if module in acting and module.training != mode:
                module.train(mode)
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)


def _switch_to_eval(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # an exported program, whose mode was fixed with it
        for module in model.modules():
            module.training = False


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave modes, attributes, buffers, gradients and the global random state as they were.

    Gradients are safe because nothing inside calls ``backward``.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices=devices),
        _same_random_state(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _same_tensors(model),
        _same_attributes(model),
        evaluating(model),
        _differentiable(model),
    ):
        yield


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Give the sources of randomness of Python and NumPy the state back that they had."""
    state, state_of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(state_of_numpy)


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """Give every module the attributes back that it had, and all containers their content."""
    attributes = [(vars(module), dict(vars(module))) for module in _open_modules(model)]
    containers = [
        (container, container.copy()) for _, held in attributes for container in _containers(held)
    ]
    try:
        yield
    finally:
        for now, held in attributes:
            if now.keys() != held.keys() or any(now[key] is not held[key] for key in held):
                _refill(now, held)
        for container, content in containers:
            if not _holds(container, content):
                _refill(container, content)


def _containers(attributes: dict[str, Any]) -> Iterator[Any]:
    """Find all containers among attributes, and in each other."""
    waiting, seen = list(attributes.values()), set[int]()
    for value in waiting:
        if isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
            yield value


def _holds(container: Any, content: Any) -> bool:
    """Whether a container holds the very objects of a copy of it, in the same order."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    return all(a is b for a, b in zip(container, content, strict=True))


@contextmanager
def _same_tensors(model: nn.Module) -> Iterator[None]:
    """Give buffers, and tensors that modules hold as attributes, the values back that they had.

    Parameters that a module has converted, as by ``to``, get their own memory again.
    """
    memory = [(p, p.data, p.requires_grad) for p in model.parameters()]
    held = [*model.buffers(), *held_tensors(model)]
    values = [(tensor, tensor.detach().clone(), tensor._version) for tensor in held]
    try:
        yield
    finally:
        for parameter, data, requires_grad in memory:
            if parameter.dtype != data.dtype or parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for tensor, value, version in values:
            if tensor._version != version or _changed_unseen(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold as attributes, without a gradient."""
    found = []
    for module in _open_modules(model):
        places = [vars(module), *_containers(vars(module))]
        entries = [e for p in places for e in (p.values() if isinstance(p, dict) else p)]
        found += [e for e in entries if isinstance(e, Tensor) and not e.requires_grad]
    return list({id(tensor): tensor for tensor in found}.values())


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """Let recurrent layers go backwards in eval mode, which those of cuDNN refuse."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _changed_unseen(buffer: Tensor, value: Tensor) -> bool:
    """Tell whether ``buffer.data`` was written to, which no version counts."""
    return buffer.layout == torch.strided and not torch.equal(buffer, value)
