"""Where training moves the parameters of a network, and what that changes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ewc_lib._parameters import Vector
from ewc_lib.continual import train
from ewc_lib.ewc import EWC
from ewc_lib.experiments.structures.stacks import kl

__all__ = ["divergence", "learned_step"]


def divergence(
    model: nn.Module, inputs: Float[Tensor, "N ..."], displacement: Vector
) -> Float[Tensor, ""]:
    r"""Return how far the predictions move when the parameters do, in nats per observation.

    .. math:: \frac1N \sum_n \mathrm{KL}\big(p(\cdot \mid x_n, \theta) \,\big\|\,
              p(\cdot \mid x_n, \theta + \Delta)\big)
              = \tfrac12 \Delta^\top F(\theta)\, \Delta + O(\|\Delta\|^3)

    This is :eq:`eq-kl` for a classifier, without the expansion.

    Parameters
    ----------
    model
        A classifier that returns logits, at :math:`\theta`; it is not changed.
    inputs
        A batch of inputs.
    displacement
        :math:`\Delta`, by the names of the parameters.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(5, 3)
    >>> nowhere = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    >>> float(divergence(model, x, nowhere))
    0.0
    """
    moved = {name: p.detach() + displacement[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        return kl(model(inputs), functional_call(model, moved, (inputs,)))


def learned_step(
    model: nn.Module,
    task: tuple[Tensor, Tensor],
    *,
    rate: float,
    regularizer: EWC | None = None,
    **options: Any,
) -> Vector:
    """Return how far SGD on a task moves the parameters, and put them back.

    Parameters
    ----------
    model
        A classifier.
    task
        Inputs and labels.
    rate
        The learning rate.
    regularizer
        What holds on to an earlier task, by its proximal step.
    **options
        ``steps``, ``seed`` and others of :func:`ewc_lib.continual.train`.

    Examples
    --------
    >>> from ewc_lib.continual import mlp
    >>> task = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    >>> step = learned_step(mlp((3, 2), seed=0), task, rate=0.1, steps=5, seed=0)
    >>> bool(step["0.bias"][0] > 0)  # towards the label
    True
    """
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    train(model, task, regularizer=regularizer, optimizer=optimizer, proximal=True, **options)
    step = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    model.load_state_dict(start)
    return step
