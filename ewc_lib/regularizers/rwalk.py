r"""Riemannian walk: a running average of squared gradients, and a score of the path.

.. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_i
          \left( \frac{F_i}{\max F} + \frac{s_i}{\max s} \right) (\theta_i - \theta^*_{t-1,i})^2
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ewc_lib._foreach import each
from ewc_lib._parameters import Vector
from ewc_lib._selecting import Selection
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.regularizers._path import NO_STEPS, PathPenalty

__all__ = ["RWalk"]


class RWalk(PathPenalty):
    r"""Hold what has large squared gradients, or brought the loss down for a small distance.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_i
              \left( \frac{F_i}{\max F} + \frac{s_i}{\max s} \right)
              (\theta_i - \theta^*_{t-1,i})^2

    After every ``interval`` steps, with the gradients :math:`g` of the loss of the task alone
    and the movement :math:`\Delta` over the interval,

    .. math:: F \leftarrow \alpha \, \overline{g^2} + (1 - \alpha) F, \qquad
              s \leftarrow s + \frac{\max(-\sum g \, \delta\theta, 0)}
              {\tfrac12 F \Delta^2 + \epsilon}.

    The first formula alone is EWC++. At the end of a task, the score of the task is averaged
    with that of all tasks before. There is no pass over data, but :meth:`before_step` and
    :meth:`after_step` are needed in *every* step.

    Parameters
    ----------
    model
        The network that is being trained.
    strength
        :math:`\lambda \ge 0`. The paper writes its penalty without the half, so this is twice
        the :math:`\lambda` of the paper. Both terms have a largest entry of 1, so the scale of
        the loss hardly matters, unlike for EWC.
    alpha
        The weight of the *newest* interval, in (0, 1]. The default is that of the paper.
    epsilon
        Bounds the score of a parameter that has hardly moved. The default is that of the
        authors' code.
    interval
        Steps between two updates. The default is that of the paper for MNIST.
    params
        The parameters to hold, as in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, if ``alpha``, ``epsilon`` or ``interval`` is
        out of range, or if ``params`` chooses nothing.

    Notes
    -----
    :math:`F` is *not* a Fisher information, though the paper calls it one. The square of the
    mean gradient of a batch of :math:`B` observations is not the mean of their squares: near an
    optimum it is smaller by a factor of about :math:`B`. It also uses the observed labels, and
    gradients from along the path instead of the optimum. The norming to a largest entry of 1
    hides the factor.

    References
    ----------
    Chaudhry, Dokania, Ajanthan and Torr 2018, equations 6 to 8. As in the authors' code, the
    moving average is over intervals, with the mean of the squares within each.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> regularizer = RWalk(model, strength=1.0, interval=5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> regularizer.before_task()
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     regularizer.before_step(x)
    ...     optimizer.step()
    ...     regularizer.after_step()
    >>> importance = regularizer.consolidate(None)
    >>> bool(max(value.max() for value in importance.values.values()) <= 2)
    True
    """

    importance: ClassVar[str] = "riemannian walk"

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        alpha: float = 0.9,
        epsilon: float = 1e-3,
        interval: int = 10,
        *,
        params: Selection = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        super().__init__(model, strength, params=params)
        self.alpha, self.epsilon, self.interval = alpha, epsilon, interval

    def _of_another(self) -> None:
        raise ValueError(
            "RWalk counts the steps of its intervals, so only one optimizer may step in a task"
        )

    def _begin(self) -> None:
        self._memory, self._n_steps = self._lasting() | {"start": self._copy()}, 0

    def _lasting(self) -> dict[str, Vector]:
        """Return what is remembered from task to task."""
        return {key: self._memory[key] for key in ("F", "scores") if key in self._memory}

    def _keep_lasting(self, **quantities: Vector) -> None:
        """Remember quantities; those of parameters that are frozen now stay."""
        for quantity, values in quantities.items():
            self._memory[quantity] = {**self._memory.get(quantity, {}), **values}

    def _moved(self, gradients: Vector, movements: Vector) -> None:
        self._add("path", each("mul", gradients, movements), -1.0)
        self._add("squares", each("mul", gradients, gradients))
        if self._n_steps % self.interval == 0:
            self._close_interval(self.interval)

    def _close_interval(self, n: int) -> None:
        """Update the moving average and the score of the task by the last ``n`` steps."""
        newest = each("div", self._recall("squares"), n)
        old = self._recall("F", newest)
        F = each("add", each("mul", newest, self.alpha), each("mul", old, 1 - self.alpha))
        end, gain = self._copy(), each("clamp_min", self._recall("path"), 0.0)
        moved = each("sub", end, self._recall("start"))
        cost = each("mul", each("mul", F, 0.5), each("mul", moved, moved))
        scores = each("div", gain, each("add", cost, self.epsilon))
        self._add("task", scores)
        self._keep_lasting(F=F)
        self._memory["start"] = end
        del self._memory["squares"], self._memory["path"]

    def consolidate(self, data: Any = None) -> Diagonal:
        """Finish a task: average its score with the earlier ones, and remember the parameters.

        Parameters
        ----------
        data
            Not used.

        Returns
        -------
        Diagonal
            The importance for all tasks so far. Its ``n_samples`` is the number of steps of
            this task.

        Warns
        -----
        RuntimeWarning
            If no step of this task was seen, or all were without gradient, so that nothing of
            it would be protected.
        """
        if left := self._n_steps % self.interval:
            self._close_interval(left)
        F, task = self._recall("F"), self._recall("task")
        old = self._recall("scores", task)
        scores = {name: (old[name] + score) / 2 for name, score in task.items()}
        self._diagonal(task, self._n_steps, NO_STEPS)  # warns where nothing of this task is in it
        normed, path = _normed(F), _normed(scores)
        values = {name: f + path[name] for name, f in normed.items()}
        importance = Diagonal(self._n_steps, self.importance, dict.fromkeys(values, "rule"), values)
        self._exchange(importance)
        self._keep_lasting(F=F, scores=scores)
        self._memory, self._n_steps = self._lasting(), 0
        return importance


def _normed(values: Vector) -> Vector:
    """Divide by the largest entry, unless all are zero."""
    top = torch.stack([value.max() for value in values.values() if value.numel()]).max()
    return {name: value / top.where(top > 0, 1.0) for name, value in values.items()}
