r"""How far an optimizer goes for a gradient that stays: the metric of its steps.

.. math:: \theta \leftarrow \theta - S\, \bar g, \qquad S_i = \eta / P_i

Here :math:`\bar g` is a mean of the gradients so far, with weights that sum to one, and :math:`P`
is what the optimizer divides each entry by. A penalty whose step goes by the same :math:`S` is
weighed against the loss as it is in a sum of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import (
    LBFGS,
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

from ewc_lib._foreach import Operand, each
from ewc_lib._parameters import Vector
from ewc_lib._rounding import is_coarse
from ewc_lib.attaching import Metric, inner_of

Number: TypeAlias = float | Tensor
"""One for all parameters, or a vector of one for each."""

State: TypeAlias = Mapping[str, Any]
Scale: TypeAlias = tuple[Vector, Number]
"""What the entries are divided by, new tensors, and a factor of the learning rate."""

INSTEAD = "use form='gradient' (by hand, add_gradient_())"


class Rates(NamedTuple):
    r"""What a step is for a gradient that stays, by names.

    Attributes
    ----------
    numbers
        :math:`\eta`, times what the optimizer multiplies all entries by.
    divisors
        :math:`P`, where the optimizer divides each entry by its own; nobody else has these
        tensors. Those of a complex parameter have a last axis of its two parts.
    """

    numbers: dict[str, float]
    divisors: Vector


def rates_of(
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    metric: Metric,
    *,
    by_entry: bool = True,
) -> Rates:
    """Return the rates of those parameters that an optimizer holds.

    A parameter that the optimizer knows no gradient of yet has the learning rate. If entries may
    not have rates of their own, so has every optimizer that divides them.
    """
    scale = scale_of(optimizer, metric)
    if not by_entry and scale is not _sgd:
        scale = None
    names = {id(parameter): name for name, parameter in parameters.items()}
    numbers: dict[str, float] = {}
    divisors: Vector = {}
    for group in optimizer.param_groups:
        own = {names[id(p)]: p for p in group["params"] if id(p) in names}
        rate = float(group["lr"])
        numbers |= dict.fromkeys(own, rate)
        if scale is None or not own:
            continue
        rate *= _sum_of_momentum(group)
        below, factor = scale(group, own, _states(inner_of(optimizer), own))
        if isinstance(factor, Tensor):
            each("div_", below, _one_each(below, factor))
            factor = 1.0
        numbers |= {name: rate * factor if name in below else rate for name in own}
        divisors |= below
    return Rates({name: numbers[name] for name in parameters if name in numbers}, divisors)


def scale_of(optimizer: Any, metric: Metric) -> Callable[..., Scale] | None:
    """Return what tells the scale of an optimizer's steps; None if the metric needs none.

    Raise a ValueError if a proximal step after those of the optimizer has no scale.
    """
    inner = inner_of(optimizer)
    name = type(inner).__name__
    if isinstance(inner, LBFGS):
        raise ValueError(
            "LBFGS remembers how its own steps changed the gradient, and a proximal step would "
            f"move the parameters in between: {INSTEAD}"
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"a proximal step needs the learning rate, and this {name} has none: {INSTEAD}, or "
            "give the optimizer a rate"
        )
    if metric == "euclidean":
        return None
    found = next((SCALES[c] for c in type(inner).__mro__ if c in SCALES), None)
    if found is None:
        raise ValueError(
            f"a proximal step goes by the scale of the optimizer's own steps, and that of {name} "
            f"is not known: {INSTEAD}, or metric='euclidean' to go by the learning rate alone, "
            "with another strength"
        )
    return found


def _states(optimizer: Optimizer, own: Mapping[str, nn.Parameter]) -> dict[str, State]:
    """Return the states of those parameters whose gradients an optimizer has seen."""
    found = {name: optimizer.state[p] for name, p in own.items() if p in optimizer.state}
    return {name: state for name, state in found.items() if state and not _is_new(state)}


def _is_new(state: State) -> bool:
    """Tell whether a state was made before the first step.

    Adagrad makes it at once, and a fused kernel counts no step that a gradient scaler leaves out.
    """
    step = state.get("step")
    if torch.compiler.is_compiling() or not isinstance(step, Tensor) or step.device.type != "cpu":
        return False
    return not step.numpy()


def _sum_of_momentum(group: State) -> float:
    """Return how far momentum goes in the end for a gradient of one step."""
    momentum, dampening = group.get("momentum", 0), group.get("dampening", 0)
    return (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else 1.0


def _sgd(group: State, own: Any, states: Any) -> Scale:
    return {}, 1.0


def _adam(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    values = _entries(states, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    return _corrected(each("sqrt", values), group["eps"], _root_of_weights(group, states))


def _sparse_adam(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    roots = each("sqrt", _entries(states, "exp_avg_sq"))
    return each("add_", roots, group["eps"]), _root_of_weights(group, states)


def _nadam(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    below, factor = _adam(group, own, states)
    t, beta = _steps(states), group["betas"][0]
    now, after = (beta * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (t, t + 1))
    products = _number_each([state["mu_product"] for state in states.values()])
    mean = (1 - now) / (1 - products) + after * (1 - beta**t) / (1 - products * after)
    return below, factor * mean


def _radam(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    t, beta = _steps(states), group["betas"][1]
    most = 2 / (1 - beta) - 1
    length = most - 2 * t * beta**t / (1 - beta**t)
    by_mean = (most - 4) * (most - 2) / most
    roots = each("add_", each("sqrt", _entries(states, "exp_avg_sq")), group["eps"])
    if not isinstance(length, Tensor):
        if length <= 5:
            return {}, 1.0
        rectified = ((length - 4) * (length - 2) / (by_mean * length)) ** 0.5
        return roots, rectified * _root_of_weights(group, states)
    known = length > 5
    rectified = ((length - 4) * (length - 2) / (by_mean * length)).clamp_min(0).sqrt()
    factor = torch.where(known, rectified * _root_of_weights(group, states), 1.0)
    is_known = _one_each(roots, known)
    assert isinstance(is_known, Mapping)
    return {name: torch.where(is_known[name], root, 1.0) for name, root in roots.items()}, factor


def _adamax(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    return each("mul", _entries(states, "exp_inf"), 1.0), 1.0


def _rmsprop(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    values = _entries(states, "square_avg")
    if group["centered"]:
        means = _entries(states, "grad_avg")
        values = each("addcmul", values, means, means, value=-1)
    return each("add_", each("sqrt", values), group["eps"]), 1.0


def _adagrad(group: State, own: Any, states: Mapping[str, State]) -> Scale:
    roots = each("add_", each("sqrt", _entries(states, "sum")), group["eps"])
    return roots, 1 / (1 + (_steps(states) - 1) * group["lr_decay"])


SCALES: dict[type[Optimizer], Callable[..., Scale]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    SparseAdam: _sparse_adam,
    NAdam: _nadam,
    RAdam: _radam,
    Adamax: _adamax,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}
"""The scales that a state tells after a step, with those of classes that extend these.

