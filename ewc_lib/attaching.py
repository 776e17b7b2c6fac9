r"""A regularizer on the hooks of an optimizer, so that a training loop stays as it is.

Every loop and every trainer ends in ``optimizer.step()``. What happens around that step is said
here once: under accumulation there is one step for several backward passes; a gradient scaler has
taken its scale off the gradients before it, and leaves it out when one of them overflows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ewc_lib._arguments import check_choice

__all__ = ["Attachment", "Form"]

Form: TypeAlias = Literal["proximal", "gradient"]
"""A proximal step after the optimizer's, or a gradient that is added before it."""


class Stepping(Protocol):
    """What is attached: it knows what to do around the step of an optimizer."""

    def _before(self, optimizer: Optimizer, form: Form) -> None:
        """Note what is needed, and add the gradient if that is the form."""
        ...

    def _after(self, optimizer: Optimizer, form: Form) -> None:
        """Make the proximal step if that is the form, and note what is needed."""
        ...

    def penalty(self) -> Tensor: ...


class Attachment:
    """A regularizer that acts in every step of an optimizer, until it is removed.

    ``regularizer.attach(optimizer)`` returns one. It ends by :meth:`remove`, at the end of a
    ``with`` block, or with the optimizer. Neither is part of a state or of a copy of the
    optimizer.

    Parameters
    ----------
    regularizer
        What acts.
    optimizer
        Whose steps it acts in; one inside of a wrapper, as accelerate's, is found.
    form
        How.
    parameters
        Those that the regularizer may hold.
    *others
        What else is to be stopped when it is removed.

    Raises
    ------
    TypeError
        If it is no optimizer of PyTorch.
    ValueError
        If the regularizer is attached to this optimizer already, if the optimizer has none of the
        parameters, or if it cannot have a proximal step: LBFGS remembers how its own steps
        changed the gradient, and other optimizers may have no learning rate.
    """

    def __init__(
        self,
        regularizer: Stepping,
        optimizer: Optimizer,
        form: Form,
        parameters: Mapping[str, Tensor],
        *others: Callable[[], None],
    ) -> None:
        check_choice("form", form, ("proximal", "gradient"))
        optimizer = unwrapped(optimizer)
        if form == "proximal":
            _check_rates(optimizer)
        name = type(regularizer).__name__
        if any(one.regularizer is regularizer for one in attachments(optimizer)):
            raise ValueError(f"this {name} is attached to this optimizer already")
        if parameters and own_parameters(optimizer).isdisjoint(map(id, parameters.values())):
            raise ValueError(
                f"the optimizer holds none of the parameters that this {name} may hold: was it "
                "made for another model, or before the model was copied?"
            )
        self.regularizer: Stepping = regularizer
        self.form: Form = form
        self._optimizer = ref(optimizer)
        self._stop = [
            optimizer.register_step_pre_hook(self._before).remove,
            optimizer.register_step_post_hook(self._after).remove,
            *others,
        ]

    def __repr__(self) -> str:
        on = type(self.optimizer).__name__ if self.optimizer else None
        return f"Attachment({self.regularizer!r}, {on}, form={self.form!r})"

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it is there."""
        return self._optimizer()

    def remove(self) -> None:
        """Let the optimizer make its steps alone; it does no harm to call this twice."""
        for stop in self._stop:
            stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure, give = _closure(args, kwargs)
        if closure is None:
            self._prepare(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            self._prepare(optimizer)
            if loss is not None and self.form == "gradient" and isinstance(optimizer, LBFGS):
                return loss + self.regularizer.penalty().detach()  # a line search compares it
            return loss

        return give(with_penalty)

    def _prepare(self, optimizer: Optimizer) -> None:
        _unscale(optimizer)
        if not _is_skipped(optimizer):
            self.regularizer._before(optimizer, self.form)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not _is_skipped(optimizer):
            self.regularizer._after(optimizer, self.form)


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer of PyTorch whose ``step`` is called in the end."""
    inner = optimizer
    while (found := getattr(inner, "optimizer", None)) is not None and found is not inner:
        inner = found
    if not isinstance(inner, Optimizer):
        raise TypeError(f"expected an optimizer of torch.optim, got {type(optimizer).__name__}")
    return inner


def attachments(optimizer: Optimizer) -> Iterator[Attachment]:
    """Yield what is attached to an optimizer."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(one := getattr(hook, "__self__", None), Attachment):
            yield one


def own_parameters(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def watch_inputs(model: nn.Module, seen: Callable[[Any], None]) -> Callable[[], None]:
    """Call a function with the inputs of each training pass, and return how to stop that."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            seen(_inputs(module, args, kwargs))

    return model.register_forward_pre_hook(note, with_kwargs=True).remove


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a model was called with, by position or by name."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return kwargs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _check_rates(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS remembers how its own steps changed the gradient, and a proximal step would "
            "move the parameters in between: use form='gradient'"
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"a proximal step needs the learning rate, and this {name} has none: use "
            "form='gradient', or give the optimizer a rate"
        )


def _closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Any] | None, Callable[[Any], tuple[Any, Any]]]:
    """Return the closure of a step, and how to give it another one."""
    if len(args) > 1:  # the first is the optimizer
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    return kwargs.get("closure"), lambda new: (args, {**kwargs, "closure": new})


def _unscale(optimizer: Optimizer) -> None:
    """Take the scale off the gradients, where the optimizer would do that itself.

    Kernels that are fused into one get the scale of a gradient scaler with the step.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for device in {g.device for g in gradients}:
        torch._foreach_div_([g for g in gradients if g.device == device], scale.to(device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _is_skipped(optimizer: Optimizer) -> bool:
    """Tell whether a fused kernel leaves this step out, since a gradient has overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
