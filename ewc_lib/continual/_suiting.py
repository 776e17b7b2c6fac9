"""Whether a regularizer suits what is trained, before anything changes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ewc_lib._restoring import untouched
from ewc_lib.continual._reading import Piece
from ewc_lib.likelihood.agreement import Criterion, agreed
from ewc_lib.likelihood.base import OutputDistribution
from ewc_lib.likelihood.categorical import Categorical
from ewc_lib.likelihood.labelled import takes


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


def check_knows(
    regularizer: Any, model: nn.Module, criterion: Criterion | None, piece: Piece
) -> None:
    """Raise a ValueError if a regularizer would take for classes what is trained as something else.

    One that has finished a task already has shown that it can.
    """
    names_one = not hasattr(regularizer, "likelihood") or regularizer.likelihood is not None
    if criterion is None or names_one or getattr(regularizer, "criterion", None) is not None:
        return
    if getattr(regularizer, "n_tasks", 0) or (piece.labelled and takes(model, "labels")):
        return
    reason = None
    try:
        found = _agreed(model, criterion, piece)
    except ValueError as error:
        if not piece.target.is_floating_point():
            return  # a weighted loss of classes, perhaps
        found, reason = None, error
    if found is None or found != Categorical(getattr(found, "ignore_index", -100)):
        kind = type(regularizer).__name__
        trained = "is of no known likelihood" if found is None else f"is that of {found}"
        raise ValueError(
            f"the criterion {trained}, but {kind} takes the targets for classes at the end of the "
            f"task, as nothing else is said: give the likelihood, or a criterion, to {kind}, too"
        ) from reason


def _agreed(model: nn.Module, criterion: Criterion, piece: Piece) -> OutputDistribution:
    with untouched(model):
        return agreed(model, [(piece.inputs, piece.target)], None, criterion)[1]
