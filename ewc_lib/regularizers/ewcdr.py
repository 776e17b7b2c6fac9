r"""EWC-DR: squared gradients at reversed logits, which do not vanish where the model is sure.

.. math:: \Omega_i = \sum_t \frac1{N_t} \sum_n
          \left( \frac{\partial}{\partial\theta_i} \log \mathrm{softmax}(-f(x_n))_{y_n} \right)^2
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ewc_lib._arguments import random_source
from ewc_lib._calling import output_tensor
from ewc_lib._drawing import random_part
from ewc_lib._forms import Pick, picked
from ewc_lib._processes import Group, over_ranks, share_of, taking_part
from ewc_lib._restoring import untouched
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.likelihood.agreement import agreed
from ewc_lib.likelihood.categorical import Categorical
from ewc_lib.regularizers._importance import ImportancePenalty

__all__ = ["EWCDR"]

PREFIX = "model."


class EWCDR(ImportancePenalty):
    r"""Hold what has large squared gradients after the logits have changed their sign.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_t \sum_i (\theta_i - \theta^*_{t,i})^2
              \, \frac1{N_t} \sum_n \left( \frac{\partial}{\partial\theta_i}
              \log \mathrm{softmax}(-f(x_n))_{y_n} \right)^2

    Where a model is sure of the right class, the gradient of the cross-entropy vanishes, and
    with it the Fisher information, although the parameters matter. With the opposite logits the
    same observation looks like a gross error, with a large gradient.

    This is an importance, *not* a Fisher information: no model of the labels stands behind it,
    and it grows where the Fisher information falls. So no strength follows from Bayes' rule.
    All else is as in :class:`ewc_lib.EWC` with ``mode="separate"``, so that the two differ in
    the importance alone.

    Parameters
    ----------
    model
        The network that is being trained. Its outputs are logits.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations.
    params
        The parameters to hold, as in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, or if ``params`` chooses nothing.

    Notes
    -----
    The code of the authors differs: it squares gradients of batch means, cuts them off at
    0.0001, and averages over classes around the latest optimum.

    References
    ----------
    Liu and Chang 2026, arXiv 2603.18596: "logits reversal".

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 2)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> model.bias.data[0] = 9.0  # almost certain of class 0
    >>> data = torch.ones(4, 1), torch.zeros(4, dtype=torch.long)
    >>> round(EWCDR(model, strength=1.0).consolidate(data).values["bias"][0].item(), 3)
    1.0
    >>> from ewc_lib import EWC
    >>> round(EWC(model, strength=1.0).consolidate(data).values["bias"][0].item(), 3)
    0.0
    """

    importance: ClassVar[str] = "logits reversal"

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        batch: Pick | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        group: Group = None,
    ) -> Diagonal:
        """Finish a task: compute its importance and remember its parameters.

        Parameters
        ----------
        data, n_samples, batch, generator, progress
            As in :func:`ewc_lib.fisher_information`. The targets are classes.
        group
            Of several processes, who has a part of the data, as in :meth:`ewc_lib.EWC.consolidate`.

        Returns
        -------
        Diagonal
            The importance of this task alone.

        Raises
        ------
        ValueError
            As :func:`ewc_lib.fisher_information`, or if the loss of the model is not about classes.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing of this task would be protected.
        """
        chosen = self._of_task()
        ranks = taking_part(group)

        def compute() -> Fisher:
            own = picked(share_of(data, self.model) if ranks else data, batch)
            source = random_source(generator, next(self.model.parameters()).device)
            with untouched(self.model):
                own, likelihood = agreed(self.model, random_part(own, n_samples, source))
            if not isinstance(likelihood, Categorical):
                raise ValueError(
                    f"EWC-DR reverses the logits of classes, and the loss is {likelihood}"
                )
            return fisher_information(
                _Reversed(self.model),
                own,
                likelihood,
                kind="empirical",
                params=[PREFIX + name for name in chosen],
                n_samples=n_samples,
                generator=source,
                progress=progress,
            )

        squares = over_ranks(_Reversed(self.model), compute, ranks)
        plain = self._plain_names(chosen)
        values = {plain[k.removeprefix(PREFIX)]: v for k, v in squares.diagonal().items()}
        task = self._diagonal(values, squares.n_samples, "Do the parameters reach the outputs?")
        self._merge(task)
        return task


class _Reversed(nn.Module):
    """A model with the opposite logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -output_tensor(self.model(*args, **kwargs))
