r"""A quadratic that holds parameters near where they were.

.. math:: \Omega(\theta) = \frac{\lambda}{2}
          \left[ (\theta - m)^\top A\, (\theta - m) + c \right]

It has three parts: an *anchor* :math:`m` (the parameters to stay near), a *precision* :math:`A`
(how much each matters) and a *strength* :math:`\lambda`. Elastic weight consolidation takes the
Fisher information for the precision; other methods take other importances and share the rest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._anchored import (
    Sweep,
    add_pull_,
    check_held,
    displacement,
    go_,
    in_layout_of,
    shares,
    squared_distance,
)
from ewc_lib._arguments import check_strength
from ewc_lib._foreach import each
from ewc_lib._parameters import Vector
from ewc_lib._selecting import Chooser, Selection, fixed
from ewc_lib.attaching import Attachment, Form
from ewc_lib.fisher.structures import Diagonal, Fisher, check_shapes
from ewc_lib.fisher.structures.states import decode, encode, under

__all__ = ["QuadraticPenalty"]


class QuadraticPenalty:
    r"""The penalty that all methods with an anchor and a precision share.

    .. math:: \Omega(\theta) = \frac{\lambda}{2}
              \left[ (\theta - m)^\top A\, (\theta - m) + c \right]

    This class knows what to do with the three parts in a training step. Where the precision
    comes from, and when, is the business of its subclasses: :class:`ewc_lib.EWC` and those of
    :mod:`ewc_lib.regularizers`. A training step calls, in this order, ``loss.backward()``,
    :meth:`before_step`, :meth:`add_gradient_`, ``optimizer.step()``, :meth:`after_step`; or
    :meth:`proximal_step_` after the optimizer's step instead of :meth:`add_gradient_` before it.

    With a diagonal precision each of the three is a few operations for all parameters of a dtype,
    however many there are. ``torch.compile`` makes one graph of each, but for a proximal step
    that has to find eigenvectors first.

    Parameters
    ----------
    model
        The network that is being trained.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations.
    params
        The parameters to hold, as in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, or if ``params`` chooses nothing.
    """

    def __init__(self, model: nn.Module, strength: float, *, params: Selection = None) -> None:
        self.model = model
        self.strength = strength
        self.params = fixed(model, params)
        self._choose = Chooser()
        self._precision: Fisher | None = None
        self._anchor: Vector = {}
        self._offset = torch.zeros(())
        self._n_tasks = 0
        self._kept_held: tuple[Any, ...] = (None,) * 5
        self._kept_shares: tuple[Fisher | None, Any, Vector] = None, None, {}
        self._kept_scaled: tuple[Fisher, float, Fisher] | None = None
        self._parameters()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        return f"{type(self).__name__}({shown})"

    def _shown(self) -> dict[str, Any]:
        """Return what tells this penalty from others of its class."""
        return {
            "strength": self.strength,
            "n_tasks": self.n_tasks,
            "structure": self._structure,
        }

    @property
    def strength(self) -> float:
        r"""The factor :math:`\lambda`; it may be changed at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_strength(value)
        self._strength = float(value)

    @property
    def precision(self) -> Fisher | None:
        """The merged importance of all tasks so far; None before the first."""
        return self._precision

    @property
    def anchor(self) -> Vector:
        """The parameters where the penalty is smallest; empty before the first task."""
        return dict(self._anchor)

    @property
    def n_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._n_tasks

    def penalty(self) -> Float[Tensor, ""]:
        r"""Return :math:`\Omega(\theta)` at the model's parameters, differentiable.

        It is zero before the first task. Add it to the loss. Autograd then adds its gradient to
        that of the loss one parameter after the other; :meth:`add_gradient_` is faster.

        Raises
        ------
        ValueError
            If the parameters no longer have the names and shapes of the consolidated ones, or
            do not require grad any more, or have no values.
        """
        if self._precision is None:
            return torch.zeros((), device=next(self.model.parameters()).device)
        parameters, _ = self._held()
        assert self._precision is not None
        with self._uncast():
            distance = squared_distance(self._precision, self._anchor, parameters)
        return 0.5 * self.strength * (distance + self._offset)

    @torch.no_grad()
    def add_gradient_(self) -> None:
        r"""Add the gradient of the penalty, :math:`\lambda A (\theta - m)`, to ``.grad``.

        Call it after ``loss.backward()``. It equals putting :meth:`penalty` into the loss and
        builds no graph. A sparse gradient becomes dense, as it would there. With a gradient
        scaler, ``scaler.unscale_(optimizer)`` comes first.
        """
        if self._precision is None:
            return
        parameters, sweep = self._held()
        assert self._precision is not None
        if sweep is None or not sweep.add_pull_(self.strength):
            with self._uncast():
                add_pull_(self._precision, self._anchor, parameters, self.strength)

    @torch.no_grad()
    def proximal_step_(self, optimizer: torch.optim.Optimizer) -> None:
        r"""Minimise the penalty plus the distance from where the optimizer has gone.

        .. math:: \theta \leftarrow (I + \eta \lambda A)^{-1} (\theta + \eta \lambda A\, m)

        This is :eq:`eq-proximal-step`, with the learning rate :math:`\eta` of each parameter
        group. Call it after ``optimizer.step()``, and do not add the penalty to the loss or its
        gradient. To first order in :math:`\eta \lambda` it is the gradient step of plain SGD.
        But it is stable for every strength, where a gradient step diverges once
        :math:`\eta \lambda A_i > 2`. And an adaptive optimizer such as Adam does not rescale
        it, as AdamW does not rescale weight decay (Loshchilov and Hutter 2019). With momentum
        :math:`\mu`, the gradient of the loss accumulates and the penalty does not: for the same
        balance multiply the strength by :math:`1/(1-\mu)`.

        Parameters
        ----------
        optimizer
            It has to hold all the parameters that the penalty holds.

        Raises
        ------
        ValueError
            If the optimizer lacks one of the parameters, or if its learning rates differ and
            the precision is not diagonal.

        References
        ----------
        Parikh and Boyd 2014, section 4.2: the proximal gradient method.
        """
        if self._precision is None or self.strength == 0:
            return
        parameters, sweep = self._held()
        rates = _rates(optimizer, parameters)
        if isinstance(self._precision, Diagonal):
            found = self._shares(self._precision, rates)
            if sweep is None:
                go_(parameters, self._anchor, found)
            else:
                sweep.go_([found[name] for name in parameters])
            return
        if len(distinct := set(rates.values())) > 1:
            raise ValueError(
                f"the optimizer has the learning rates {sorted(distinct)}; a proximal step with "
                f"a precision that is not diagonal needs a single one"
            )
        with self._uncast():
            scaled = self._scaled(distinct.pop() * self.strength)
            left = scaled.solve(displacement(parameters, self._anchor), damping=1.0)
        each("copy_", parameters, each("add", self._anchor, left))

    def attach(self, optimizer: torch.optim.Optimizer, form: Form = "proximal") -> Attachment:
        r"""Act in every step of an optimizer from now on, so that the training loop stays as it is.

        The loop calls ``loss.backward()`` and ``optimizer.step()`` as it does without a penalty;
        of the methods of this class only ``consolidate`` is left to call. What happens around
        the step is right where the calls by hand have to be placed with care: once a step under
        gradient accumulation; after a gradient scaler has taken its scale off, and not at all in
        a step that it leaves out; with the learning rate that a scheduler has set for this step;
        within the closure of a step that has one. Clipping, which comes before the step, clips
        the gradient of the loss alone.

        Parameters
        ----------
        optimizer
            Any of ``torch.optim``, or in a wrapper that keeps it as ``optimizer``. With several,
            attach to each.
        form
            ``"proximal"``: :meth:`proximal_step_` after the step, stable for every strength and
            not rescaled by an adaptive optimizer. ``"gradient"``: :meth:`add_gradient_` before
            it, as if the penalty were part of the loss.

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
            it has no learning rate for a proximal step; LBFGS takes the gradient only.

        Examples
        --------
        >>> import torch
        >>> from ewc_lib import EWC
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ewc = EWC(model, strength=1e9)
        >>> F, before = ewc.consolidate((x, y)), model.weight.detach().clone()
        >>> with ewc.attach(optimizer):
        ...     torch.nn.functional.cross_entropy(model(x), 1 - y).backward()
        ...     optimizer.step()
        >>> torch.allclose(model.weight, before, atol=1e-5)  # so strong that nothing moves
        True
        """
        return Attachment(self, optimizer, form, self._parameters())

    def _before(self, optimizer: torch.optim.Optimizer, form: Form) -> None:
        self.before_step()
        if form == "gradient":
            self.add_gradient_()

    def _after(self, optimizer: torch.optim.Optimizer, form: Form) -> None:
        if form == "proximal":
            self.proximal_step_(optimizer)
        self.after_step()

    def before_task(self) -> None:
        """Begin a task, at the parameters that the model has now."""

    def before_step(self, inputs: Any = None) -> None:
        """Note what the method needs from a training step, before the optimizer's step.

        Parameters
        ----------
        inputs
            The inputs of this step. ``.grad`` holds the gradient of the loss of the task alone.
        """

    def after_step(self) -> None:
        """Note what the method needs from a training step, after the optimizer's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return precision, anchor and counts as plain tensors.

        ``torch.save`` and safetensors can store them. The strength and the other arguments are
        settings, not state: give them to the constructor again.
        """
        state = {
            "n_tasks": torch.tensor(self._n_tasks),
            "offset": self._offset.clone(),
            "structure": encode(self._structure),
            **{f"anchor.{k}": v.clone().contiguous() for k, v in self._anchor.items()},
        }
        if self._precision is not None:
            precision = self._precision.state_dict()
            state |= {f"precision.{key}": value for key, value in precision.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        Raises
        ------
        ValueError
            If it is not such a state, if it is of another structure, or if its parameters have
            other names or shapes than the model's. Nothing has changed then.
        """
        name = type(self).__name__
        if missing := {"n_tasks", "offset"} - state.keys():
            raise ValueError(f"this is not the state of {name}: it has no {sorted(missing)}")
        device = next(self.model.parameters()).device
        anchor = {k: v.to(device, copy=True) for k, v in under("anchor.", state).items()}
        precision = None
        if int(state["n_tasks"]) > 0:
            precision = Fisher.from_state_dict(under("precision.", state)).to(device)
            by_type = encode(type(precision).__name__.lower())  # of states without this key
            if (structure := decode(state.get("structure", by_type))) != self._structure:
                raise ValueError(f"the state is {structure}, but this {name} is {self._structure}")
            shapes = {name: p.shape for name, p in self._parameters().items()}
            check_shapes(shapes, {name: value.shape for name, value in anchor.items()})
            check_shapes(shapes, precision.shapes)
        self._keep(precision, anchor)
        self._offset = state["offset"].to(device, copy=True)
        self._n_tasks = int(state["n_tasks"])

    @property
    def _structure(self) -> str:
        """What a state must agree on."""
        return "diagonal"

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._choose(self.model, self.params)

    def _shares(self, precision: Diagonal, rates: dict[str, float]) -> Vector:
        """Return how far to go towards the anchor; they stay the same from step to step."""
        if torch.compiler.is_compiling():  # what is fused into the step costs less than to keep it
            return shares(precision, self._anchor, self.strength, rates)
        known, settings, found = self._kept_shares
        if known is not precision or settings != (self.strength, rates):
            found = shares(precision, self._anchor, self.strength, rates)
            self._kept_shares = precision, (self.strength, rates), found
        return found

    def _scaled(self, factor: float) -> Fisher:
        """Return the precision times a number; it stays the same, with its eigenvectors."""
        assert self._precision is not None
        kept = self._kept_scaled
        if kept is None or kept[0] is not self._precision or kept[1] != factor:
            kept = self._kept_scaled = self._precision, factor, factor * self._precision
        return kept[2]

    def _held(self) -> tuple[dict[str, nn.Parameter], Sweep | None]:
        """Return the parameters, after everything else has followed them, and all side by side.

        Raise a ValueError if they are others than those of the anchor.
        """
        parameters = self._parameters()
        forms = [(p.shape, p.dtype, p.device) for p in parameters.values()]
        *held, forms_then, sweep = self._kept_held
        now = parameters, self._anchor, self._precision
        if forms == forms_then and all(map(is_, held, now)):
            return parameters, sweep
        check_held(self.model, parameters, self._anchor)
        self._follow(next(iter(parameters.values())).device)
        if torch.compiler.is_compiling() or not isinstance(self._precision, Diagonal):
            return parameters, None
        sweep = Sweep.of(parameters, self._anchor, self._precision.values)
        self._kept_held = parameters, self._anchor, self._precision, forms, sweep
        return parameters, sweep

    def _uncast(self) -> AbstractContextManager[Any]:
        """Let no region of autocast round a product with a matrix."""
        if isinstance(self._precision, Diagonal):
            return nullcontext()
        return torch.autocast(self._offset.device.type, enabled=False)

    def _follow(self, device: torch.device) -> None:
        """Move everything to where the model has gone."""
        if self._precision is not None and self._offset.device != device:
            self._precision = self._precision.to(device)
            self._anchor = {name: value.to(device) for name, value in self._anchor.items()}
            self._offset = self._offset.to(device)

    def _optimum(self, precision: Fisher) -> Vector:
        """Copy the present parameters, where a precision is and in its dtypes."""
        like, found = precision.diagonal(), {}
        for name, parameter in self._parameters().items():
            device, dtype = like[name].device, like[name].dtype
            dtype = dtype.to_complex() if parameter.is_complex() else dtype
            found[name] = parameter.detach().to(device, dtype, copy=True)
        return found

    def _merge(self, precision: Fisher) -> None:
        r"""Add the quadratic of one more task around the present parameters, exactly.

        The sum of two quadratics is one quadratic (:eq:`eq-ewc-merge`), with :math:`A + F`,
        the centre :math:`m' = m + (A + F)^{-1} F (t - m)` and a constant.
        """
        optimum = self._optimum(precision)
        if self._precision is None:
            self._replace(precision)
            return
        self._follow(precision.device)
        old, anchor = self._precision, self._anchor
        merged = old + precision
        shift = merged.solve(precision @ each("sub", optimum, anchor))
        centre = each("add", anchor, shift)
        self._offset = (
            self._offset
            + old.quadratic(each("sub", centre, anchor))
            + precision.quadratic(each("sub", optimum, centre))
        )
        self._keep(merged, centre)
        self._n_tasks += 1

    def _replace(self, precision: Fisher) -> None:
        """Take this precision around the present parameters instead of what was there."""
        self._keep(precision, self._optimum(precision))
        self._offset = precision.trace().new_zeros(())
        self._n_tasks += 1

    def _keep(self, precision: Fisher | None, anchor: Vector) -> None:
        """Keep both in the memory layout of the parameters, so that one sweep takes all."""
        if isinstance(precision, Diagonal):
            parameters = self._parameters()
            anchor = in_layout_of(parameters, anchor)
            precision = replace(precision, values=in_layout_of(parameters, precision.values))
        self._precision, self._anchor = precision, anchor
        self._kept_held, self._kept_shares = (None,) * 5, (None, None, {})  # free what was held


def _rates(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, float]:
    """Return the learning rate of each parameter."""
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    if lost := [name for name, p in parameters.items() if id(p) not in rates]:
        raise ValueError(f"the optimizer does not hold the parameters {lost}")
    return {name: float(rates[id(p)]) for name, p in parameters.items()}
