r"""A regularizer on the hooks of an optimizer, so that a training loop stays as it is.

Every loop and every trainer ends in ``optimizer.step()``. What happens around that step is said
here once: under accumulation there is one step for several backward passes; a gradient scaler has
taken its scale off the gradients before it, and leaves it out when one of them overflows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from ewc_lib._arguments import check_choice

__all__ = ["Attachment", "Form", "Metric"]

Form: TypeAlias = Literal["proximal", "gradient"]
"""A proximal step after the optimizer's, or a gradient that is added before it."""

Metric: TypeAlias = Literal["optimizer", "euclidean"]
"""Of a proximal step: distances as the optimizer's own steps measure them, or alike for all."""

METRICS = "optimizer", "euclidean"

LIVE: WeakSet[Attachment] = WeakSet()
"""All attachments that there are, so that a regularizer can tell whether it has one."""

INNER = "optimizer", "base_optimizer", "optim"
"""Where wrappers keep the optimizer that makes the step."""


class Stepping(Protocol):
    """What is attached: it knows what to do around the step of an optimizer.

    It acts on the parameters that this optimizer holds, and on no others.
    """

    def _reads_gradients(self, form: Form) -> bool:
        """Whether the gradients have to be those of the loss, without a scale."""
        ...

    def _note_before(self, optimizer: Optimizer) -> None:
        """Note what is needed, while the gradients are those of the loss alone."""
        ...

    def _pull(self, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty."""
        ...

    def _go(self, optimizer: Optimizer, metric: Metric) -> None:
        """Make the proximal step."""
        ...

    def _note_after(self) -> None:
        """Note what is needed, when all have moved the parameters."""
        ...

    def _value(self) -> Tensor:
        """Return the penalty whose gradient was added."""
        ...


class Attachment:
    """A regularizer that acts in every step of an optimizer, until it is removed.

    ``regularizer.attach(optimizer)`` returns one. It ends by :meth:`remove`, at the end of a
    ``with`` block, or with the optimizer. It is no part of a state or of a copy of the optimizer.

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
    metric
        Of a proximal step.

    Raises
    ------
    TypeError
        If it is no optimizer of PyTorch.
    ValueError
        If the regularizer is attached to this optimizer already, if the optimizer has none of the
        parameters, or if it cannot have a gradient added: it goes up instead of down, or wants
        sparse gradients only.
    """

    def __init__(
        self,
        regularizer: Stepping,
        optimizer: Optimizer,
        form: Form,
        parameters: Mapping[str, Tensor],
        metric: Metric = "optimizer",
    ) -> None:
        check_choice("form", form, ("proximal", "gradient"))
        check_choice("metric", metric, METRICS)
        optimizer = unwrapped(optimizer)
        if form == "gradient":
            _check_takes_gradient(optimizer)
        name = type(regularizer).__name__
        others = attachments(optimizer)
        if any(one.regularizer is regularizer for one in others):
            raise ValueError(f"this {name} is attached to this optimizer already")
        if parameters and own_parameters(optimizer).isdisjoint(map(id, parameters.values())):
            raise ValueError(
                f"the optimizer holds none of the parameters that this {name} may hold: was it "
                "made for another model, or before the model was copied?"
            )
        self.regularizer: Stepping = regularizer
        self.form: Form = form
        self.metric: Metric = metric
        self._optimizer = ref(optimizer)
        self._entered = 0
        _steps_of(optimizer).attached.append(self)
        LIVE.add(self)

    def __repr__(self) -> str:
        on = type(self.optimizer).__name__ if self.optimizer else None
        return f"Attachment({self.regularizer!r}, {on}, form={self.form!r})"

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it is there."""
        return self._optimizer()

    def remove(self) -> None:
        """Let the optimizer make its steps alone; it does no harm to call this twice."""
        optimizer = self.optimizer
        if optimizer is not None and self in attachments(optimizer):
            steps = _steps_of(optimizer)
            steps.attached.remove(self)
            if not steps.attached:
                steps.stop()

    def __enter__(self) -> Self:
        optimizer = self.optimizer
        if optimizer is None or self not in attachments(optimizer):
            raise ValueError("this attachment was removed: attach the regularizer again")
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self.remove()

    def __reduce__(self) -> Any:
        raise TypeError("an attachment belongs to one optimizer and is not copied: attach again")


class _Steps:
    """Calls all that is attached to an optimizer, in two rounds before and two after its step.

    So what one notes does not depend on what another one adds.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.attached: list[Attachment] = []
        before = optimizer.register_step_pre_hook(self.before)
        after = optimizer.register_step_post_hook(self.after)
        self._handles = before, after
        self._is_left_out = False

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if _is_within_another(optimizer):
            return None
        self._is_left_out = False
        closure, give = _closure(args, kwargs)
        if closure is None:
            self._prepare(optimizer, kwargs)
            return None

        def with_penalty() -> Any:
            loss = closure()
            self._prepare(optimizer, kwargs)
            if loss is not None and isinstance(optimizer, LBFGS):  # whose line search compares it
                return loss + sum(one.regularizer._value() for one in self.attached)
            return loss

        return give(with_penalty)

    def _prepare(self, optimizer: Optimizer, kwargs: Any) -> None:
        if kwargs.get("grad_scaler") is not None:
            raise ValueError(
                f"{type(optimizer).__name__} takes the scale off the gradients by itself: call "
                "scaler.unscale_(optimizer) and optimizer.step() instead of scaler.step(optimizer)"
            )
        self._is_left_out = _is_left_out(optimizer)
        if self._is_left_out:
            return
        if any(one.regularizer._reads_gradients(one.form) for one in self.attached):
            _unscale(optimizer)
        for one in self.attached:
            one.regularizer._note_before(optimizer)
        for one in self.attached:
            if one.form == "gradient":
                one.regularizer._pull(optimizer)

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_left_out or _is_within_another(optimizer):
            return
        for one in self.attached:
            if one.form == "proximal":
                one.regularizer._go(optimizer, one.metric)
        for one in self.attached:
            one.regularizer._note_after()


def inner_of(optimizer: Any) -> Any:
    """Return what is inside of all wrappers."""
    inner, seen = optimizer, {id(optimizer)}
    while (found := _inner(inner)) is not None and id(found) not in seen:
        inner = found
        seen.add(id(inner))
    return inner


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer of PyTorch whose ``step`` is called in the end."""
    inner = inner_of(optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"expected an optimizer of torch.optim, got {type(optimizer).__name__}")
    return inner


def _inner(outer: Any) -> Any:
    """Return what a wrapper keeps; one with hooks of its own may have an ``optim`` as a part."""
    names = INNER[:2] if hasattr(outer, "_optimizer_step_post_hooks") else INNER
    parts = (getattr(outer, name, None) for name in names)
    found = [p for p in parts if isinstance(p, Optimizer) or any(hasattr(p, n) for n in INNER)]
    return found[0] if found else None


def attachments(optimizer: Optimizer) -> list[Attachment]:
    """Return what is attached to an optimizer."""
    found = _steps(optimizer)
    return [] if found is None else found.attached


def is_attached(regularizer: Stepping, to: Any = None) -> bool:
    """Tell whether a regularizer acts in the steps of an optimizer, by default of any.

    A compiled step does not look.
    """
    if torch.compiler.is_compiling():
        return False
    mine = [one for one in LIVE if one.regularizer is regularizer]
    found = [one.optimizer for one in mine if one.optimizer and one in attachments(one.optimizer)]
    return bool(found) if to is None else any(one is inner_of(to) for one in found)


def _steps(optimizer: Optimizer) -> _Steps | None:
    hooks = optimizer._optimizer_step_post_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((one for one in owners if isinstance(one, _Steps)), None)


def _steps_of(optimizer: Optimizer) -> _Steps:
    return _steps(optimizer) or _Steps(optimizer)


def own_parameters(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class InputWatch:
    """A hook of a model that notes what it is called with in training.

    It belongs to one model: a copy of the model, or one that was stored, notes nothing.
    """

    def __init__(self, model: nn.Module, seen: Callable[[Any], None]) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self._model, self.seen = ref(model), seen
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model():
            return
        if not any(self._is_asked(optimizer) for optimizer in self.optimizers):
            self._handle.remove()
        elif module.training and torch.is_grad_enabled() and not _is_transformed():
            self.seen(_inputs(module, args, kwargs))

    def _is_asked(self, optimizer: Optimizer) -> bool:
        owner = getattr(self.seen, "__self__", None)
        return any(one.regularizer is owner for one in attachments(optimizer))

    def __reduce__(self) -> Any:
        return _nothing_to_note, ()


def _nothing_to_note() -> Callable[..., None]:
    return _note_nothing


def _note_nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take the place of the hook in a copy."""


def watch_inputs(model: nn.Module, optimizer: Any, seen: Callable[[Any], None]) -> None:
    """Call a method with the inputs of each training pass, as long as it is attached."""
    watches = [h for h in model._forward_pre_hooks.values() if isinstance(h, InputWatch)]
    watch = next((w for w in watches if w.seen == seen), None) or InputWatch(model, seen)
    watch.optimizers.add(unwrapped(optimizer))


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a model was called with, by position or by name."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return kwargs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _is_transformed() -> bool:
    found: bool = torch._C._are_functorch_transforms_active()
    return found


def _check_takes_gradient(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(f"this {name} goes up, and would go up the penalty as well")
    if isinstance(optimizer, SparseAdam):
        raise ValueError(f"{name} takes no dense gradient, as that of a penalty is")


def _closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Any] | None, Callable[[Any], tuple[Any, Any]]]:
    """Return the closure of a step, and how to give it another one."""
    if len(args) > 1:  # the first is the optimizer
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    return kwargs.get("closure"), lambda new: (args, {**kwargs, "closure": new})


def _is_within_another(optimizer: Optimizer) -> bool:
    """Tell whether a step was called by the step of a class that extends it, with hooks, too."""
    steps = [vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls)]
    codes = {step.__code__ for step in steps if getattr(step, "hooked", False)}
    if sum(getattr(step, "hooked", False) for step in steps) < 2:
        return False
    frame, found = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        found += frame.f_code in codes and frame.f_locals.get("self") is optimizer
    return found > 1


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


def _is_left_out(optimizer: Optimizer) -> bool:
    """Tell whether a fused kernel leaves this step out, since a gradient has overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def accumulate_(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    """Add gradients to those that there are, as a backward pass does, without its hooks."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.detach().clone()
            else:
                parameter.grad += gradient.to(parameter.grad.dtype)
