"""Keep the running statistics of normalisations where they are while a network is trained on.

A penalty holds parameters. Batch normalisation also normalises by running means and variances.
They are no parameters and follow the data of the new task: the old task is lost with every weight
in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType, TracebackType
from typing import Any, NamedTuple

from torch import nn
from torch.jit import ScriptModule

from ewc_lib._names import plain_name
from ewc_lib._restoring import untouched
from ewc_lib._warning import warn

__all__ = ["FrozenNorms", "freeze_norms"]

COUNTERS = {"num_batches_tracked", "count"}
"""Buffers in which layers count what they have seen."""


BEFORE = "_before_freezing"
"""Where a layer keeps what it was, however often it is frozen and whichever handle goes last."""


class _Before(NamedTuple):
    """Whether the mode of a layer was the model's, and its own method ``train`` if any."""

    followed: bool
    own: dict[str, Any]


class FrozenNorms:
    """What undoes :func:`freeze_norms`, by :meth:`remove` or at the end of a ``with`` block.

    A copy of the model is frozen as well; the handle is that of the original. Copy both at once,
    ``copy.deepcopy((model, frozen))``, for a handle of the copy.

    Attributes
    ----------
    names
        The layers that are frozen, without the prefixes of wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        found = dict(_with_statistics(model))
        if programs := [n for n, layer in found.items() if isinstance(layer, ScriptModule)]:
            raise ValueError(
                f"{programs} are programs of TorchScript, which take no hooks: put them in eval "
                "mode yourself after each model.train()"
            )
        self.names = [plain_name(name) for name in found]
        self._model = model
        self._frozen = [_freeze(layer, model.training) for layer in found.values()]

    def remove(self) -> None:
        """Let the layers follow the mode of the model again, unless another handle is left."""
        for layer, key in self._frozen:
            layer._forward_pre_hooks.pop(key, None)
            if not _is_frozen(layer):
                followed, own = vars(layer).pop(BEFORE)
                vars(layer).pop("train", None)
                vars(layer).update(own)
                layer.training = followed and self._model.training
        self._frozen = []

    def __enter__(self) -> FrozenNorms:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def freeze_norms(model: nn.Module) -> FrozenNorms:
    """Keep layers with running statistics in eval mode, also after ``model.train()``.

    They normalise by the statistics that they have, for every batch, and no longer move them. Their
    weights and biases are trained and held as before. Call it when the first task has been
    learned. The keys of ``model.state_dict()`` stay as they are, and copies of the model are
    frozen as well; layers that are put in the place of frozen ones later are not. Layers without
    running statistics (layer, group and RMS normalisation) are left alone.

    Parameters
    ----------
    model
        A network with batch normalisations, instance normalisations that track statistics, or
        layers that are made like them.

    Returns
    -------
    FrozenNorms
        A handle: ``remove()`` undoes it, and so does the end of a ``with`` block.

    Raises
    ------
    ValueError
        If such a layer is a program of TorchScript. Nothing has changed then.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> frozen = freeze_norms(model)
    >>> frozen.names
    ['1']
    >>> _ = model.train()(torch.randn(8, 3))
    >>> model[1].training, model[1].num_batches_tracked.item()
    (False, 0)
    >>> frozen.remove()
    >>> model[1].training
    True
    """
    return FrozenNorms(model)


def warn_of_moving(model: nn.Module) -> bool:
    """Warn, where the package was called, if statistics will move; tell whether they will."""
    if names := _moving(model):
        warn(
            f"the running statistics of {names} will follow the data of the next task, and "
            "nothing holds them: what was learned is lost with them, whatever the strength. Call "
            "ewc_lib.freeze_norms(model) before the next task"
        )
    return bool(names)


def _with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find layers that keep running statistics and can move them."""
    for name, module in model.named_modules():
        buffers = {key for key, value in module._buffers.items() if value is not None}
        can_move = hasattr(module, "momentum") or buffers & COUNTERS
        if can_move and any(key.startswith("running_") for key in buffers):
            yield name, module


def _moving(model: nn.Module) -> list[str]:
    """Return the layers whose statistics move as soon as the model is trained."""
    layers = {
        plain_name(name): layer
        for name, layer in _with_statistics(model)
        if not _is_frozen(layer) and getattr(layer, "momentum", None) != 0
    }
    if model.training or not layers:  # what is in eval mode now is so for good
        return [name for name, layer in layers.items() if layer.training]
    if all(_has_usual_train(module) for module in model.modules()):
        return list(layers)
    with untouched(model):
        model.train()
        return [name for name, layer in layers.items() if layer.training]


def _has_usual_train(module: nn.Module) -> bool:
    return type(module).train is nn.Module.train and "train" not in vars(module)


def _freeze(layer: nn.Module, mode: bool) -> tuple[nn.Module, int]:
    """Freeze a layer; return it with the key of its hook."""
    if not _is_frozen(layer):
        own = {key: value for key, value in vars(layer).items() if key == "train"}
        vars(layer)[BEFORE] = _Before(layer.training == mode, own)
        layer.training = False
        vars(layer)["train"] = MethodType(train, layer)
    handle = layer.register_forward_pre_hook(_into_eval, prepend=True)
    return layer, handle.id


def _is_frozen(layer: nn.Module) -> bool:
    return any(hook is _into_eval for hook in layer._forward_pre_hooks.values())


def _into_eval(layer: nn.Module, _: Any) -> None:
    """Go back, where a module sets the modes of others without asking them."""
    if layer.training:
        layer.training = False


def train(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Stay in eval mode. A bound method, unlike a closure, is copied with its layer."""
    layer.training = False
    return layer
