"""Batches with labels, and the loss that a model computes from them.

That is the form of Hugging Face: a batch is a dict, and the model returns a ``loss`` if it is
called with the ``labels`` among its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib._restoring import same_attributes
from ewc_lib.likelihood.losses import Loss

AS_PAIRS = "A model that is trained by another loss gets its data as pairs (inputs, targets)."


def prepared(model: nn.Module, raw: Any, column: bool = False) -> Any:
    """Add the inputs that the model would make from labels, and stand labels as a column."""
    labels = raw.get("labels") if isinstance(raw, Mapping) else None
    if labels is not None:
        inputs: Any = {key: value for key, value in raw.items() if key != "labels"}
        target = labels
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        inputs, target = raw
    else:
        return raw  # refused when it is read
    if isinstance(inputs, dict) and _wants_decoder_inputs(model, inputs, target):
        inputs = {**inputs, "decoder_input_ids": _shifted(model, target)}
    return inputs, target.unsqueeze(-1) if column and labels is not None else target


def _wants_decoder_inputs(model: nn.Module, inputs: dict[str, Any], labels: Any) -> bool:
    """Tell whether the decoder of a model would go by what its labels are."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        return False
    words = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    return words and takes(model, "labels") and takes(model, "decoder_input_ids")


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """Return the labels one position later, as the model itself puts them into its decoder."""
    if (make := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        found: Tensor = make(labels=labels)
        return found
    config: Any = model.config
    shifted = F.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def own_loss(model: nn.Module, inputs: Any, labels: Tensor) -> Loss | None:
    """Return the loss that the model computes if it is called with labels, or None."""
    if not takes(model, "labels"):
        return None
    # it may write down in its configuration what kind of problem it has seen
    configurations = [getattr(module, "config", None) for module in model.modules()]
    once = {id(configuration): configuration for configuration in configurations}
    with same_attributes(once.values()), torch.enable_grad():
        try:
            output = model(**inputs, labels=labels)
        except Exception as error:
            raise ValueError(
                f"the model takes labels but cannot compute a loss from those of the first batch: "
                f"{error}. {AS_PAIRS}"
            ) from error
    loss, logits = _entry(output, "loss"), _entry(output, "logits")
    if isinstance(output, tuple) and len(output) > 1:  # as with return_dict=False
        first, second, *_ = output
        if isinstance(first, Tensor) and first.dim() == 0:
            loss, logits = first, second
    if not isinstance(loss, Tensor):
        return None
    extra = _entry(output, "aux_loss")
    whose = "the loss that the model returns for a batch with labels"
    if isinstance(extra, Tensor):
        whose += f" (with an auxiliary loss of {float(extra.detach()):.6g}, times a coefficient)"
    way_out = AS_PAIRS
    if _wants_decoder_inputs(model, inputs, labels):
        way_out += (
            " Batches without decoder_input_ids get them from their labels here; give them, and "
            "their mask, if the model makes others."
        )
    return Loss(loss.detach(), slope(loss, logits), whose, way_out)


def takes(model: nn.Module, name: str) -> bool:
    """Tell whether the model has an argument of that name, or what it is wrapped around."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    if name in parameters:
        return True
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return passes_on and any(takes(child, name) for child in model.children())


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def slope(loss: Tensor, output: Any) -> Tensor | None:
    """Return the derivative of a loss in an output, if it has one."""
    if not (isinstance(output, Tensor) and output.requires_grad and loss.requires_grad):
        return None
    return torch.autograd.grad(loss.sum(), output, allow_unused=True)[0]
