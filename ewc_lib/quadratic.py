r"""A quadratic that holds parameters near where they were.

.. math:: \Omega(\theta) = \frac{\lambda}{2}
          \left[ (\theta - m)^\top A\, (\theta - m) + c \right]

It has three parts: an *anchor* :math:`m` (the parameters to stay near), a *precision* :math:`A`
(how much each matters) and a *strength* :math:`\lambda`. Elastic weight consolidation takes the
Fisher information for the precision; other methods take other importances and share the rest.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import check_choice, check_strength
from ewc_lib._foreach import within_range
from ewc_lib._held import Held, grown_from, held_ones
from ewc_lib._kept import Kept
from ewc_lib._metric import rates_of, scale_of
from ewc_lib._misuse import (
    warn_if_used_twice,
    warn_of_rates,
    warn_of_replaced,
    warn_of_twice,
    warn_of_unfrozen,
)
from ewc_lib._multiplier import MOST
from ewc_lib._selecting import Selection
from ewc_lib._sharded import whole
from ewc_lib._states import (
    Loader,
    by_plain_names,
    check_chosen,
    check_settings,
    precision_state,
    settings_of,
)
from ewc_lib.attaching import (
    METRICS,
    Attachment,
    Form,
    Metric,
    is_attached,
    own_parameters,
    unwrapped,
)
from ewc_lib.files import card_of_penalty, read, write
from ewc_lib.fisher.structures import Diagonal, check_shapes
from ewc_lib.fisher.structures.states import encode, under

__all__ = ["QuadraticPenalty"]


class QuadraticPenalty(Kept):
    r"""The penalty that all methods with an anchor and a precision share.

    .. math:: \Omega(\theta) = \frac{\lambda}{2}
              \left[ (\theta - m)^\top A\, (\theta - m) + c \right]

    This class knows what to do with the three parts in a training step. Where the precision
    comes from, and when, is the business of its subclasses: :class:`ewc_lib.EWC` and those of
    :mod:`ewc_lib.regularizers`. A training step calls, in this order, ``loss.backward()``,
    :meth:`before_step`, :meth:`add_gradient_`, ``optimizer.step()``, :meth:`after_step`; or
    :meth:`proximal_step_` after the optimizer's step instead of :meth:`add_gradient_` before it.

    The model may change between tasks. A parameter that is frozen is a constant of the penalty,
    and its precision stays; one that is new, or was frozen until now, is free until the next task
    is finished, and held from then on. One that has grown keeps its old entries, the first along
    each axis, and is free in the new ones. One that has gone, or is smaller, raises a ValueError
    until :meth:`forget` drops it. All that is kept goes by the names of the model without
    wrappers such as ``DataParallel``, so a model that is wrapped in between is the same; one that
    ``fully_shard`` distributes in between has the penalty distributed as well.

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

    _budget: float | None = None
    """What may be lost, instead of a strength."""

    def __init__(self, model: nn.Module, strength: float, *, params: Selection = None) -> None:
        self.strength = strength
        self._over_budget, self._largest = False, 0.0
        super().__init__(model, params)

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
        if self._budget is not None:
            raise ValueError("a budget decides the strength: set budget=None before")
        check_strength(value)
        self._strength = float(value)

    def penalty(self) -> Float[Tensor, ""]:
        r"""Return :math:`\Omega(\theta)` at the model's parameters, differentiable.

        It is zero before the first task. Add it to the loss. Autograd then adds its gradient to
        that of the loss one parameter after the other; :meth:`add_gradient_` is faster.

        Raises
        ------
        ValueError
            If the model has a held parameter no more, or a smaller one (:meth:`forget`), or if
            one has no values; or if a budget is kept, which only the proximal step can do.
        """
        self._check_no_budget()
        value = self._penalty(self.strength)
        return warn_if_used_twice(self._say, value) if is_attached(self) else value

    def _penalty(self, strength: float) -> Float[Tensor, ""]:
        if self._precision is None:
            return torch.zeros((), device=next(self.model.parameters()).device)
        held = self._held()
        with self._uncast():
            distance = held.squared_distance()
        distance = distance + self._offset
        return 0.5 * within_range(strength, [distance]) * distance

    def _warn_of_budget(self) -> None:
        """Warn once where no step can keep the budget."""
        if self._strength >= MOST and not self._over_budget:
            self._over_budget = True
            warnings.warn(
                f"the budget of {self._budget:g} nats cannot be kept: what this optimizer does not "
                "move has spent more, or what earlier tasks differ in; the rest is held at its "
                "anchor",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_no_budget(self) -> None:
        if self._budget is not None:
            raise ValueError(
                "a budget is kept by the proximal step alone, as attach(optimizer) makes it; "
                "nats() tells how much of it is used"
            )

    def add_gradient_(self) -> None:
        r"""Add the gradient of the penalty, :math:`\lambda A (\theta - m)`, to ``.grad``.

        Call it after ``loss.backward()``. It equals putting :meth:`penalty` into the loss and
        builds no graph. A sparse gradient becomes dense, as it would there. With a gradient
        scaler, ``scaler.unscale_(optimizer)`` comes first.
        """
        self._check_no_budget()
        if is_attached(self):
            warn_of_twice(self._say)
        self._add_gradient(None)

    def _held_by(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the plain names of what the penalty holds and an optimizer can move."""
        return [] if self._precision is None else self._held().own_of(optimizer)

    @torch.no_grad()
    def _add_gradient(self, names: Collection[str] | None) -> None:
        """Add the gradient to that of some parameters that require grad, None for all."""
        if self._precision is None:
            return
        held = self._held()
        with self._uncast():
            (held if names is None else held.part(names)).add_pull_(self.strength)

    @torch.no_grad()
    def proximal_step_(
        self, optimizer: torch.optim.Optimizer, metric: Metric = "optimizer"
    ) -> None:
        r"""Minimise the penalty plus the distance from where the optimizer has gone.

        .. math:: \theta \leftarrow (I + \lambda S A)^{-1} (\theta + \lambda S A\, m)

        This is :eq:`eq-metric-step`. Call it after ``optimizer.step()``, and do not add the
        penalty to the loss or its gradient. The rates :math:`S` are those of the optimizer's own
        steps, which for a gradient :math:`g` that stays are :math:`-S g`: the learning rate for
        plain SGD, :math:`\eta/(1-\mu)` with momentum :math:`\mu`, and for Adam
        :math:`\eta / (\sqrt{\hat v_i} + \varepsilon)` of each entry. So the strength weighs the
        penalty against the loss as it does in a sum of the two (:prf:ref:`thm-metric`). But the
        step is stable for every strength, where a gradient step diverges once
        :math:`\lambda S_i A_i > 2`. Parameters of half precision move as those of float32 do:
        what is rounded away is kept and added to the next step; the penalty knows of it, and so
        does a state.

        It moves the parameters that this optimizer holds and that require grad; all others are
        constants in it. With several optimizers, call it for each, after its step.

        Parameters
        ----------
        optimizer
            It has to hold at least one of the parameters that the penalty holds. The rates are
            known for SGD, Adam, AdamW, SparseAdam, NAdam, RAdam, Adamax, RMSprop and Adagrad, and
            for classes that extend them. They are the learning rate where it has seen no gradient
            of a parameter, and as long as RAdam does not divide. And so they are for all that
            divide entries where the precision is not diagonal: of weights whose second moments
            are near zero, because the new task has no use for them, a matrix that couples them
            would be free to ask anything.
        metric
            ``"optimizer"``, or ``"euclidean"`` for :math:`S = \eta` whatever the optimizer is:
            :eq:`eq-proximal-step`. An adaptive optimizer then does not rescale the penalty, as
            AdamW does not rescale weight decay (Loshchilov and Hutter 2019), and the strength is
            another one than that in the loss (:prf:ref:`prop-rest`).

        Raises
        ------
        ValueError
            If the optimizer holds none of them, though some require grad; if its rates are not
            known, as those of Rprop, Muon, ASGD, Adadelta and Adafactor, and the metric is not
            euclidean; if it is LBFGS, which remembers how its own steps changed the gradient; if
            the metric is unknown; and as :meth:`penalty`.

        References
        ----------
        Parikh and Boyd 2014, section 4.2: the proximal gradient method. Yun, Lozano and Yang
        2021: that of an adaptive optimizer, in its own metric.
        """
        if is_attached(self, optimizer):
            warn_of_twice(self._say)
        self._step(optimizer, metric, needed=True)

    def _step(self, optimizer: torch.optim.Optimizer, metric: Metric, needed: bool) -> None:
        """Take the proximal step, or raise an error if it is needed and moves nothing."""
        check_choice("metric", metric, METRICS)
        scale_of(optimizer, metric)  # refuses one whose steps have none
        if self._precision is None or (self._budget is None and self.strength == 0):
            return
        held = self._held()
        by_entry = isinstance(self._precision, Diagonal)
        rates = rates_of(optimizer, held.moving, metric, by_entry=by_entry)
        if needed and not rates.numbers:
            _check_holds(optimizer, held)
        if rates.numbers:
            held = held.part(rates.numbers)
            with self._uncast():
                if self._budget is None:
                    held.go_(self.strength, rates)
                else:
                    limit = 2 * self._budget - float(self._offset)
                    self._strength = held.go_within_(limit, rates, self._strength)
                    self._largest = max(self._largest, self._strength)
                    self._warn_of_budget()

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        form: Form = "proximal",
        *,
        metric: Metric = "optimizer",
    ) -> Attachment:
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
            One of ``torch.optim``, or in a wrapper that keeps it as ``optimizer``. With several,
            attach to each: it acts on the parameters of that one.
        form
            ``"proximal"``: :meth:`proximal_step_` after the step, stable for every strength; it
            says of which optimizers. ``"gradient"``: :meth:`add_gradient_` before it, as if the
            penalty were part of the loss.
        metric
            Of the proximal step, as there. A strength is that of the loss with ``"optimizer"`` and
            a diagonal precision. With another structure, as ``"kronecker"``, and an optimizer that
            divides entries, as Adam, it is a euclidean one: for the same effect larger by a factor
            of about one over the size of a gradient, to be searched anew.

        Returns
        -------
        Attachment
            ``remove()`` ends it, and so does the end of a ``with`` block.

        Raises
        ------
        TypeError
            If it is no optimizer of PyTorch.
        ValueError
            If this penalty is attached to it already, if it holds none of the parameters, if the
            form does not go with it (:meth:`proximal_step_`,
            :class:`ewc_lib.attaching.Attachment`), or if a word is unknown.

        Warns
        -----
        RuntimeWarning
            If adapters of peft change what is held, and are not; of parameters that were frozen
            when the last task was finished and are trained now; of layers that are new ones under
            the names of old ones; if the strength is a euclidean one though nothing says so; and
            later, if the penalty is added by hand as well. Each once.

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
        self._check_goes_with(unwrapped(optimizer), form, metric)
        frozen = {n: p for n, p in self._choose.every(self.model).items() if not p.requires_grad}
        made = Attachment(self, optimizer, form, {**self._parameters(), **frozen}, metric)
        self._warn_of(unwrapped(optimizer), form == "proximal" and metric == "optimizer")
        return made

    def _warn_of(self, optimizer: torch.optim.Optimizer, by_its_rates: bool) -> None:
        """Warn of what an optimizer moves and this does not hold, and of another strength."""
        if self._precision is not None:
            warn_of_replaced(self._say, self._held().parameters, self._anchor, self._known)
            warn_of_unfrozen(optimizer, self._parameters(), self._known, self._anchor)
        if by_its_rates and self._budget is None:
            warn_of_rates(self._say, optimizer, self._structure)

    def _check_goes_with(
        self, optimizer: torch.optim.Optimizer, form: Form, metric: Metric
    ) -> None:
        """Raise a ValueError unless each step of an optimizer can have one of the penalty."""
        if form == "gradient":
            self._check_no_budget()
        elif form == "proximal":
            scale_of(optimizer, metric)

    def _reads_gradients(self, form: Form) -> bool:
        return form == "gradient"

    def _note_before(self, optimizer: torch.optim.Optimizer) -> None:
        self.before_step()

    def _pull(self, optimizer: torch.optim.Optimizer) -> None:
        self._check_no_budget()
        if own := self._held_by(optimizer):
            self._add_gradient(own)

    @torch.no_grad()
    def _go(self, optimizer: torch.optim.Optimizer, metric: Metric) -> None:
        self._step(optimizer, metric, needed=False)

    def _note_after(self) -> None:
        self.after_step()

    def _value(self) -> Tensor:
        return self._penalty(self.strength).detach()

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

        ``torch.save`` and safetensors can store them. Parameters have their names without those
        of wrappers. The strength and the other arguments are settings, not state: give them to
        the constructor again. Those that say what the numbers mean are noted, to be compared.
        """
        return {
            "n_tasks": torch.tensor(self._n_tasks),
            "offset": self._offset.clone(),
            **({} if self._budget is None else {"multiplier": _number(self._strength)}),
            **settings_of(self._settings(), self._precision),
            **{f"anchor.{key}": v for key, v in by_plain_names(self._anchor).items()},
            **{f"rest.{key}": v for key, v in by_plain_names(self._rests.values).items()},
            **{f"precision.{key}": v for key, v in precision_state(self._precision).items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        The model may be wrapped or sharded in another way than the one of the state.

        Raises
        ------
        ValueError
            If it is not such a state, if it says other settings, or if it has parameters that
            the model has not, or of other shapes than these can have grown from, or that
            ``params`` does not choose. What the model has and the state has not is free. Nothing
            has changed when it raises.
        """
        name = type(self).__name__
        if missing := {"n_tasks", "offset"} - state.keys():
            raise ValueError(f"this is not the state of {name}: it has no {sorted(missing)}")
        check_settings(state, self._settings(), name)
        every = self._choose.every(self.model)
        loader = Loader(every, next(self.model.parameters()).device)
        anchor = loader.vector(under("anchor.", state))
        precision = None
        if int(state["n_tasks"]) > 0:
            precision = loader.precision(under("precision.", state))
            by_type = encode(type(precision).__name__.lower())  # of states without this key
            check_settings({"structure": by_type} | state, {"structure": self._structure}, name)
            shapes = {name: value.shape for name, value in anchor.items()}
            check_shapes(precision.shapes, shapes)
            check_shapes(grown_from(shapes, every), shapes)
            held_ones(every, anchor)
            trained = [name for name, p in every.items() if p.requires_grad]
            check_chosen(anchor, trained, self._parameters())
        self._keep(precision, anchor)
        self._rests.values.update(loader.vector(under("rest.", state)))
        if self._budget is not None and "multiplier" in state:
            self._strength = float(state["multiplier"])
        self._offset = whole(state["offset"]).to(loader.device, copy=True)
        self._n_tasks = int(state["n_tasks"])

    def save(self, path: str | os.PathLike[str], *, data: Any = None) -> None:
        """Write the state as a file of safetensors, with a card that says what it is.

        :meth:`load` reads it, and :func:`ewc_lib.files.card` the card alone. Of a sharded model
        every process has to call this, and the first one writes.

        Parameters
        ----------
        path
            Of the file; one that is there is replaced when the new one is whole.
        data
            What the data of the tasks were, in your words: text, or anything that JSON holds.

        Raises
        ------
        ImportError
            If safetensors is not installed, the extra ``files``.
        TypeError, ValueError
            If ``data`` is nothing that JSON holds, or holds numbers that JSON has not.
        """
        write(path, self.state_dict(), card_of_penalty(self, self._settings(), data))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore what :meth:`save` has written, for a model that may have moved on since.

        The anchor is in the file, so only names and shapes of the parameters have to be the
        model's, not their values.

        Raises
        ------
        ImportError
            If safetensors is not installed, the extra ``files``.
        ValueError
            If it is no such file, and as :meth:`load_state_dict`. Nothing has changed then.
        """
        self.load_state_dict(read(path, type(self).__name__)[0])

    @property
    def _structure(self) -> str:
        return "diagonal"

    def _settings(self) -> dict[str, str]:
        """Return what a state says of itself and must agree on, beside names and shapes."""
        return {"structure": self._structure}


def _check_holds(optimizer: torch.optim.Optimizer, held: Held) -> None:
    """Raise a ValueError if an optimizer holds no parameter of a penalty, though some move."""
    own = own_parameters(optimizer)
    if held.moving and not any(id(p) in own for p in held.parameters.values()):
        raise ValueError(
            f"the optimizer holds none of the parameters of the penalty, {list(held.moving)}"
        )


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
