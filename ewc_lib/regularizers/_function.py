"""What the methods share whose penalty is no quadratic form of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from ewc_lib._arguments import check_choice, check_strength
from ewc_lib._misuse import warn_if_used_twice, warn_of_twice
from ewc_lib._warning import Once
from ewc_lib.attaching import (
    Attachment,
    Form,
    Metric,
    accumulate_,
    is_attached,
    own_parameters,
    watch_inputs,
)


class Pass(NamedTuple):
    """What a model was called with in training.

    Attributes
    ----------
    inputs
        By position or by name, without the graph that they come from.
    size
        Number of observations.
    autocast
        The precision of a region of autocast, or None outside of one.
    device
        Where.
    """

    inputs: Any
    size: int
    autocast: torch.dtype | None
    device: torch.device

    @classmethod
    def of(cls, inputs: Any, device: torch.device) -> Pass:
        inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        lengths = [len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else None
        return cls(inputs, max(lengths, default=1), dtype, device)

    def cast(self) -> AbstractContextManager[Any]:
        """Compute as the pass was computed."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


class FunctionPenalty:
    """A penalty whose gradient needs a backward pass of its own."""

    _needs_inputs: ClassVar[bool] = False
    """Whether the penalty depends on the inputs of a step."""

    _looks_at_data: ClassVar[bool] = False
    """Whether it depends on any data, which differ between processes."""

    def __init__(self, model: nn.Module, strength: float | None) -> None:
        self._group: Any = None
        if isinstance(model, DistributedDataParallel):
            self._group, model = model.process_group, model.module
        self.model = model
        self.strength = strength
        self._heads: list[range] = []
        self._n_tasks = 0
        self._passes: list[Pass] = []
        self._is_used = self._acting = False
        self._say = Once()

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
        self,
        optimizer: torch.optim.Optimizer,
        form: Literal["gradient"] = "gradient",
        *,
        metric: None = None,
    ) -> Attachment:
        """Add the gradient of the penalty before every step of an optimizer, from now on.

        The training loop stays as it is without a penalty, and only ``consolidate`` is left to
        call. Where the penalty needs the inputs of a step, they are those of the forward passes
        in training mode since the step before, or since the gradients were cleared: under
        gradient accumulation there are several, and the penalty is their mean, each observation
        with the same weight.

        Parameters
        ----------
        optimizer
            Any of ``torch.optim``, or in a wrapper that keeps it as ``optimizer``.
        form, metric
            There is no proximal step, and so no metric, because the penalty is no quadratic form.

        Returns
        -------
        Attachment
            ``remove()`` ends it, and so does the end of a ``with`` block.

        Raises
        ------
        TypeError
            If it is no optimizer of PyTorch.
        ValueError
            If this penalty is attached to it already, if it holds none of the parameters, or if
            a gradient does not go with it (:class:`ewc_lib.attaching.Attachment`).
        """
        check_choice("form", form, ("gradient",), f"; {type(self).__name__} has no proximal step")
        if metric is not None:
            raise ValueError(
                f"{type(self).__name__} has no proximal step, so there is no metric to choose: its "
                "gradient is added to that of the loss"
            )
        parameters = dict(self.model.named_parameters())
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if self._looks_at_data and self._group is None and not alone:
            raise ValueError(
                f"{type(self).__name__} looks at other data in each process, so its gradient has "
                "to be averaged: make it with the model that DistributedDataParallel returns"
            )
        attachment = Attachment(self, optimizer, form, parameters)
        if self._needs_inputs:
            watch_inputs(self.model, optimizer, self._saw)
        return attachment

    def _saw(self, inputs: Any) -> None:
        """Note the inputs of a forward pass in training; the first of a step forgets the others."""
        if self._n_tasks == 0 or self._acting:
            return
        if self._is_used or all(p.grad is None for p in self.model.parameters()):
            self._passes = []
        self._is_used = False
        self._passes.append(Pass.of(inputs, self._device))

    def _reads_gradients(self, form: Form) -> bool:
        return True

    def _note_before(self, optimizer: torch.optim.Optimizer) -> None:
        """Have nothing to note: the inputs were."""

    def _pull(self, optimizer: torch.optim.Optimizer) -> None:
        if self._n_tasks:
            own = own_parameters(optimizer)
            self._each_pass(optimizer, lambda share: self._add_gradient(share, own))

    def _value(self) -> Tensor:
        values: list[Tensor] = []
        with torch.no_grad():
            self._each_pass(None, lambda share: values.append(share * self._weighted()))
        return torch.stack(values).sum()

    def _each_pass(self, optimizer: Any, act: Callable[[float], None]) -> None:
        """Do something for each pass of this step, with its share of the observations."""
        if not self._needs_inputs:
            if optimizer is not None:
                self.before_step()
            act(1.0)
            return
        if self._n_tasks and not self._passes:
            raise ValueError(
                f"{type(self).__name__} has not seen what the model was called with: it looks at "
                "forward passes in training mode of the model that it was made for, and of one "
                "that is compiled only if it was attached before the first of them"
            )
        self._is_used = True
        total = sum(one.size for one in self._passes)
        for one in self._passes:
            with one.cast():
                self.before_step(one.inputs)
                act(one.size / total)

    def _go(self, optimizer: torch.optim.Optimizer, metric: Metric) -> None:
        raise NotImplementedError  # there is no such form

    def _note_after(self) -> None:
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
        value = self._weighted()
        return warn_if_used_twice(self._say, value) if is_attached(self) else value

    def _weighted(self) -> Float[Tensor, ""]:
        """Return the penalty with its strength."""
        if self._n_tasks == 0:
            return torch.zeros((), device=self._device)
        weight = self._n_tasks if self.strength is None else self.strength
        self._acting = True
        try:
            return weight * self._loss()
        finally:
            self._acting = False

    def add_gradient_(self) -> None:
        """Add the gradient of :meth:`penalty` to ``.grad`` of the trainable parameters."""
        if is_attached(self):
            warn_of_twice(self._say)
        self._add_gradient(1.0, None)

    def _add_gradient(self, share: float, own: set[int] | None) -> None:
        """Add a share of the gradient, in some parameters by their identities or in all."""
        with torch.inference_mode(False), torch.enable_grad():
            penalty = share * self._weighted()
            trainable = [
                p
                for p in self.model.parameters()
                if p.requires_grad and (own is None or id(p) in own)
            ]
            if penalty.requires_grad and trainable:
                found = torch.autograd.grad(penalty, trainable, allow_unused=True)
                accumulate_(trainable, self._over_processes(found))

    def _over_processes(self, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Average over processes that train one model: each has looked at data of its own."""
        if self._group is not None:
            for gradient in gradients:
                if gradient is not None:
                    dist.all_reduce(gradient, group=self._group)
                    gradient /= dist.get_world_size(self._group)
        return list(gradients)

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


def no_step() -> ValueError:
    """Return the error of a penalty that has nothing to be computed from."""
    return ValueError("call before_step(inputs) before the penalty of a step")
