r"""Online Laplace approximation with Kronecker factors.

.. math:: \Omega(\theta) = \frac{\lambda}{2} (\theta - \theta^*_{T})^\top
          \left( T \; \bar B \otimes \bar A \right) (\theta - \theta^*_{T})
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ewc_lib._arguments import check_choice
from ewc_lib._forms import Pick
from ewc_lib._processes import Group, fisher_of_ranks
from ewc_lib._selecting import Selection
from ewc_lib._states import check_likelihood
from ewc_lib.fisher.output import KINDS, Kind
from ewc_lib.fisher.structures import Fisher
from ewc_lib.likelihood.outputs import Likelihood, given_distribution, in_words_if_given
from ewc_lib.quadratic import QuadraticPenalty
from ewc_lib.regularizers._importance import warn_if_zero

__all__ = ["KroneckerLaplace"]


class KroneckerLaplace(QuadraticPenalty):
    r"""Hold the parameters of each layer together, through two small matrices a layer.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} (\theta - \theta^*_{T})^\top
              \left( T \; \bar B \otimes \bar A \right) (\theta - \theta^*_{T})

    for each layer, with the factors :math:`\bar B` and :math:`\bar A` of
    :class:`~ewc_lib.fisher.Kronecker` averaged over the observations of all :math:`T` tasks so
    far. Unlike a diagonal, this knows which *combinations* of weights a task needs.

    A sum of Kronecker products is not one. Averaging the factors one by one
    (:meth:`ewc_lib.Fisher.pool`) is what KFAC does for the observations of one task, here done
    for those of all tasks together. So the memory does not grow with the number of tasks; the
    price is that products of factors of different tasks enter. With one task it equals
    :class:`ewc_lib.EWC` with ``structure="kronecker"``, which holds one task only.

    Parameters
    ----------
    model
        The network that is being trained.
    strength
        :math:`\lambda \ge 0`, for a loss that is the *mean* over observations. For tasks of
        equal size the precision has the scale of the sum of :math:`T` Fisher informations, as
        that of EWC has. Under Adam it is a euclidean one in a proximal step (:meth:`attach`).
    likelihood, kind, params
        As in :func:`ewc_lib.fisher_information`.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, if a word is unknown, or if ``params`` chooses
        nothing.

    References
    ----------
    Ritter, Botev and Barber 2018, arXiv 1805.07810; Martens and Grosse 2015 for the factors.

    Examples
    --------
    >>> import torch
    >>> model, y = torch.nn.Linear(3, 2), torch.arange(8) % 2
    >>> regularizer = KroneckerLaplace(model, strength=10.0)
    >>> for _ in range(3):
    ...     F = regularizer.consolidate((torch.randn(8, 3), y))
    >>> regularizer.n_tasks, [tuple(b.size) for b in regularizer.precision.blocks]
    (3, [(2, 4)])
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        likelihood: Likelihood | None = None,
        kind: Kind = "exact",
        params: Selection = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        given_distribution(likelihood)  # refuses an unknown word now, not later
        super().__init__(model, strength, params=params)
        self.likelihood = likelihood
        self.kind: Kind = kind

    @property
    def _structure(self) -> str:
        return "kronecker"

    def _settings(self) -> dict[str, str]:
        said = super()._settings() | {"mode": "averaged factors", "kind": self.kind}
        return said | in_words_if_given(self.likelihood)

    def consolidate(
        self,
        data: Any,
        *,
        n_samples: int | None = None,
        batch: Pick | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        group: Group = None,
    ) -> Fisher:
        """Finish a task: take its Fisher information into the factors, remember the parameters.

        If it raises, nothing has changed.

        Parameters
        ----------
        data, n_samples, batch, generator, progress
            As in :func:`ewc_lib.fisher_information`.
        group
            Of several processes, who has a part of the data, as in :meth:`ewc_lib.EWC.consolidate`.

        Returns
        -------
        Fisher
            The Fisher information of this task alone.

        Raises
        ------
        ValueError
            As :func:`ewc_lib.fisher_information`, and if no likelihood was given and the one that
            was found is not that of the tasks so far, also of those in a state.
        TypeError
            If a parameter that had a Kronecker product in one task has none in this one.

        Warns
        -----
        RuntimeWarning
            If it is zero everywhere, so that nothing of this task would be protected.
        """
        chosen = list(self._of_task())
        fisher = fisher_of_ranks(
            self.model,
            data,
            self.likelihood,
            group=group,
            kind=self.kind,
            structure="kronecker",
            params=chosen,
            n_samples=n_samples,
            batch=batch,
            generator=generator,
            progress=progress,
        )
        check_likelihood(self.likelihood, self.precision, fisher)
        warn_if_zero(
            fisher.trace(),
            "Fisher information",
            "Is the model so confident that its probabilities are exactly 0 and 1?",
            stacklevel=3,
        )
        self._replace(self._joined(self._plain(fisher), join=self._averaged))
        return fisher

    def _averaged(self, old: Fisher, task: Fisher) -> Fisher:
        """Average the factors of one more task into those of all before, in their scale."""
        return (self.n_tasks + 1) * (old / self.n_tasks).pool(task)
