"""The likelihood that is named is the one that is trained: a comparison on the first batch.

A model that is called with ``labels`` may return a ``loss`` of its own, as those of Hugging Face
do, and how it reads its output is not to be seen from outside: causal language models shift the
labels by one. So its loss is compared with the negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._pytree import tree_leaves, tree_map

from ewc_lib._batches import Reading
from ewc_lib._calling import forward
from ewc_lib._forms import pair
from ewc_lib._warning import warn
from ewc_lib.likelihood.base import OutputDistribution
from ewc_lib.likelihood.categorical import Categorical
from ewc_lib.likelihood.labelled import own_loss, prepared, slope
from ewc_lib.likelihood.losses import Comparison, Loss, candidates, compare
from ewc_lib.likelihood.outputs import Likelihood, given_distribution

Criterion = Callable[[Tensor, Tensor], Tensor]
"""A loss ``criterion(output, target)``, as it is used for training."""

NO_LIKELIHOOD = {
    "weight": "weights of classes or entries temper it, p(y)^w, which sums to one no more",
    "pos_weight": "a weight tempers it, p(y)^w, which sums to one no more",
    "label_smoothing": "it compares with labels that nobody has observed",
}
"""Options of PyTorch's losses, and what they do."""

ROWS = 8
"""Observations of the first batch that are compared, and as many classes."""

ENTRIES = 2**25
"""Numbers in the output that are compared, beyond the first observation."""

BATCHES = 16
"""Batches that are looked through for a label that counts."""


def agreed(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood | None = None,
    criterion: Criterion | None = None,
) -> tuple[Any, OutputDistribution]:
    """Return the data, ready to be read from the start, and the likelihood they are trained by.

    Call it where the model is in eval mode and leaves no trace (``NetworkScores``).

    Parameters
    ----------
    model
        The network.
    data
        As in :func:`ewc_lib.fisher_information`.
    likelihood
        How to read the output; by default the one that agrees with the criterion, or with the
        loss that the model returns for a batch that is a dict with labels, else categorical.
    criterion
        The loss that the model is trained by.

    Raises
    ------
    ValueError
        If the likelihood does not agree with the loss, or none does, or more than one.
    """
    named = given_distribution(likelihood)
    reading = Reading(data, partial(prepared, model))
    _check_criterion(criterion)
    first = _some_rows(reading, model, criterion is None, named is None)
    if first is None:
        return reading, named or Categorical()
    inputs, labels = first
    output = forward(model, prepared(model, first)[0]).detach()
    known = candidates(output, getattr(criterion, "ignore_index", -100))
    possible = [*known.values(), *([named] if named else [])]
    column = criterion is None and _is_column(named, output, labels)
    target = labels.unsqueeze(-1) if column else labels
    rows = _comparable(possible, output, target)
    if len(rows) == 0:  # refused when it is read, by the number of the observation
        return reading, named or Categorical()
    inputs, labels, target, output = tree_map(lambda t: t[rows], (inputs, labels, target, output))
    if criterion is None:
        loss = own_loss(model, inputs, labels)
    else:
        loss = _loss_of(criterion, output, target)
    if loss is None:
        return reading, named or Categorical()
    reading.change = partial(prepared, model, column=column)
    return reading, _choose(loss, named, known, output, target)


def ready(model: nn.Module, data: Any) -> Reading:
    """Return the data, with all inputs that the model would make from the labels."""
    return Reading(data, partial(prepared, model))


def _some_rows(
    reading: Reading, model: nn.Module, only_dicts: bool, unnamed: bool
) -> tuple[Any, Tensor] | None:
    """Return some observations with labels that count, if there is anything to compare."""
    found = None
    for number, raw in enumerate(islice(reading.ahead(), BATCHES)):
        if only_dicts and not isinstance(raw, Mapping):
            if unnamed:
                _warn_of_copies(*pair(raw, f"batch {number}"))
            return None
        inputs, target = pair(raw, f"batch {number}")
        if len({len(leaf) for leaf in tree_leaves((inputs, target))}) > 1:
            return None  # refused when it is read
        if len(target) == 0:
            continue
        counts = _counts(target)
        rows = _spread(counts.nonzero().squeeze(1), target) if counts.any() else slice(ROWS)
        found = tree_map(lambda t, rows=rows: t[rows].detach(), (inputs, target))
        if counts.any():
            break
    device = next(model.parameters()).device
    return None if found is None else tree_map(lambda t: t.to(device), found)


def _warn_of_copies(inputs: Any, target: Tensor) -> None:
    """Warn if each output of a sequence is to be compared with the token that it has read."""
    if target.dim() != 2 or target.shape[1] < 2 or target.is_floating_point():
        return
    counts = target != -100
    alike = [x for x in tree_leaves(inputs) if x.shape == target.shape and x.dtype == target.dtype]
    if any(bool(((x == target) | ~counts).all()) for x in alike) and counts.any():
        warn(
            "the targets are the inputs, token by token, and likelihood='categorical' compares "
            "each output with the token at its own place. Of a language model say "
            "likelihood='next-token'; if this is meant, say likelihood='categorical'"
        )


def _spread(rows: Int[Tensor, " n"], target: Tensor) -> Int[Tensor, " m"]:
    """Choose some rows: one of each class as far as that goes, and others from first to last."""
    at = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()
    chosen: Tensor = rows[at.to(rows.device)]
    if target.dim() > 1 or target.is_floating_point():
        return chosen
    labels, number = target[rows].unique(return_inverse=True)
    of_each = [rows[(number == k).nonzero()[-1, 0]] for k in range(min(ROWS, len(labels)))]
    chosen = torch.cat([torch.stack(of_each), chosen])
    return rows[torch.isin(rows, chosen)]


