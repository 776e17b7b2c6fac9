r"""Memory aware synapses: a parameter matters as much as the outputs react to it.

.. math:: \Omega_i = \sum_t \frac1{N_t} \sum_n
          \left| \frac{\partial \lVert f(x_n) \rVert^2}{\partial \theta_i} \right|
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from ewc_lib._batches import batches
from ewc_lib._calling import forward, untouched
from ewc_lib._checking import check_modules
from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.regularizers._importance import ImportancePenalty

__all__ = ["MAS"]

GRADIENTS_AT_ONCE = 2**24
"""Entries of per-observation gradients held at a time: 64 MiB in float32."""


class MAS(ImportancePenalty):
    r"""Hold what the length of the outputs reacts to, with no regard to labels.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_i (\theta_i - \theta^*_{t-1,i})^2
              \sum_{s<t} \frac1{N_s} \sum_n
              \left| \frac{\partial \lVert f(x_n) \rVert^2}{\partial \theta_i} \right|

    The absolute value is taken for each observation, before the mean. The gradient of a batch
    mean, as some implementations take it, lets observations cancel. The model is run in eval
    mode and left as it was. With heads, :math:`f` is the head that is read.

    Parameters
    ----------
    model
        The network that is being trained. ``torch.func.vmap`` has to be able to run it.
    strength
        :math:`\lambda \ge 0`. The paper writes its penalty without the half, so this is twice
        the :math:`\lambda` of the paper.
    params
        The parameters to hold, as in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, or if ``params`` chooses nothing.

    References
    ----------
    Aljundi, Babiloni, Elhoseiny, Rohrbach and Tuytelaars 2018.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> regularizer = MAS(model, strength=1.0)
    >>> x, y = torch.tensor([[1.0], [-2.0]]), torch.zeros(2, dtype=torch.long)
    >>> importance = regularizer.consolidate((x, y))
    >>> importance.values["weight"].item()  # the mean of |2 w x^2|
    15.0
    """

    importance: ClassVar[str] = "output sensitivity"

    def consolidate(self, data: Any, *, n_samples: int | None = None) -> Diagonal:
        """Finish a task: add its importance, and remember the parameters.

        Parameters
        ----------
        data, n_samples
            As in :func:`ewc_lib.fisher_information`. The targets are not used.

        Returns
        -------
        Diagonal
            The importance of this task alone.

        Raises
        ------
        ValueError
            If the data are empty or hold NaN, or if the model mixes observations.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing of this task would be protected.
        """
        check_modules(self.model)
        total, n = self._zeros(), 0
        with untouched(self.model):
            parameters = dict(self._detached())
            device = next(iter(parameters.values())).device
            size = max(1, GRADIENTS_AT_ONCE // sum(p.numel() for p in parameters.values()))
            for batch in batches(data, device, n_samples):
                for chunk in _chunks(batch.inputs, len(batch), size):
                    for name, g in self._sensitivities(parameters, chunk).items():
                        total[name] += g.to(total[name].dtype).abs().sum(0)
                n += len(batch)
        values = {name: value / n for name, value in total.items()}
        task = self._diagonal(values, n, "Are the outputs of the model always zero?")
        self._accumulate(task)
        return task

    def _sensitivities(self, parameters: Vector, inputs: Any) -> Vector:
        """Return the gradient of the squared length of the outputs of each observation."""

        def length(theta: Vector, x: Any) -> Tensor:
            alone = tree_map(lambda leaf: leaf.unsqueeze(0), x)
            return forward(self.model, alone, theta).square().sum()

        gradients: Vector = vmap(grad(length), in_dims=(None, 0))(parameters, inputs)
        return gradients


def _chunks(inputs: Any, n: int, size: int) -> list[Any]:
    return [
        tree_map(lambda leaf, start=start: leaf[start : start + size], inputs)
        for start in range(0, n, size)
    ]
