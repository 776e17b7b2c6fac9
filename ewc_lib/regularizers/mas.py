r"""Memory aware synapses: a parameter matters as much as the outputs react to it.

.. math:: \Omega_i = \sum_t \frac1{N_t} \sum_n
          \left| \frac{\partial \lVert f(x_n) \rVert^2}{\partial \theta_i} \right|
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ewc_lib._arguments import check_whole, random_source
from ewc_lib._drawing import random_part
from ewc_lib._forms import Pick, picked
from ewc_lib._processes import Group, over_ranks, share_of, taking_part
from ewc_lib._restoring import untouched
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.regularizers._importance import ImportancePenalty
from ewc_lib.score import memory, per_observation_gradients

__all__ = ["MAS"]

IGNORED = -100
"""The label of positions that do not count, as padding has it."""


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
        The network that is being trained.
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

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        batch: Pick | None = None,
        generator: torch.Generator | None = None,
        group: Group = None,
    ) -> Diagonal:
        """Finish a task: add its importance, and remember the parameters.

        Parameters
        ----------
        data, n_samples, batch, generator
            As in :func:`ewc_lib.fisher_information`. Of the targets only this matters: where
            one of them is -100, as at the padding of a text, the outputs do not count.
        group
            Of several processes, who has a part of the data, as in :meth:`ewc_lib.EWC.consolidate`.

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
        check_whole(n_samples=n_samples)
        chosen, ranks = list(self._of_task()), taking_part(group)

        def compute() -> Diagonal:
            own = share_of(data, self.model) if ranks else data
            return self._mean(chosen, picked(own, batch), n_samples, generator)

        found = over_ranks(self.model, compute, ranks)
        assert isinstance(found, Diagonal)
        values, n = found.values, found.n_samples
        task = self._diagonal(values, n, "Are the outputs of the model always zero?")
        self._accumulate(task)
        return task

    def _mean(
        self,
        chosen: list[str],
        data: Any,
        n_samples: int | None,
        generator: torch.Generator | None,
    ) -> Diagonal:
        """Return the mean over the observations that this process has."""
        total, n = self._zeros(), 0
        device = next(iter(total.values())).device
        data = random_part(data, n_samples, random_source(generator, device))
        found = per_observation_gradients(
            self.model,
            data,
            direction=of_squared_length,
            params=chosen,
            n_samples=n_samples,
            max_bytes=memory.budget(device).rows,
        )
        plain = self._plain_names(chosen)
        with untouched(self.model):  # also by what draws the data
            for gradients in found:
                for name, g in gradients.items():
                    total[plain[name]] += g.abs().sum(0)
                n += len(g)
        values = {name: value / n for name, value in total.items()}
        return Diagonal(n, self.importance, dict.fromkeys(values, "rule"), values)


def of_squared_length(output: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the squared length of each output, where its label counts."""
    if target.shape == output.shape[:-1] and not target.is_floating_point():
        output = output.masked_fill((target == IGNORED).unsqueeze(-1), 0)
    return 2 * output
