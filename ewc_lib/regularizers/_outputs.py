"""What the methods share that compare outputs: how these are read, and which positions count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ewc_lib._batches import Reading
from ewc_lib._restoring import untouched
from ewc_lib.fisher.structures.states import decode, encode
from ewc_lib.heads import all_outputs
from ewc_lib.likelihood.agreement import Criterion, agreed
from ewc_lib.likelihood.labelled import prepared
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    OutputDistribution,
    Poisson,
    TorchDistribution,
    given_distribution,
)
from ewc_lib.regularizers._function import FunctionPenalty

FAMILIES: dict[str, type[OutputDistribution]] = {
    family.__name__: family for family in (Bernoulli, Categorical, Gaussian, Poisson)
}
"""The families whose parameters a state can hold."""


class OutputPenalty(FunctionPenalty):
    """A penalty on what the outputs of a network say, whatever a batch looks like.

    Parameters
    ----------
    model, strength
        As there.
    likelihood, criterion
        How to read the outputs, as in :func:`ewc_lib.fisher_information`.
    """

    _looks_at_data = True

    def __init__(
        self,
        model: nn.Module,
        strength: float | None,
        likelihood: Likelihood | None,
        criterion: Criterion | None,
    ) -> None:
        super().__init__(model, strength)
        self.likelihood, self.criterion = likelihood, criterion
        self._distribution = given_distribution(likelihood) or Categorical()

    def _agree(self, data: Any) -> tuple[Reading, OutputDistribution]:
        """Return the data, ready to be read, and how the outputs are read."""
        with untouched(self.model):
            return agreed(self.model, data, self.likelihood, self.criterion)

    def _outputs_of(self, inputs: Any) -> Tensor:
        """Return all outputs as they are evaluated, without a trace in the model."""
        with untouched(self.model), torch.no_grad():
            return all_outputs(self.model, inputs)

    def _state(self) -> dict[str, Tensor]:
        return super()._state() | {"likelihood": encode(_written(self._distribution))}

    def _check_state(self, state: dict[str, Tensor], *keys: str) -> None:
        super()._check_state(state, *keys)
        named = given_distribution(self.likelihood)
        if "likelihood" not in state:  # of a state from before there was a choice
            return
        found = _read(decode(state["likelihood"]))
        if found is None and named is None:
            raise ValueError("the state is of a likelihood that is a function: give it again")
        if found is not None and named not in (None, found) and int(state["n_tasks"]):
            raise ValueError(f"the state reads outputs as {found}, but the likelihood is {named}")

    def _load(self, state: dict[str, Tensor]) -> None:
        super()._load(state)
        if "likelihood" in state:
            self._distribution = _read(decode(state["likelihood"])) or self._distribution


def classes_last(distribution: OutputDistribution, outputs: Tensor) -> Tensor:
    """Return outputs whose last axis is that of the classes, if there are classes."""
    axis = distribution.class_dim if isinstance(distribution, Categorical) else None
    return outputs if axis is None else outputs.movedim(axis, -1)


def reading_last(distribution: OutputDistribution) -> OutputDistribution:
    """Return the distribution that reads what :func:`classes_last` returns."""
    if isinstance(distribution, Categorical):
        return replace(distribution, class_dim=None)
    return distribution


def divergence(
    distribution: OutputDistribution, old: Tensor, new: Tensor, temperature: float
) -> Float[Tensor, "N ..."]:
    """Return the Kullback-Leibler divergence of old from new outputs at each position."""
    if isinstance(distribution, TorchDistribution):
        found: Tensor = kl_divergence(distribution.of(old), distribution.of(new))
        return found
    if isinstance(distribution, Gaussian):
        return ((new - old) / distribution.sigma).square() / 2
    if isinstance(distribution, Poisson):
        return old.exp() * (old - new) - old.exp() + new.exp()
    if isinstance(distribution, Bernoulli):
        old, new = (torch.stack([torch.zeros_like(f), f], -1) for f in (old, new))
    old, new = ((outputs / temperature).log_softmax(-1) for outputs in (old, new))
    return F.kl_div(new, old, reduction="none", log_target=True).sum(-1)


def mean_over_positions(values: Tensor, counts: Bool[Tensor, ...] | None) -> Float[Tensor, ""]:
    """Return the mean over the positions that count."""
    if counts is None:
        return values.mean()
    return values.masked_fill(~counts, 0).sum() / counts.sum().clamp_min(1)


def inputs_and_labels(model: nn.Module, inputs: Any) -> tuple[Any, Tensor | None]:
    """Part what a model is called with from labels among it."""
    if not isinstance(inputs, Mapping):
        return inputs, None
    named = dict(inputs)
    if named.get("labels") is None:
        named.pop("labels", None)
        return named, None
    return prepared(model, named)  # type: ignore[no-any-return]


def positions_that_count(
    distribution: OutputDistribution, inputs: Any, labels: Tensor | None, shape: torch.Size
) -> Bool[Tensor, ...] | None:
    """Mark the positions that labels, or else masks among the inputs, do not leave out."""
    counts = None if labels is None else _mask_of(distribution, labels)
    if counts is None and isinstance(inputs, dict):
        of_decoder = {"decoder_input_ids", "decoder_attention_mask"} & inputs.keys()
        mask = inputs.get("decoder_attention_mask" if of_decoder else "attention_mask")
        counts = None if mask is None or mask.shape != shape else mask != 0
        if _is_shifted(distribution) and len(shape) == 2:
            present = torch.ones(shape, dtype=torch.bool) if counts is None else counts
            counts = F.pad(present[:, 1:], (0, 1), value=False)
    return counts if counts is not None and counts.shape == shape else None


def _mask_of(distribution: OutputDistribution, labels: Tensor) -> Bool[Tensor, ...] | None:
    try:
        return distribution.mask(labels)
    except (RuntimeError, TypeError, ValueError):  # labels of another kind
        return None


def _is_shifted(distribution: OutputDistribution) -> bool:
    return isinstance(distribution, Categorical) and distribution.next_token


def _written(distribution: OutputDistribution) -> str:
    family = type(distribution).__name__
    if family not in FAMILIES:
        return json.dumps(None)
    return json.dumps([family, asdict(distribution)])  # type: ignore[call-overload]


def _read(text: str) -> OutputDistribution | None:
    found = json.loads(text)
    return None if found is None else FAMILIES[found[0]](**found[1])
