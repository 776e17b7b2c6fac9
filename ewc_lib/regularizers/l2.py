r"""L2: every parameter matters as much as every other.

.. math:: \Omega(\theta) = \frac{\lambda}{2} \lVert \theta - \theta^*_{t-1} \rVert^2
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ewc_lib.fisher.structures import Diagonal
from ewc_lib.regularizers._importance import ImportancePenalty

__all__ = ["L2"]


class L2(ImportancePenalty):
    r"""Hold all parameters alike near the last optimum.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \lVert \theta - \theta^*_{t-1} \rVert^2

    The precision is the identity, however many tasks there were. What EWC gains over this is
    what the Fisher information is worth.

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

    References
    ----------
    Hsu et al. 2018, where it is a baseline of this name.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> regularizer = L2(model, strength=4.0)
    >>> importance = regularizer.consolidate(None)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> round(regularizer.penalty().item(), 4)  # 4 / 2 * (six parameters, each moved by 1)
    12.0
    """

    importance: ClassVar[str] = "identity"

    def consolidate(self, data: Any = None) -> Diagonal:
        """Finish a task: hold the parameters where they are now.

        Parameters
        ----------
        data
            Not used.

        Returns
        -------
        Diagonal
            The identity, of no observation.
        """
        ones = {name: torch.ones_like(zero) for name, zero in self._zeros().items()}
        identity = self._diagonal(ones, 0, "")
        self._exchange(identity)
        return identity
