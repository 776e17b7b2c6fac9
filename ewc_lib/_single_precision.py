"""Running a network of half precision in single precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ewc_lib._calling import places

HALF = torch.float16, torch.bfloat16


class SinglePrecision:
    """Puts copies in float32 in the place of all parameters and buffers in half precision.

    Where the model opens a region of autocast, it is closed again. A model that insists on half
    precision is run as it is. Such is one that fails with float32 in its first call, one that
    holds parameters elsewhere than in its modules, and one whose parameters are no plain tensors
    or have hooks, or that is a program of TorchScript.

    Parameters
    ----------
    model
        The network.
    parameters
        Some of its parameters by name. In this dict, too, copies stand in their place.
    refused
        Run the model as it is in any case.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], refused: bool = False
    ) -> None:
        half = [t for t in [*model.parameters(), *model.buffers()] if t.dtype in HALF]
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        self.model = model
        self._parameters, self._given = parameters, dict(parameters)
        self._refused = refused or scripted or not all(map(_is_plain, half))
        self._settled = self._refused
        self._autocast = _NoAutocast(next(model.parameters()).device.type)
        self._copies = {} if self._refused else {id(t): (t, _room_for(t)) for t in half}
        self._places: list[tuple[Any, Any, Tensor]] = []
        for name, parameter in self._given.items():
            parameters[name] = self._copies.get(id(parameter), (None, parameter))[1]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the modules hold the copies, with the present values."""
        if self._refused:
            yield
            return
        for tensor, copy in self._copies.values():
            copy.data.copy_(tensor.detach())
        self._places = [place for place in places(self.model) if id(place[2]) in self._copies]
        attributes = vars(self.model)
        own = {"forward": attributes["forward"]} if "forward" in attributes else {}
        try:
            for container, key, tensor in self._places:
                container[key] = self._copies[id(tensor)][1]
            attributes["forward"] = self._widened(self.model.forward)
            yield
        finally:
            self._put_back()
            del attributes["forward"]
            attributes.update(own)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Call the model; if it refuses, what ends with the call may bring the copies back."""
        try:
            yield
        finally:
            if self._refused:
                self._put_back()

    def has_run(self, output: Tensor) -> bool:
        """Tell whether an output is of the model as it is run from now on."""
        if not self._refused and self._is_of_others(output):
            self._refuse()
        elif self._settled or not self._refused:
            self._settled = True
            return True
        self._settled = True
        return False

    def _widened(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Let a model be called with tensors in half precision, and as it is if it refuses."""

        @wraps(forward)
        def widened(*args: Any, **kwargs: Any) -> Any:
            if not self._refused:
                try:
                    return self._run(forward, args, kwargs)
                except Exception as error:
                    if self._settled and self._changes_anything:
                        error.add_note(NOTE)
                    if self._settled or not self._changes_anything:
                        raise
                    self._refuse()
            return forward(*args, **kwargs)

        return widened

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._copies:
            args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        if self._settled and not self._autocast.closed:
            return forward(*args, **kwargs)
        with self._autocast:
            return forward(*args, **kwargs)

    @property
    def _changes_anything(self) -> bool:
        return bool(self._copies) or self._autocast.closed

    def _refuse(self) -> None:
        self._refused = True
        self._parameters.update(self._given)
        self._put_back()

    def _put_back(self) -> None:
        for container, key, tensor in self._places:
            container[key] = tensor

    def _is_of_others(self, output: Tensor) -> bool:
        """Whether an output depends on parameters that have a copy, in another place."""
        if not self._copies:
            return False
        waiting = [output.grad_fn] if output.grad_fn is not None else []
        seen = set(waiting)
        for node in waiting:
            if id(getattr(node, "variable", None)) in self._copies:
                return True
            children = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= children
            waiting += children
        return False


class _NoAutocast(TorchFunctionMode):
    """Closes every region of autocast at the first operation in it.

    Attributes
    ----------
    closed
        Whether there was one.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.closed = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_autocast_enabled(self.device):
            torch.set_autocast_enabled(self.device, False)  # until the region ends
            self.closed = True
        return function(*args, **(kwargs or {}))


NOTE = "The model uses half precision and was run in float32; precision='high' runs it as it is."


def _is_plain(tensor: Tensor) -> bool:
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return ordinary and not tensor._backward_hooks


def _room_for(tensor: Tensor) -> Any:
    room = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(room, tensor.requires_grad)
    return room


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
