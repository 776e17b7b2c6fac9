"""Where all classes so far are read, whatever was read in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_lib.continual import MultiHead, Stream, accuracy
from ewc_lib.ewc import EWC
from ewc_lib.experiments.streams.fisher_variants import of_batch_means
from ewc_lib.fisher.structures import Diagonal
from ewc_lib.quadratic import QuadraticPenalty

__all__ = [
    "ClippedPenalty",
    "OfAllClasses",
    "after_correction",
    "all_so_far",
    "among_all",
    "corrected",
]

Labelled: TypeAlias = tuple[Tensor, Tensor]

CLIP = 1e-4
"""Where PyCIL, and the authors of EWC-DR with it, cut an importance off."""


class ClippedPenalty(QuadraticPenalty):
    """EWC as in PyCIL, and EWC-DR as its authors have it.

    The importance is the mean of squared gradients of the mean loss of a batch, with the observed
    labels and the softmax over all classes so far, cut off at a ten-thousandth. It is averaged over
    tasks, around the latest parameters. The code of both is public: ``models/ewc.py`` in
    G-U-N/PyCIL, ``models/ewc_dr.py`` in scarlet0703/EWC-DR. In the former the importance of an
    output that is new is not averaged; here it is, with the zeros of the tasks before.

    Parameters
    ----------
    model, strength
        As in :class:`ewc_lib.EWC`.
    reverse
        Whether the logits change their sign for the importance.
    batch_size
        Observations of a batch.
    """

    def __init__(
        self, model: nn.Module, strength: float, *, reverse: bool, batch_size: int
    ) -> None:
        super().__init__(model, strength)
        self._reverse, self._size = reverse, batch_size

    def consolidate(self, data: Labelled) -> None:
        """Average the importance of a task into the others and take the present parameters."""
        sign = -1 if self._reverse else 1
        hook = self.model.register_forward_hook(lambda module, inputs, z: sign * z)
        with hook, all_so_far(self.model, data) as labelled:
            found = of_batch_means(self.model, labelled, batch_size=self._size)
        values = {name: value.clamp(max=CLIP) for name, value in found.values.items()}
        new = Diagonal(len(data[0]), "clipped batch means", dict.fromkeys(values, "rule"), values)
        t = self.n_tasks
        self._replace(
            new if self.precision is None else t / (t + 1) * self.precision + new / (t + 1)
        )


class OfAllClasses(EWC):
    """EWC with the Fisher information of the softmax over all classes so far."""

    def consolidate(self, data: Labelled, **options: Any) -> Any:
        with all_so_far(self.model, data) as labelled:
            return super().consolidate(labelled, **options)


@contextmanager
def all_so_far(model: nn.Module, data: Labelled) -> Iterator[Labelled]:
    """Read the outputs of all classes so far, and yield the data with labels that fit."""
    assert isinstance(model, MultiHead)
    head = model.outputs
    assert head is not None
    model.outputs = range(head.stop)
    try:
        yield data[0], data[1] + head.start
    finally:
        model.outputs = head


def among_all(model: nn.Module, test: Labelled) -> float:
    """Return the accuracy where all outputs compete, whichever head is read."""
    assert isinstance(model, MultiHead)
    start = 0 if model.outputs is None else model.outputs.start
    return accuracy(model.net, (test[0], test[1] + start))


@torch.no_grad()
def after_correction(
    model: MultiHead, stream: Stream, valid: Stream, kept: int
) -> dict[str, float]:
    """Return the accuracies on test and validation images, corrected by a few training images.

    Parameters
    ----------
    model
        One that has learned all tasks.
    stream, valid
        The same tasks with test and with validation images.
    kept
        Images of each class that the correction is fitted by.

    Returns
    -------
    dict
        ``corrected`` and ``corrected_valid``.
    """
    n, k, device = len(stream), stream.n_classes, next(model.parameters()).device

    def outputs(parts: Iterable[Labelled]) -> Labelled:
        found = [(model.net(x.to(device)).cpu(), y % k + k * t) for t, (x, y) in enumerate(parts)]
        z, y = map(torch.cat, zip(*found, strict=True))
        return z, y

    few = outputs(_some_of_each(task.train, kept) for task in stream)
    tests = {"corrected": stream, "corrected_valid": valid}
    judged = {name: outputs(own.test(t) for t in range(n)) for name, own in tests.items()}
    with torch.enable_grad():
        return {name: corrected(*own, *few, n) for name, own in judged.items()}


def _some_of_each(data: Labelled, n: int) -> Labelled:
    """Return the first images of each class."""
    x, y = data
    rows = torch.cat([(y == label).nonzero().squeeze(1)[:n] for label in y.unique()])
    return x[rows], y[rows]


def corrected(z: Tensor, y: Tensor, few: Tensor, y_few: Tensor, n_tasks: int) -> float:
    """Return the accuracy after a scale and a shift of the outputs of each task.

    These are the two numbers a task of bias correction (BiC; Wu et al. 2019), all fitted at the end
    by the cross-entropy of a few images. A scale has a Gaussian prior around 1, so that images
    which can be told apart do not make it infinite.

    Parameters
    ----------
    z, y
        Outputs ``[N, C]`` and labels to judge by.
    few, y_few
        Those to fit by.
    n_tasks
        The outputs of a task lie beside each other.
    """
    n, classes = len(few), z.shape[1] // n_tasks
    scale = torch.ones(n_tasks, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(n_tasks, dtype=torch.float64, requires_grad=True)

    def moved(outputs: Tensor) -> Tensor:
        parts = outputs.double().unflatten(1, (n_tasks, classes))
        found: Tensor = (parts * scale[:, None] + shift[:, None]).flatten(1)
        return found

    optimizer = torch.optim.LBFGS([scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = F.cross_entropy(moved(few), y_few) + (scale - 1).square().sum() / (2 * n)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float((moved(z).argmax(1) == y).double().mean())
