"""Giving a network back as it was: modes, attributes, buffers and random state."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ewc_lib._sharded import is_absent

CONTAINERS = (dict, list, set, deque)
"""What is given its content back."""

SMALL = 2**16
"""Tensors up to this number of entries are kept and compared together."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and give every module its own mode back, also after an exception.

    Where a module acts when its mode changes, as adapters do that merge into their weight, it is
    asked to act back, and its tensors get their exact values again.
    """
    modes = [(module, module.training) for module in model.modules()]
    acting = [m for m, mode in modes if type(m).train is not nn.Module.train and mode]
    touched = {id(t): t for m in acting for t in [*m.parameters(), *m.buffers()]}
    values = [(t, t.detach().clone()) for t in touched.values() if not is_absent(t)]
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
        same_attributes(model.modules()),
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
def same_attributes(owners: Iterable[Any]) -> Iterator[None]:
    """Give modules and other objects the attributes back that they had, and containers too."""
    held = [vars(o) for o in owners if hasattr(o, "__dict__") and not _is_scripted(o)]
    attributes = [(now, dict(now)) for now in held]
    containers = [(c, c.copy()) for _, before in attributes for c in _containers(before)]
    try:
        yield
    finally:
        for now, before in attributes:
            if not _holds(now, before):
                refill(now, before)
        for container, content in containers:
            if not _holds(container, content):
                refill(container, content)


def _containers(attributes: dict[str, Any]) -> Iterator[Any]:
    """Find all containers among attributes, and in each other."""
    waiting, seen = list(attributes.values()), set[int]()
    for value in waiting:
        if isinstance(value, CONTAINERS) and id(value) not in seen:
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


class _Values:
    """The values of some tensors of one dtype on one device, all in one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._shapes = [tensor.shape for tensor in tensors]
        self.can_change_unseen = tensors[0].layout == torch.strided
        """By writing to ``tensor.data``, which no version counts."""
        self.before = self.versions()
        self._values = self._now().clone() if len(tensors) == 1 else self._now()

    def versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors]

    def differ(self) -> Tensor:
        """Tell, on the device, whether any value is another now."""
        if any(t.shape != v.shape for t, v in self._pairs()):
            return torch.tensor(True, device=self._values.device)
        return (self._now() != self._values).any()

    def restore(self) -> None:
        for tensor, value in self._pairs():
            if tensor.layout != torch.strided or not torch.equal(tensor, value):
                tensor.copy_(value)

    def _now(self) -> Tensor:
        if len(self.tensors) == 1:
            return self.tensors[0].detach()
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self.tensors) == 1:
            return iter([(self.tensors[0], self._values)])
        parts = self._values.split([shape.numel() for shape in self._shapes])
        views = (part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))
        return zip(self.tensors, views, strict=True)


def _alike(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group small tensors of one kind; large ones and those of a special layout stay alone."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        ordinary = tensor.layout == torch.strided and not tensor.is_quantized
        few = ordinary and type(tensor) is Tensor and tensor.numel() <= SMALL
        groups.setdefault((tensor.dtype, tensor.device) if few else id(tensor), []).append(tensor)
    return iter(groups.values())


@contextmanager
def _same_tensors(model: nn.Module) -> Iterator[None]:
    """Give buffers, and tensors that modules hold as attributes, the values back that they had.

    Parameters that a module has converted, as by ``to``, get their own memory again.
    """
    memory = [(p, p.data, p.requires_grad) for p in model.parameters()]
    held = {id(t): t for t in [*model.buffers(), *held_tensors(model)]}
    values = [_Values(tensors) for tensors in _alike(held.values())]
    try:
        yield
    finally:
        for parameter, data, requires_grad in memory:
            if parameter.dtype != data.dtype or parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            changed = [v for v in values if v.versions() != v.before]
            unseen = [v for v in values if v not in changed and v.can_change_unseen]
            differ = [v.differ() for v in unseen]
            if differ and torch.stack([found.to(differ[0].device) for found in differ]).any():
                changed += unseen
            for some in changed:
                some.restore()


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold as attributes, without a gradient."""
    found = []
    for module in open_modules(model):
        places = [vars(module), *_containers(vars(module))]
        entries = [e for p in places for e in (p.values() if isinstance(p, dict) else p)]
        plain = (e for e in entries if isinstance(e, Tensor) and not is_absent(e))
        found += [e for e in plain if not e.requires_grad]
    return list({id(tensor): tensor for tensor in found}.values())


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """Let recurrent layers go backwards in eval mode, which those of cuDNN refuse."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return _without_cudnn()
    return nullcontext()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off, and nothing else: ``cudnn.flags`` writes all its settings, and reads them,
    which fails where those of convolutions and of recurrent layers differ.
    """
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def open_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules whose content can be exchanged; that of scripted ones cannot."""
    return [m for m in model.modules() if not _is_scripted(m)]


def _is_scripted(owner: Any) -> bool:
    return isinstance(owner, torch.jit.ScriptModule)


def refill(container: Any, content: Any) -> None:
    """Give a container the very objects that it held."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)
