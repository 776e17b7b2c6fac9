r"""Synaptic intelligence: a parameter matters as much as the loss fell along its path.

.. math:: \Omega_i = \sum_t \frac{\max(\omega_{t,i}, 0)}{\Delta_{t,i}^2 + \xi}, \qquad
          \omega_{t,i} = -\sum_{\text{steps}} g_i \, \delta\theta_i
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ewc_lib._foreach import each
from ewc_lib._parameters import Vector
from ewc_lib._selecting import Selection
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.regularizers._path import NO_STEPS, PathPenalty

__all__ = ["SI"]


class SI(PathPenalty):
    r"""Hold what brought the loss down while it was learned.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_i (\theta_i - \theta^*_{t-1,i})^2
              \sum_{s<t} \frac{\max(\omega_{s,i}, 0)}{\Delta_{s,i}^2 + \xi}, \qquad
              \omega_{s,i} = -\sum_{\text{steps of } s} g_i \, \delta\theta_i

    Here :math:`g` is the gradient of the loss of the task *alone*, :math:`\delta\theta` what
    the step moved and :math:`\Delta_s` what the whole task moved. The gradient of the penalty
    does not enter :math:`\omega`, or the importance would count how well the penalty was
    obeyed. The method needs no pass over data, but :meth:`before_step` after
    ``loss.backward()`` and :meth:`after_step` after the step, in *every* step.

    Parameters
    ----------
    model
        The network that is being trained.
    strength
        :math:`\lambda \ge 0`. The paper writes its penalty as :math:`c \sum_i \ldots` without
        the half, so :math:`\lambda = 2c`.
    xi
        :math:`\xi > 0` bounds the importance of a parameter that has hardly moved. The default
        0.1 is that of the authors for permuted MNIST; for split MNIST they take 0.001.
    params
        The parameters to hold, as in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, if ``xi`` is not positive, or if ``params``
        chooses nothing.

    References
    ----------
    Zenke, Poole and Ganguli 2017, equations 3 to 5.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> regularizer = SI(model, strength=1.0, xi=0.1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> regularizer.before_task()
    >>> (model(torch.ones(1, 1)) - 1).square().sum().backward()  # the gradient is -2
    >>> regularizer.before_step()
    >>> optimizer.step()  # by 1
    >>> regularizer.after_step()
    >>> importance = regularizer.consolidate(None)
    >>> round(importance.values["weight"].item(), 3)  # 2 * 1 / (1 + 0.1)
    1.818
    """

    importance: ClassVar[str] = "path integral"

    def __init__(
        self, model: nn.Module, strength: float, xi: float = 0.1, *, params: Selection = None
    ) -> None:
        if not xi > 0:
            raise ValueError(f"xi must be positive, got {xi}")
        super().__init__(model, strength, params=params)
        self.xi = xi

    def _begin(self) -> None:
        self._memory, self._n_steps = {"start": self._copy()}, 0

    def _moved(self, gradients: Vector, movements: Vector) -> None:
        self._add("path", each("mul", gradients, movements), -1.0)

    def consolidate(self, data: Any = None) -> Diagonal:
        """Finish a task: turn its path into importance, and remember the parameters.

        Parameters
        ----------
        data
            Not used.

        Returns
        -------
        Diagonal
            The importance of this task alone. Its ``n_samples`` is the number of steps.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing of this task would be protected.
        """
        path, start = self._recall("path"), self._recall("start")
        values = {
            name: path[name].relu() / ((p - start[name]).square() + self.xi)
            for name, p in self._detached()
        }
        task = self._diagonal(values, self._n_steps, NO_STEPS)
        self._accumulate(task)
        self._memory, self._n_steps = {}, 0
        return task
