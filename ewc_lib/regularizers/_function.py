"""What the methods share whose penalty is no quadratic form of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_strength
from ewc_lib._restoring import untouched
from ewc_lib.heads import MultiHead, own_outputs


class FunctionPenalty:
    """A penalty whose gradient needs a backward pass of its own."""

    def __init__(self, model: nn.Module, strength: float | None) -> None:
        self.model = model
        self.strength = strength
        self._heads: list[range] = []
        self._n_tasks = 0

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
        with torch.enable_grad():
            penalty = self.penalty()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if penalty.requires_grad:
            penalty.backward(inputs=trainable)

    def _loss(self) -> Float[Tensor, ""]:
        """Return the penalty of strength 1."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _head(self, inputs: Tensor) -> range:
        """Return the outputs that are read now, without a trace in the model."""
        with untouched(self.model):
            return own_outputs(self.model, inputs[:1].to(self._device))

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


def read_now(model: nn.Module, n_outputs: int) -> range:
    """Return which of all outputs are read now."""
    if isinstance(model, MultiHead) and model.outputs is not None:
        return model.outputs
    return range(n_outputs)


def no_step() -> ValueError:
    """Return the error of a penalty that has nothing to be computed from."""
    return ValueError("call before_step(inputs) before the penalty of a step")
