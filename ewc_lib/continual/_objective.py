"""What a model is trained by, and how well it does by the same measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._calling import forward, output_tensor
from ewc_lib._checking import settle
from ewc_lib._restoring import evaluating
from ewc_lib.continual._reading import Piece, device_of, in_order
from ewc_lib.continual.metrics import CHUNK, class_axis, right_answers
from ewc_lib.likelihood.agreement import Criterion
from ewc_lib.likelihood.categorical import Categorical
from ewc_lib.likelihood.labelled import takes
from ewc_lib.likelihood.outputs import given_distribution

WAYS_OUT = (
    "Real targets, as of a regression: criterion=torch.nn.MSELoss(), or a regularizer with "
    "likelihood='gaussian'. Labels that are 0 or 1: criterion=torch.nn.BCEWithLogitsLoss(), or "
    "likelihood='bernoulli'. Counts: likelihood='poisson'. Probabilities of the classes: "
    "criterion=torch.nn.CrossEntropyLoss(). Classes: integers, as by y.long()"
)


class Objective:
    """The loss of a task, without any penalty.

    It is the first of these that there is: the criterion; the loss that the model computes from a
    batch that is a dict with labels; the negative log-likelihood, as the regularizer names it;
    the cross-entropy of integer labels.

    Parameters
    ----------
    model
        The network.
    regularizer
        Whose ``criterion`` and ``likelihood`` count, where it has them.
    criterion
        A function of output and target.

    Raises
    ------
    ValueError
        If the criterion is no function, or the likelihood unknown.
    """

    def __init__(
        self, model: nn.Module, regularizer: Any = None, criterion: Criterion | None = None
    ) -> None:
        if criterion is None:
            criterion = getattr(regularizer, "criterion", None)
        if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
            raise ValueError(
                "criterion must be a function of output and target, as torch.nn.MSELoss() is, got "
                f"{criterion!r}"
            )
        self.model, self.criterion = model, criterion
        self.distribution = given_distribution(getattr(regularizer, "likelihood", None))
        self._checked = False

    def loss(self, piece: Piece) -> Float[Tensor, ""]:
        """Return the loss of one batch, a mean."""
        output, own = self._run(piece)
        return self._mean(output, piece.target) if own is None else own

    def score(self, data: Any) -> float:
        """Return the accuracy for classes, else the mean of minus the loss: more is better."""
        total, n = 0.0, 0
        device = device_of(self.model)
        with evaluating(self.model), torch.random.fork_rng(devices=()), torch.no_grad():
            for piece in in_order(data, device, CHUNK):
                part, weight = self._judge(piece)
                total, n = total + part, n + weight
        return total / n if n else float("nan")

    def _judge(self, piece: Piece) -> tuple[float, int]:
        """Return a sum, and of how many."""
        output, own = self._run(piece)
        target = piece.target
        if self._of_classes(output, target, own):
            return self._right(output, target)
        loss = self._mean(output, target) if own is None else own
        return -float(loss) * len(target), len(target)

    def _run(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the loss that the model itself computes, if it does."""
        if self.criterion is not None or not piece.labelled or not takes(self.model, "labels"):
            return forward(self.model, piece.inputs), None
        found = self.model(**piece.inputs, labels=piece.target)
        if isinstance(found, tuple) and len(found) > 1 and _is_number(found[0]):
            return output_tensor(found[1]), found[0]
        loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        return output_tensor(found), loss

    def _of_classes(self, output: Tensor, target: Tensor, own: Tensor | None) -> bool:
        """Tell whether the most likely class may be compared with the target, entry by entry."""
        if own is None and self.criterion is None and self.distribution is not None:
            return isinstance(self.distribution, Categorical)
        if not _of_integers(target) or output.dim() != target.dim() + 1:
            return False
        if own is None and self.criterion is None:
            return True
        # the loss of a sequence may be about the label that follows
        return target.dim() == 1 or isinstance(self.criterion, nn.CrossEntropyLoss | nn.NLLLoss)

    def _right(self, output: Tensor, target: Tensor) -> tuple[int, int]:
        known = self.distribution
        if not isinstance(known, Categorical):
            ignored = getattr(self.criterion, "ignore_index", -100)
            return right_answers(output, target, ignore_index=ignored)
        if known.next_token:
            output, target = output[:, :-1], target[:, 1:]
        axis = -1 if known.class_dim is None else known.class_dim
        return right_answers(output, target, axis, known.ignore_index)

    def _mean(self, output: Tensor, target: Tensor) -> Tensor:
        if self.criterion is not None:
            loss = self.criterion(output, target)
            if not _is_number(loss):
                raise ValueError(
                    "criterion must return one number, a tensor without axes, got "
                    f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
                )
            return loss
        if self.distribution is not None:
            problems = self.distribution.problems(output.detach(), target)
            if not self._checked:  # later, only what shapes and types show: the device is not asked
                settle(problems)
                self._checked = True
            return -self.distribution.log_prob(output, target).mean()
        return _cross_entropy(output, target)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over labels, if they are classes."""
    if not _of_integers(target):
        raise ValueError(
            f"nothing says how targets of {target.dtype} are to be read, and so what loss there "
            f"is. {WAYS_OUT}"
        )
    if output.shape in (target.shape, (*target.shape, 1)):
        raise ValueError(
            f"an output {list(output.shape)} for targets {list(target.shape)} is one number for "
            f"each, and there is no choice between classes. {WAYS_OUT}"
        )
    axis = class_axis(output, target)
    return F.cross_entropy(output if axis == 1 else output.movedim(axis, 1), target.long())


def _of_integers(target: Tensor) -> bool:
    real = target.is_floating_point() or target.is_complex()
    return not real and target.dtype != torch.bool


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
