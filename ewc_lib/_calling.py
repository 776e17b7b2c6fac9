"""Calling a network without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def forward(model: nn.Module, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Call a model, optionally with other parameters, and return its output tensor.

    A dict of inputs is passed by keyword, a tuple or list by position. Outputs that carry
    ``.logits``, as those of Hugging Face models, are unwrapped.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    else:
        args = (inputs,)
    if parameters is None:
        output = model(*args, **kwargs)
    else:
        output = functional_call(model, parameters, args, kwargs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor or have .logits, got {type(output)}")
    return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and give every module its own mode back, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave modes, buffers, gradients and the global random state as they were.

    Gradients are safe because nothing inside calls ``backward``.
    """
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    values = [
        (buffer, buffer.detach().clone(), buffer._version)
        for _, named in buffers
        for buffer in named.values()
        if buffer is not None
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(model),
            _differentiable(model),
        ):
            yield
    finally:
        for module, named in buffers:
            if isinstance(module, torch.jit.ScriptModule):  # its buffers cannot be exchanged
                continue
            for name in set(module._buffers) - named.keys():
                del module._buffers[name]
            module._buffers.update(named)
        for buffer, value, version in values:
            if buffer._version != version or _changed_unseen(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """Let recurrent layers go backwards in eval mode, which those of cuDNN refuse."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _changed_unseen(buffer: Tensor, value: Tensor) -> bool:
    """Tell whether ``buffer.data`` was written to, which no version counts."""
    return buffer.layout == torch.strided and not torch.equal(buffer, value)
