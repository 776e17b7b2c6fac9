"""Calling a network without leaving a trace in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

Selection: TypeAlias = Sequence[str] | str | Callable[[str, Tensor], bool] | None
"""Which parameters: names, glob patterns, a predicate of (name, tensor), or None for all."""


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


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``params`` chooses, in the model's order.

    Raises
    ------
    ValueError
        If nothing is trainable or chosen, or if a name or pattern matches no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    if params is None:
        return trainable
    if callable(params):
        chosen = {name for name, p in trainable.items() if params(name, p)}
    else:
        patterns = [params] if isinstance(params, str) else list(params)
        chosen = {name for pattern in patterns for name in _match(pattern, model, trainable)}
    if not chosen:
        raise ValueError("params chooses no parameter")
    return {name: p for name, p in trainable.items() if name in chosen}


def _match(pattern: str, model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
    found = [name for name in trainable if name == pattern or fnmatchcase(name, pattern)]
    if found:
        return found
    if any(name == pattern for name, _ in model.named_parameters()):
        raise ValueError(f"parameter {pattern!r} does not require grad")
    near = difflib.get_close_matches(pattern, trainable, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the model has {', '.join(trainable)}"
    raise ValueError(f"no trainable parameter is named {pattern!r}{hint}")


def check_finite_parameters(parameters: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first parameter with a NaN or infinity."""
    for name, parameter in parameters.items():
        parameter = parameter.detach()
        # One finite sum tells that all are finite, in a third of the time.
        if not parameter.sum().isfinite() and not parameter.isfinite().all():
            raise ValueError(f"parameter {name!r} holds NaN or infinite values")


def check_modules(model: nn.Module) -> None:
    """Refuse, by name, what has no score of its own for each observation."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor: the forward pass uses another tensor
            raise ValueError(
                f"parameter {name!r} is sharded over processes; use "
                "ewc_lib.integrations.distributed.fisher_information"
            )
    for name, module in model.named_modules():
        who = f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{who} has no running statistics, so it mixes observations: they have no scores "
                "of their own. Use track_running_stats=True"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None:
                raise ValueError(
                    f"{who} has max_norm={module.max_norm}: it changes its own parameter whenever "
                    "it is called, so there is no fixed model to take scores of"
                )
            if module.scale_grad_by_freq:
                raise ValueError(
                    f"{who} has scale_grad_by_freq=True: what it returns for a gradient depends "
                    "on the batch and is not the gradient of its output"
                )
