"""Whether a regularizer suits what is trained, before anything changes."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_is_for(model: nn.Module, regularizer: Any) -> None:
    """Raise a ValueError if a regularizer was made for a model without one parameter of this one.

    Models in wrappers, compiled ones and those with other heads share their parameters.
    """
    held = getattr(regularizer, "model", None)
    if not isinstance(held, nn.Module) or held is model:
        return
    theirs, ours = ({id(p) for p in one.parameters()} for one in (held, model))
    if theirs and ours and theirs.isdisjoint(ours):
        raise ValueError(
            f"the {type(regularizer).__name__} was made for another model, which has none of the "
            "parameters that are trained (is one a copy of the other?): make it with this model"
        )
