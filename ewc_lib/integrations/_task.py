"""What the callbacks of all trainers share: one training is one task."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from ewc_lib._names import plain_name
from ewc_lib.attaching import Attachment, Form, Metric, own_parameters, unwrapped
from ewc_lib.ewc import EWC
from ewc_lib.quadratic import QuadraticPenalty
from ewc_lib.regularizers import AdapterEWC, Regularizer


class Task:
    """A regularizer that acts while a trainer learns a task.

    Parameters
    ----------
    regularizer
        What acts.
    form
        How; None for what the regularizer does by itself.
    metric
        Of a proximal step; None for what the regularizer does by itself.
    whole
        Whether each training is a task; else it is the user who begins and ends them.
    options
        Of its ``consolidate``.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        form: Form | None,
        metric: Metric | None,
        whole: bool,
        options: dict[str, Any],
    ) -> None:
        self.regularizer = regularizer
        given: dict[str, Any] = {"form": form, "metric": metric}
        self._how = {key: value for key, value in given.items() if value is not None}
        self.whole = whole
        self.options = {key: value for key, value in options.items() if value is not None}
        self.ended = False
        self._attached: list[Attachment] = []

    def begin(self, optimizers: Sequence[Optimizer], *, resumed: bool) -> None:
        """Act in the steps of these optimizers, and of no others any more."""
        self.stop()
        if not resumed:
            self.ended = False
            if self.whole:
                self.regularizer.before_task()
        for optimizer in _holding(self.regularizer, optimizers):
            self._attached.append(self.regularizer.attach(optimizer, **self._how))

    @property
    def attached(self) -> bool:
        """Whether it acts."""
        return bool(self._attached)

    def stop(self) -> None:
        """Let the optimizers make their steps alone."""
        while self._attached:
            self._attached.pop().remove()

    def end(self, data: Any, *, everywhere: bool = False) -> None:
        """Consolidate, unless that was done.

        ``everywhere`` tells that each of several processes reads all the data, so that each works
        for itself and no observation counts twice.
        """
        if not self.ended:
            consolidate, options = self.regularizer.consolidate, self.options
            if everywhere and "group" in inspect.signature(consolidate).parameters:
                options = {"group": False, **options}
            with torch.inference_mode(False), torch.enable_grad():
                consolidate(data, **options)
            self.ended = True

    @torch.no_grad()
    def readings(self) -> dict[str, float]:
        """Return the penalty, unless it depends on a batch, and the distance from an anchor.

        Of EWC also what the old tasks have lost in nats; where that has a budget, it has no
        penalty.
        """
        penalty = self.regularizer
        if isinstance(penalty, AdapterEWC):
            return {"ewc/penalty": float(penalty.penalty())}
        if not isinstance(penalty, QuadraticPenalty):
            return {}
        squares = [moved.abs().square().sum() for moved in _moved(penalty)]
        found = {"ewc/distance": float(sum(squares)) ** 0.5}
        if isinstance(penalty, EWC):
            found["ewc/nats"] = float(penalty.nats())
            if penalty.budget is not None:
                return found
        return {"ewc/penalty": float(penalty.penalty()), **found}


def in_batches(dataset: Any, batch_size: int | None, collate: Any) -> DataLoader[Any]:
    """Give each observation once, in a random order that is always the same.

    The first ones of sorted data would tell of one class only. The global random state is left
    alone, so that a training goes on as if nothing had been read.
    """
    shuffle = not isinstance(dataset, IterableDataset)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_size, shuffle, collate_fn=collate, generator=generator)


def is_everywhere(dataset: Any) -> bool:
    """Tell whether each process has all of a data set; one that is iterated may be a part."""
    return not isinstance(dataset, IterableDataset)


def warn_of_next(checkpoint: Any) -> None:
    """Say that a training that resumes where a task has ended learns another one."""
    warnings.warn(
        f"{checkpoint} was saved at the end of a task, and holds that task: what is learned from "
        "here on counts as the next one. To learn more of the same task, resume from an earlier "
        "checkpoint",
        RuntimeWarning,
        stacklevel=3,
    )


def _moved(penalty: QuadraticPenalty) -> Iterator[Tensor]:
    """Yield parameters minus anchor; of a parameter that has grown, the part that was there."""
    parameters = dict(penalty.model.named_parameters())
    parameters |= {plain_name(name): p for name, p in parameters.items()}
    for name, place in penalty.anchor.items():
        if (p := parameters.get(name)) is not None:
            part = p if p.shape == place.shape else p[tuple(map(slice, place.shape))]
            yield part.to(place.dtype) - place


def _holding(regularizer: Regularizer, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
    """Return the optimizers that move what is held; all, if none does."""
    if isinstance(regularizer, QuadraticPenalty):
        held = iter(regularizer._parameters().values())
    else:
        held = regularizer.model.parameters()  # type: ignore[attr-defined]
    own = set(map(id, held))
    return [o for o in optimizers if own & own_parameters(unwrapped(o))] or optimizers
