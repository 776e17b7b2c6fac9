"""Elastic weight consolidation in the training strategies of Avalanche.

:class:`EWCPlugin` is all that a training needs. Avalanche asks of a plugin only that it has the
methods that are called, so nothing of Avalanche is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ewc_lib.attaching import Form, Metric
from ewc_lib.integrations._task import Task, in_batches, is_everywhere
from ewc_lib.regularizers import Regularizer

__all__ = ["EWCPlugin"]


class EWCPlugin:
    """Hold on to earlier experiences while a strategy learns the next one.

    For the strategies that inherit from ``SupervisedTemplate``. It attaches the regularizer to
    the optimizer of the strategy before each experience, as :meth:`ewc_lib.EWC.attach` does, and
    consolidates after it, with the data of that experience.

    Parameters
    ----------
    ewc
        :class:`ewc_lib.EWC` or another method of :mod:`ewc_lib.regularizers`, of the model that
        the strategy trains.
    form, metric
        As in :meth:`ewc_lib.EWC.attach`; by default what the method does there.
    n_samples, **options
        Of ``ewc.consolidate``.

    Notes
    -----
    The data are those of the experience itself, without what another plugin, such as a replay of
    stored ones, adds to them. The model is called with the inputs alone: one that asks for task
    labels needs a wrapper that gives them.

    Examples
    --------
    With Avalanche, it is one of the plugins of a strategy:

    >>> from avalanche.training import Naive  # doctest: +SKIP
    >>> strategy = Naive(
    ...     model=model, optimizer=optimizer, plugins=[EWCPlugin(ewc)]
    ... )  # doctest: +SKIP

    This is what the strategy then does with it:

    >>> from types import SimpleNamespace
    >>> import torch
    >>> from ewc_lib import EWC
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> data = [(torch.randn(3), i % 2, 0) for i in range(8)]  # inputs, targets, task labels
    >>> strategy = SimpleNamespace(
    ...     optimizer=optimizer,
    ...     train_mb_size=4,
    ...     experience=SimpleNamespace(dataset=data),
    ... )
    >>> ewc = EWC(model, strength=100.0)
    >>> plugin = EWCPlugin(ewc)
    >>> plugin.before_training_exp(strategy)
    >>> optimizer.step()  # and all other steps of the experience
    >>> plugin.after_training_exp(strategy)
    >>> ewc.n_tasks
    1
    """

    def __init__(
        self,
        ewc: Regularizer,
        *,
        form: Form | None = None,
        metric: Metric | None = None,
        n_samples: int | None = None,
        **options: Any,
    ) -> None:
        self.ewc = ewc
        self._task = Task(ewc, form, metric, True, {"n_samples": n_samples, **options})

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Attach the regularizer, after the model has grown and the optimizer knows of that."""
        self._task.begin([strategy.optimizer], resumed=False)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Consolidate the experience."""
        self._task.stop()
        dataset = strategy.experience.dataset
        collate = getattr(dataset, "collate_fn", None)
        batches = _pairs(in_batches(dataset, strategy.train_mb_size, collate))
        self._task.end(batches, everywhere=is_everywhere(dataset))


def _pairs(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Leave out the task labels, which come third."""
    for inputs, target, *_ in batches:
        yield inputs, target
