r"""Learning without forgetting: new inputs shall have the old outputs in the old heads.

.. math:: \Omega(\theta) = \frac{\lambda}{H} \sum_{h=1}^H \frac1B \sum_b
          \mathrm{KL}\left( p^{\text{old}}_h(x_b) \,\big\|\, p_h(x_b; \theta) \right)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ewc_lib._batches import batches
from ewc_lib._forms import Pick, picked
from ewc_lib.fisher.structures import check_shapes
from ewc_lib.fisher.structures.states import under
from ewc_lib.heads import all_outputs, contains, read, read_now
from ewc_lib.likelihood.agreement import Criterion
from ewc_lib.likelihood.base import precise
from ewc_lib.likelihood.outputs import Likelihood
from ewc_lib.regularizers._function import no_step
from ewc_lib.regularizers._outputs import (
    OutputPenalty,
    classes_last,
    divergence,
    inputs_and_labels,
    mean_over_positions,
    positions_that_count,
    reading_last,
)

__all__ = ["LwF"]


class LwF(OutputPenalty):
    r"""Keep what the network said before this task, on the inputs of this task.

    .. math:: \Omega(\theta) = \frac{\lambda}{H} \sum_{h=1}^H \frac1B \sum_b
              \mathrm{KL}\left( p^{\text{old}}_h(x_b) \,\big\|\, p_h(x_b; \theta) \right),
              \qquad p_h = \mathrm{softmax}(f_h / \tau)

    with the inputs :math:`x_b` of the step, the heads :math:`h` learned so far, and a frozen
    copy of the network from the end of the last task for :math:`p^{\text{old}}`. No old data
    are kept, and no importance: what is held is the function, where the *new* inputs are. The
    model is run once more in each step.

    Parameters
    ----------
    model
        The network that is being trained: :class:`ewc_lib.continual.MultiHead`, or any network
        that :func:`ewc_lib.fisher_information` takes.
    strength
        :math:`\lambda \ge 0`. By default the number of earlier tasks, so that each task weighs
        the same: up to a factor, the loss in task :math:`t` is :math:`\frac1t` times that of
        the task plus :math:`1 - \frac1t` times this.
    temperature
        :math:`\tau > 0`. Above 1 it raises the small probabilities, which hold most of what the
        old network knows. The default 2 is that of the paper. It has no meaning for outputs
        that are no logits.
    likelihood, criterion
        How to read the outputs, as in :func:`ewc_lib.fisher_information`. The divergence is the
        one of that distribution, and its mean is over all positions that count: those of a
        sequence whose label counts or, without labels, that the attention mask of the batch does
        not leave out.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, or the temperature not positive.

    Notes
    -----
    The paper has the cross-entropy in place of the divergence. They differ by the entropy of
    the old outputs, which has no gradient; the divergence is zero where nothing has changed.
    The factor :math:`\tau^2` of Hinton, Vinyals and Dean 2015 is left out, as in the paper and
    in the code of van de Ven, Tuytelaars and Tolias 2022. This code has the default weighting
    for tasks with heads of their own and for domains. For classes that are added to one head it
    differs in two ways: it has :math:`\lambda = 1`, and its :math:`p_h` runs over the new
    classes too.

    References
    ----------
    Li and Hoiem 2016; the weighting of van de Ven, Tuytelaars and Tolias 2022.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    >>> regularizer = LwF(model)
    >>> regularizer.consolidate((x, torch.zeros(8, dtype=torch.long)))
    >>> regularizer.before_step(x)
    >>> abs(regularizer.penalty().item()) < 1e-6  # nothing has changed
    True
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> regularizer.penalty().item() > 0
    True
    """

    _needs_inputs = True

    def __init__(
        self,
        model: nn.Module,
        strength: float | None = None,
        temperature: float = 2.0,
        *,
        likelihood: Likelihood | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(model, strength, likelihood, criterion)
        self.temperature = temperature
        self._old: nn.Module | None = None
        self._inputs: Any = None
        self._labels: Tensor | None = None

    def before_step(self, inputs: Any = None) -> None:
        """Note the inputs of this step; of several calls before the penalty, the last counts.

        Parameters
        ----------
        inputs
            One batch as the model is called with it: a tensor ``[N, ...]``, a tuple of what it
            takes by position, or a dict of what it takes by name. Of labels in a dict only those
            matter that do not count.
        """
        self._inputs, self._labels = inputs_and_labels(self.model, inputs)

    def _loss(self) -> Float[Tensor, ""]:
        if self._inputs is None:
            raise no_step()
        assert self._old is not None
        device = next(t.device for t in tree_leaves(self._inputs) if isinstance(t, Tensor))
        with torch.no_grad():
            old = self._all(self._old.to(device))
        new = self._all(self.model)
        return torch.stack([self._divergence(old, new, head) for head in self._heads]).mean()

    def _all(self, model: nn.Module) -> Tensor:
        return precise(classes_last(self._distribution, all_outputs(model, self._inputs)))

    def _divergence(self, old: Tensor, new: Tensor, head: range) -> Float[Tensor, ""]:
        if old.dim() > 1:
            old, new = read(old, head), read(new, head)
        distribution = reading_last(self._distribution)
        found = divergence(distribution, old, new, self.temperature)
        counts = positions_that_count(distribution, self._inputs, self._labels, found.shape)
        return mean_over_positions(found, counts)

    def consolidate(self, data: Any, *, batch: Pick | None = None) -> None:
        """Finish a task: keep a copy of the network, and which head it has learned.

        A head that is part of this one is dropped: of classes that are added to one head, the
        latest range holds all.

        Parameters
        ----------
        data, batch
            As in :func:`ewc_lib.fisher_information`. Only the first observations are looked at,
            for the number of outputs and how they are read.

        Raises
        ------
        ValueError
            If the likelihood is not the one of the loss that the model or the criterion has, or
            cannot be meant. Nothing has changed then.
        """
        reading, distribution = self._agree(picked(data, batch))
        first = next(batches(reading, self._device, 1)).checked()
        outputs = self._outputs_of(first.inputs)
        if outputs.dim() > 3 or first.target.is_floating_point():
            distribution.check(outputs, first.target)
        last = classes_last(distribution, outputs)
        new = read_now(self.model, last.shape[-1] if last.dim() > 1 else 1)
        self._distribution = distribution
        self._heads = [head for head in self._heads if not contains(new, head)] + [new]
        self._old = _frozen(self.model)
        self._inputs = self._labels = None
        self._n_tasks += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the old network, the heads and the number of tasks, as plain tensors."""
        old = {} if self._old is None else self._old.state_dict()
        return self._state() | {f"old.{key}": v.clone().contiguous() for key, v in old.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, into a copy of the present model.

        Raises
        ------
        ValueError
            If it is not such a state, or if the old network has other tensors than the model.
            Nothing has changed then.
        """
        self._check_state(state)
        old = None
        if int(state["n_tasks"]) > 0:
            old, given = _frozen(self.model), under("old.", state)
            if not given:
                raise ValueError("this is not the state of LwF: it has no old network")
            shapes = {key: value.shape for key, value in old.state_dict().items()}
            check_shapes(shapes, {key: value.shape for key, value in given.items()})
            old.load_state_dict(given)
        self._load(state)
        self._old, self._inputs, self._labels = old, None, None


def _frozen(model: nn.Module) -> nn.Module:
    """Return a copy of a model that will not change."""
    return copy.deepcopy(model).eval().requires_grad_(False)
