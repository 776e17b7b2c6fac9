"""Elastic weight consolidation in the Trainer of the library transformers.

:class:`EWCCallback` is all that a training needs. It is made for
:class:`transformers.Trainer` and those that inherit its loop, such as the ones of trl.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ewc_lib.attaching import Form, Metric
from ewc_lib.integrations._task import Task, in_batches, is_everywhere, warn_of_next
from ewc_lib.regularizers import Regularizer

__all__ = ["FILE", "EWCCallback"]

FILE = "ewc.safetensors"
"""The file in the folder of a checkpoint with what the regularizer remembers."""


class EWCCallback(TrainerCallback):
    r"""Hold on to earlier tasks while a Trainer learns the next one.

    It attaches the regularizer to the trainer's optimizer when training begins, as
    :meth:`ewc_lib.EWC.attach` does: once a step under gradient accumulation, and not in steps
    that a gradient scaler leaves out. When training ends it consolidates, if there are data for
    that. Every checkpoint gets a file :data:`FILE` with the state of the regularizer, and a
    training that resumes from a checkpoint takes it from there; the last checkpoint holds the
    task that has just been learned. The entries of the log get ``ewc/penalty``,
    ``ewc/distance``, which is the Euclidean distance from the anchor, and ``ewc/nats``
    (:meth:`ewc_lib.EWC.nats`): all of EWC, but no penalty where it keeps a budget; the first two
    of other penalties with an anchor; of AdapterEWC ``ewc/penalty`` only; nothing of methods
    whose penalty depends on a batch, such as LwF.

    Parameters
    ----------
    ewc
        :class:`ewc_lib.EWC` or another method of :mod:`ewc_lib.regularizers`, of the model that
        the trainer trains.
    form, metric
        As in :meth:`ewc_lib.EWC.attach`; by default what the method does there.
    consolidate_with
        The data of this task, for its end: a data set as the trainer's ``train_dataset``, which
        is read in the trainer's batch size and by its collator; a DataLoader, as it is; True for
        the data that the trainer learns from. By default a training is a part of a
        task, and ``ewc.consolidate`` is left to you.
    n_samples, **options
        Of ``ewc.consolidate``. Of several processes each reads all of a data set, as with
        ``group=False``, and of a DataLoader what that gives it.

    Notes
    -----
    With ``load_best_model_at_end``, the task is consolidated at the best parameters, and it is
    the best checkpoint that holds it. A checkpoint that holds its own task begins the next one if
    training resumes from it; a warning says so.

    The likelihood is that of the model's output: a ``label_smoothing_factor`` or a loss of your
    own moves the optimum, and the Fisher information there is still that of what the model says.

    The penalty is no part of the logged loss. Callbacks that report to other programs come
    before those of the user, so the two values are in ``trainer.state.log_history`` and on the
    screen, but not in what, for example, TensorBoard shows.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from transformers import Trainer, TrainingArguments
    >>> from ewc_lib import EWC
    >>> config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1,
    ...                     num_attention_heads=1, intermediate_size=4)
    >>> model = BertForSequenceClassification(config)
    >>> ewc = EWC(model, strength=100.0)
    >>> task_a = [{"input_ids": torch.tensor([1, 2, i]), "labels": i % 2} for i in range(4)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, max_steps=2, disable_tqdm=True, report_to="none",
    ...                              logging_steps=100, use_cpu=True)
    ...     trainer = Trainer(model, args, train_dataset=task_a,
    ...                       callbacks=[EWCCallback(ewc, consolidate_with=True)])
    ...     _ = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime'...}
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = state.global_step > 0
        if resumed:
            self._restore(_checkpoint(), more=state.global_step < state.max_steps)
        self._task.begin([kwargs["optimizer"]], resumed=resumed)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "loss" in kwargs["logs"]:  # not an evaluation
            for entry in (kwargs["logs"], state.log_history[-1]):
                entry.update(self._task.readings())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop and not args.load_best_model_at_end:
            self._end(args, **kwargs)
        self._save(args, _folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task.stop()
        if self.consolidate_with is None or self._task.ended:
            return
        self._end(args, **kwargs)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        self._save(args, Path(best) if best else _folder(args, state))

    def _end(
        self, args: TrainingArguments, train_dataloader: DataLoader[Any], **kwargs: Any
    ) -> None:
        """Consolidate, if there is something to do that with."""
        data = self.consolidate_with
        if data is None:
            return
        everywhere = False
        if not isinstance(data, DataLoader):
            trained = train_dataloader.dataset
            data = trained if data is True else _same_columns(data, trained)
            everywhere = is_everywhere(data)
            data = in_batches(data, args.train_batch_size, train_dataloader.collate_fn)
        self._task.end(data, everywhere=everywhere)

    def _save(self, args: TrainingArguments, folder: Path) -> None:
        if args.should_save and folder.is_dir():
            state, ended = self.ewc.state_dict(), str(self._task.ended)
            save_file(state, folder / FILE, metadata={"format": "pt", "ended": ended})

    def _restore(self, folder: Path, more: bool) -> None:
        """Take the state from a checkpoint, after which there may be more steps."""
        if not (file := folder / FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE}: it was saved without this callback. To go on with what "
                f"the regularizer holds now, put that there first: "
                "safetensors.torch.save_file(ewc.state_dict(), file)"
            )
        with safe_open(file, "pt") as stored:
            self.ewc.load_state_dict({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
            ended = (stored.metadata() or {}).get("ended") == "True"
        if ended and more:
            warn_of_next(folder)
        self._task.ended = ended and not more


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where the checkpoint of this step is, if there is one."""
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoint() -> Path:
    """Return the folder from which the trainer resumes, which it tells its own functions only."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(found, str | os.PathLike):
            return Path(found)
        frame = frame.f_back
    raise RuntimeError("this trainer does not tell from which checkpoint it resumes")


def _same_columns(dataset: Any, trained: Any) -> Any:
    """Leave out the columns that the trainer has left out of its own data, before collating."""
    if not (hasattr(dataset, "remove_columns") and hasattr(trained, "column_names")):
        return dataset
    kept = set(trained.column_names or [])
    return dataset.remove_columns([name for name in dataset.column_names if name not in kept])
