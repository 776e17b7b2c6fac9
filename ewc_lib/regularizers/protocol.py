"""What a training loop may ask of a method against forgetting."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ewc_lib.attaching import Attachment

__all__ = ["Regularizer"]


@runtime_checkable
class Regularizer(Protocol):
    """A method that holds on to earlier tasks while the network learns the next one.

    A task is: :meth:`before_task`; then, for each step, ``loss.backward()``,
    :meth:`before_step`, :meth:`add_gradient_`, ``optimizer.step()``, :meth:`after_step`; and at
    its end :meth:`consolidate`. After :meth:`attach`, the optimizer's step calls what belongs
    around it, and only :meth:`consolidate` is left. :class:`ewc_lib.EWC` is one, and so are all
    classes of this package.
    """

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Act in every step of an optimizer from now on."""
        ...

    def before_task(self) -> None:
        """Begin a task, at the parameters that the model has now."""
        ...

    def before_step(self, inputs: Any = None) -> None:
        """Note what is needed of a step: its inputs, and the task's own gradient in ``.grad``."""
        ...

    def penalty(self) -> Float[Tensor, ""]:
        """Return what is added to the loss, differentiable; 0 before the first task has ended."""
        ...

    def add_gradient_(self) -> None:
        """Add the gradient of the penalty to ``.grad``."""
        ...

    def after_step(self) -> None:
        """Note what is needed of a step, after the optimizer has moved the parameters."""
        ...

    def consolidate(self, data: Any) -> Any:
        """Finish a task: remember what it needs, from its training data."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered, as plain tensors."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...
