"""What the methods share whose penalty is no quadratic form of the parameters."""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_choice, check_strength
from ewc_lib.attaching import Attachment, Form, watch_inputs

MOST_PASSES = 64
"""Forward passes of one step whose inputs are kept; of more, the last."""


class FunctionPenalty:
    """A penalty whose gradient needs a backward pass of its own."""

    _needs_inputs: ClassVar[bool] = False
    """Whether the penalty depends on the inputs of a step."""

    def __init__(self, model: nn.Module, strength: float | None) -> None:
        self.model = model
        self.strength = strength
        self._heads: list[range] = []
        self._n_tasks = 0
        self._inputs_seen: deque[Any] = deque(maxlen=MOST_PASSES)
        self._acting = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(strength={self.strength!r}, n_tasks={self.n_tasks})"

    @property
    def strength(self) -> float | None:
        """The factor of the penalty; None for the number of earlier tasks."""
        return self._strength

    @strength.setter
    def strength(self, value: float | None) -> None:
        if value is not None:
            check_strength(value)
        self._strength = None if value is None else float(value)

    @property
    def n_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._n_tasks

    def attach(
        self, optimizer: torch.optim.Optimizer, form: Literal["gradient"] = "gradient"
    ) -> Attachment:
        """Add the gradient of the penalty before every step of an optimizer, from now on.

        The training loop stays as it is without a penalty, and only ``consolidate`` is left to
        call. Where the penalty needs the inputs of a step, they are those of all forward passes
        in training mode since the step before: under gradient accumulation there are several,
        and the penalty is their mean.

        Parameters
        ----------
        optimizer
            Any of ``torch.optim``, or in a wrapper that keeps it as ``optimizer``.
        form
            There is no proximal step, because the penalty is no quadratic form.

        Returns
        -------
        Attachment
            ``remove()`` ends it, and so does the end of a ``with`` block.

        Raises
        ------
        TypeError
            If it is no optimizer of PyTorch.
        ValueError
            If this penalty is attached to it already, or if it holds none of the parameters.
        """
        check_choice("form", form, ("gradient",), f"; {type(self).__name__} has no proximal step")
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        stop = watch_inputs(self.model, self._saw) if self._needs_inputs else _nothing
        return Attachment(self, optimizer, form, parameters, stop)

    def _saw(self, inputs: Any) -> None:
        """Note the inputs of a forward pass in training."""
        if self._n_tasks and not self._acting:
            self._inputs_seen.append(inputs)

    def _before(self, optimizer: torch.optim.Optimizer, form: Form) -> None:
        passes = self._inputs_seen or [None]
        self._inputs_seen, self._acting = deque(maxlen=MOST_PASSES), True
        try:
            for inputs in passes:
                self.before_step(inputs)
                self._add_gradient(1 / len(passes))
        finally:
            self._acting = False

    def _after(self, optimizer: torch.optim.Optimizer, form: Form) -> None:
        self.after_step()

    def before_task(self) -> None:
        """Begin a task."""

    def before_step(self, inputs: Any = None) -> None:
        raise NotImplementedError

    def after_step(self) -> None:
        """Do nothing: these methods do not watch the parameters."""

    def penalty(self) -> Float[Tensor, ""]:
        """Return what is added to the loss, differentiable; 0 before the first task has ended.

        Raises
        ------
        ValueError
            If :meth:`before_step` was not called since the last task ended.
        """
        if self._n_tasks == 0:
            return torch.zeros((), device=self._device)
        weight = self._n_tasks if self.strength is None else self.strength
        return weight * self._loss()

    def add_gradient_(self) -> None:
        """Add the gradient of :meth:`penalty` to ``.grad`` of the trainable parameters."""
        self._add_gradient(1.0)

    def _add_gradient(self, share: float) -> None:
        with torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
            penalty = share * self.penalty()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if penalty.requires_grad:
            penalty.backward(inputs=trainable)

    def _loss(self) -> Float[Tensor, ""]:
        """Return the penalty of strength 1."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _state(self) -> dict[str, Tensor]:
        heads = [[head.start, head.stop] for head in self._heads]
        return {
            "n_tasks": torch.tensor(self._n_tasks),
            "heads": torch.tensor(heads, dtype=torch.long).reshape(-1, 2),
        }

    def _check_state(self, state: dict[str, Tensor], *keys: str) -> None:
        if missing := {"n_tasks", "heads", *keys} - state.keys():
            name = type(self).__name__
            raise ValueError(f"this is not the state of {name}: it has no {sorted(missing)}")

    def _load(self, state: dict[str, Tensor]) -> None:
        self._n_tasks = int(state["n_tasks"])
        self._heads = [range(start, stop) for start, stop in state["heads"].tolist()]


def contains(outer: range, inner: range) -> bool:
    """Tell whether all outputs of one range are in another."""
    return outer.start <= inner.start and inner.stop <= outer.stop


def _nothing() -> None:
    """Have nothing to stop."""


def no_step() -> ValueError:
    """Return the error of a penalty that has nothing to be computed from."""
    return ValueError("call before_step(inputs) before the penalty of a step")
