"""Calling a network, also with other parameters, and on copies of what it would edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ewc_lib._parameters import form
from ewc_lib._restoring import CONTAINERS, held_tensors, open_modules, refill, same_attributes


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
        if form(inputs) in self._harmless:
            yield inputs
            return
        with _own_buffers(self.model), same_attributes(self.model.modules()):
            yield tree_map(torch.clone, inputs)

    def learn(self, inputs: Any, harmless: bool) -> None:
        """Take note whether a call with inputs of this form has left everything as it was."""
        (self._harmless.add if harmless else self._harmless.discard)(form(inputs))

    def constants(self) -> list[Tensor]:
        """Return all tensors of the model, which do not depend on the data."""
        return [*self.model.parameters(), *self.model.buffers(), *self._held]

    def state(self, inputs: Any) -> list[Any]:
        """Return what differs before and after a call that edits something."""
        tensors = [*tree_leaves(inputs), *self.model.buffers()]
        attributes = [
            (id(value), len(value) if isinstance(value, CONTAINERS) else 0)
            for module in self.model.modules()
            for value in vars(module).values()
        ]
        return [*attributes, *((id(t), t._version, t.data_ptr()) for t in tensors)]


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Let a model work on copies of its buffers."""
    places = [module._buffers for module in open_modules(model)]
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
            refill(buffers, named)


@contextmanager
def _exchanged(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters, wherever and under however many names."""
    new = {id(p): tensors[name] for name, p in model.named_parameters() if name in tensors}
    lists = [(m, m._flat_weights) for m in model.modules() if isinstance(m, nn.RNNBase)]
    found = [(place, key, p) for place, key, p in places(model) if id(p) in new]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    try:
        # A module that converts itself, as by `to`, must not write into what is no parameter.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for place, key, p in found:
            place[key] = new[id(p)]
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for place, key, p in found:
            place[key] = p
        for module, weights in lists:
            vars(module)["_flat_weights"] = weights  # it makes another list of other parameters


def places(model: nn.Module) -> list[tuple[Any, Any, Any]]:
    """Return where modules hold parameters and buffers: containers, keys and what is there."""
    return [
        *((m._parameters, key, p) for m in model.modules() for key, p in m._parameters.items()),
        *((m._buffers, key, b) for m in model.modules() for key, b in m._buffers.items()),
        *(
            (m._flat_weights, key, p)
            for m in model.modules()
            if isinstance(m, nn.RNNBase)
            for key, p in enumerate(m._flat_weights)
        ),
    ]