def _is_column(named: OutputDistribution | None, output: Tensor, labels: Tensor) -> bool:
    """Tell whether labels stand for one column, which a model squeezes for its loss."""
    as_they_are = named is not None and _fits(named, output, labels)
    return output.shape == (*labels.shape, 1) and not as_they_are


def _comparable(
    possible: list[OutputDistribution], output: Tensor, target: Tensor
) -> Int[Tensor, " n"]:
    """Return the rows that have a likelihood, and no more than take little memory.

    A label outside the classes would stop an accelerator for good, if a loss were to read it.
    """
    n = len(target) if output.shape[:1] == target.shape[:1] else 0
    n = min(n, max(1, ENTRIES // max(1, output[:1].numel())))
    pairs = zip(output[:n].split(1), target[:n].split(1), strict=True) if n else []
    fit = [any(_fits(one, *pair) for one in possible) for pair in pairs]
    return torch.tensor(fit, dtype=torch.bool, device=target.device).nonzero().squeeze(1)


def _fits(distribution: OutputDistribution, output: Tensor, target: Tensor) -> bool:
    try:
        distribution.check(output, target)
    except (TypeError, ValueError):
        return False
    return not distribution.invalid(output).any()


def _counts(target: Tensor) -> Bool[Tensor, " N"]:
    """Mark the observations with a label, for sequences one that follows another, to compare."""
    if target.is_floating_point():
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    later = target[:, 1:] if target.dim() > 1 and target.shape[1] > 1 else target
    return (later != -100).reshape(len(target), -1).any(1)


def _loss_of(criterion: Criterion, output: Tensor, target: Tensor) -> Loss:
    output = output.clone().requires_grad_()
    with torch.enable_grad():
        try:
            loss = criterion(output, target)
        except Exception as error:
            raise ValueError(
                f"the criterion cannot be computed for an output of shape {tuple(output.shape)} "
                f"and a target of shape {tuple(target.shape)}: {error}"
            ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(f"the criterion must return a tensor, got {type(loss).__name__}")
    way_out = (
        "A loss with label smoothing, or with weights of classes, is that of no distribution: "
        "without a criterion the likelihood that is named counts."
    )
    return Loss(loss.detach(), slope(loss, output), "the criterion", way_out, any_constant=True)


def _check_criterion(criterion: Criterion | None) -> None:
    """Refuse, by name, what makes a loss of PyTorch another thing than a likelihood."""
    if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
        raise ValueError(
            "criterion must be a function of output and target, as torch.nn.CrossEntropyLoss() "
            f"is, got {criterion!r}"
        )
    keywords = getattr(criterion, "keywords", {})
    options = dict(keywords) if isinstance(keywords, dict) else {}
    if isinstance(criterion, _Loss):
        options |= {name: getattr(criterion, name, None) for name in NO_LIKELIHOOD}
    for name, why in NO_LIKELIHOOD.items():
        value = options.get(name)
        if value is not None and (isinstance(value, Tensor) or value):
            raise ValueError(
                f"a criterion with {name} is not a log-likelihood: {why}. Name the likelihood of "
                "the output and leave the criterion out to get its Fisher information"
            )


def _choose(
    loss: Loss,
    named: OutputDistribution | None,
    known: dict[str, OutputDistribution],
    output: Tensor,
    target: Tensor,
) -> OutputDistribution:
    """Return the one distribution that agrees with the loss."""
    tried = {
        name: compare(loss, distribution, output, target)
        for name, distribution in known.items()
        if distribution != named
    }
    agreeing = [name for name, one in tried.items() if one.agrees]
    if named is not None:
        own = compare(loss, named, output, target)
        if own.agrees:
            return named
        would = f"likelihood={agreeing[0]} agrees. " if agreeing else ""
        raise ValueError(
            _disagreement(loss, {str(named): own, **tried}) + would + _way_out(loss, tried, own)
        )
    if not agreeing:
        raise ValueError(
            f"{_disagreement(loss, tried)}Say likelihood=... if it is the one of another "
            f"distribution. {_way_out(loss, tried)}"
        )
    if len(agreeing) > 1:
        raise ValueError(
            f"{loss.whose} agrees with each of {', '.join(agreeing)} on the first batch; say "
            "which by likelihood=..."
        )
    return tried[agreeing[0]].distribution


def _way_out(loss: Loss, tried: dict[str, Comparison], own: Comparison | None = None) -> str:
    """Say what to do, and for data as pairs, which nobody compares, by which likelihood."""
    nearest = min(tried, key=lambda name: tried[name].distance, default="")
    least = tried[nearest].distance if tried else math.inf
    if loss.any_constant or not least < (own.distance if own else math.inf):
        return loss.way_out
    return f"{loss.way_out} The nearest is {nearest}: give pairs, with likelihood={nearest}."


def _disagreement(loss: Loss, tried: dict[str, Comparison]) -> str:
    lines = [f"  {name}: {one.told}" for name, one in tried.items() if one.possible]
    others = [f"  {name} does not fit: {one.told}" for name, one in tried.items()]
    return (
        f"{loss.whose} is {float(loss.value.sum()):.6g} for the first observations, and is not "
        "the negative log-likelihood of the output:\n" + "\n".join(lines or others) + "\n"
    )
