"""Elastic weight consolidation in the Trainer of Lightning.

:class:`EWCCallback` is all that a training needs, in ``lightning`` as in ``pytorch_lightning``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader

from ewc_lib.attaching import Form, Metric
from ewc_lib.integrations._task import Task, in_batches, is_everywhere, warn_of_next
from ewc_lib.regularizers import Regularizer

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

__all__ = ["EWCCallback"]


class EWCCallback(Callback):
    r"""Hold on to earlier tasks while a Trainer learns the next one; each ``fit`` is a task.

    It attaches the regularizer to the trainer's optimizers when training begins, as
    :meth:`ewc_lib.EWC.attach` does, in automatic and in manual optimization: once a step under
    gradient accumulation, and not in steps that a gradient scaler leaves out. When training ends
    it consolidates, if there are data for that. Its state is part of every checkpoint, so that
    ``trainer.fit(ckpt_path=...)`` goes on as if nothing had happened; the last one holds the task
    that has just been learned. It logs ``ewc/penalty``, ``ewc/distance``, which is
    the Euclidean distance from the anchor, and ``ewc/nats`` (:meth:`ewc_lib.EWC.nats`): all of
    EWC, but no penalty where it keeps a budget; the first two of other penalties with an anchor;
    of AdapterEWC ``ewc/penalty`` only; nothing of methods whose penalty depends on a batch, such
    as LwF.

    Parameters
    ----------
    ewc
        :class:`ewc_lib.EWC` or another method of :mod:`ewc_lib.regularizers`, of the module that
        the trainer fits, or of a part of it.
    form, metric
        As in :meth:`ewc_lib.EWC.attach`; by default what the method does there.
    consolidate_with
        The data of this task, for its end: a DataLoader or other data that ``ewc.consolidate``
        takes; a data module, for its ``train_dataloader``; True for the data that the trainer
        learns from, each once. By default a training is a part of a task, and
        ``ewc.consolidate`` is left to you.
    n_samples, **options
        Of ``ewc.consolidate``. With True each of several processes reads all the data, as with
        ``group=False``; of other data each reads what you give it.

    Notes
    -----
    A checkpoint that holds its own task begins the next one if training resumes from it; a
    warning says so. What the regularizer remembers is in ``checkpoint["callbacks"]``.

    Several optimizers are told apart by their parameters: the regularizer acts in the steps of
    those that move what it holds.

    Examples
    --------
    >>> import torch
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from ewc_lib import EWC
    >>> class Classifier(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Linear(3, 2)
    ...     def training_step(self, batch, _):
    ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    >>> module = Classifier()
    >>> ewc = EWC(module.net, strength=100.0)
    >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, barebones=True,
    ...                   callbacks=[EWCCallback(ewc, consolidate_with=True)])
    >>> trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    >>> ewc.n_tasks
    1
    """

    def __init__(
        self,
        ewc: Regularizer,
        *,
        form: Form | None = None,
        metric: Metric | None = None,
        consolidate_with: Any = None,
        n_samples: int | None = None,
        **options: Any,
    ) -> None:
        self.ewc = ewc
        self.consolidate_with = consolidate_with
        options["n_samples"] = n_samples
        self._task = Task(ewc, form, metric, consolidate_with is not None, options)
        self._resumed = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._resumed and self._task.ended:
            warn_of_next(trainer.ckpt_path)
        resumed = self._resumed and not self._task.ended
        self._task.begin(trainer.optimizers, resumed=resumed)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            pl_module.log_dict(self._task.readings())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._task.attached and _at_the_end(trainer):
            self._end(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._task.stop()
        self._resumed = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        self._task.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what the regularizer remembers, and whether the task has ended."""
        return {"ewc": self.ewc.state_dict(), "ended": self._task.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        remembered: dict[str, Tensor] = state_dict["ewc"]
        self.ewc.load_state_dict(remembered)
        self._task.ended, self._resumed = state_dict["ended"], True

    def _end(self, trainer: Any) -> None:
        """Consolidate, if there is something to do that with."""
        data = self.consolidate_with
        if data is None:
            return
        everywhere = False
        if data is True:
            data = trainer.train_dataloader
            if isinstance(data, DataLoader) and (data.batch_size or data.batch_sampler is None):
                everywhere = is_everywhere(data.dataset)
                data = in_batches(data.dataset, data.batch_size, data.collate_fn)
        elif hasattr(data, "train_dataloader"):
            data = data.train_dataloader()
        self._task.end(data, everywhere=everywhere)


def _at_the_end(trainer: Any) -> bool:
    """Tell whether the last step of a training has been taken."""
    steps: int = trainer.global_step
    if trainer.max_steps != -1 and steps >= trainer.max_steps:
        return True
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    whole = batches.is_last_batch and batches.current.processed == batches.current.ready
    epochs: int = max(loop.epoch_progress.current.processed, trainer.current_epoch + whole)
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return True
    enough = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
    return bool(trainer.should_stop) and enough
