"""Running a network of half precision in single precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ewc_lib._calling import places

HALF = torch.float16, torch.bfloat16


class SinglePrecision:
    """Puts copies in float32 in the place of all parameters and buffers in half precision.

    A model that insists on half precision is run as it is. Such is one that fails with float32
    in its first call, one that holds parameters elsewhere than in its modules, and one whose
    parameters are no plain tensors or have hooks.

    Parameters
    ----------
    model
        The network.
    parameters
        Some of its parameters by name. In this dict, too, copies stand in their place.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        half = [t for t in [*model.parameters(), *model.buffers()] if t.dtype in HALF]
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        self.model = model
        self._parameters, self._given = parameters, dict(parameters)
        self._refused = not half or scripted or not all(map(_is_plain, half))
        self._settled = self._refused
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

    def has_run(self, output: Tensor) -> bool:
        """Tell whether an output is of the model as it is run from now on."""
        if not self._refused and self._is_of_others(output):
            self._refuse()
        elif self._settled or not self._refused:
            self._settled = True
            return True
        self._settled = True
        self._put_back()
        return False

    def _widened(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Let a model be called with tensors in half precision, and as it is if it refuses."""

        @wraps(forward)
        def widened(*args: Any, **kwargs: Any) -> Any:
            if not self._refused:
                wide = tree_map_only(Tensor, _widen, (args, kwargs))
                try:
                    return forward(*wide[0], **wide[1])
                except Exception as error:
                    if self._settled:
                        error.add_note(NOTE)
                        raise
                    self._refuse()
            return forward(*args, **kwargs)

        return widened

    def _refuse(self) -> None:
        self._refused = True
        self._parameters.update(self._given)
        self._put_back()

    def _put_back(self) -> None:
        for container, key, tensor in self._places:
            container[key] = tensor

    def _is_of_others(self, output: Tensor) -> bool:
        """Whether an output depends on parameters that have a copy, in another place."""
        waiting = [output.grad_fn] if output.grad_fn is not None else []
        seen = set(waiting)
        for node in waiting:
            if id(getattr(node, "variable", None)) in self._copies:
                return True
            children = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= children
            waiting += children
        return False


NOTE = "The model is in half precision and was run in float32; precision='high' runs it as it is."


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