Rprop goes by the signs of the gradient, LBFGS and Muon by its matrix: none has a scale of entries.
Those of Adadelta and Adafactor are of what the step has overwritten, and that of ASGD is of the
learning rate before.
"""


def _entries(states: Mapping[str, State], key: str) -> Vector:
    """Return a quantity of single precision at least, the parts of complex numbers apart."""
    found: Vector = {}
    for name, state in states.items():
        value = state[key].detach()
        value = torch.view_as_real(value) if value.is_complex() else value
        found[name] = value.float() if is_coarse(value) else value
    return found


def _steps(states: Mapping[str, State]) -> Number:
    return _number_each([state["step"] for state in states.values()])


def _number_each(values: list[Any]) -> Number:
    """Return one number if all are that and can be read, or a vector of them."""
    if not values:
        return 1.0
    tensors = [x for x in values if isinstance(x, Tensor)]
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in tensors):
        found = torch.stack([torch.as_tensor(x) for x in values])
        return found if found.device.type == "mps" else found.double()  # 1 - 0.999 loses digits
    everywhere = len(tensors) == len(values)
    numbers = torch.stack(tensors).numpy().tolist() if everywhere else values
    if len(set(map(float, numbers))) == 1:
        return float(numbers[0])
    return torch.tensor(numbers, dtype=torch.float64)


def _root_of_weights(group: State, states: Mapping[str, State]) -> Number:
    """Return the root of the sum of weights in a running mean of squares that began at zero."""
    total = 1 - group["betas"][1] ** _steps(states)
    if isinstance(total, Tensor):  # of no step, where that cannot be read
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
    found: Number = total**0.5
    return found


def _corrected(roots: Vector, eps: float, by: Number) -> Scale:
    """Return the scale with the roots over a number, plus epsilon."""
    if isinstance(by, Tensor):
        return each("add_", each("div_", roots, _one_each(roots, by)), eps), 1.0
    return each("add_", roots, eps * by), by


def _one_each(like: Mapping[str, Tensor], numbers: Tensor) -> Operand:
    """Return the numbers by the names that they belong to, or the number of all."""
    return dict(zip(like, numbers.unbind(), strict=True)) if numbers.dim() else numbers
