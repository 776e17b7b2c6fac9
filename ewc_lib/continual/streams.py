"""Streams: tasks made from one data set, one after another.

A data set has images, labels, and a training and a test part; a task is a part of it, or all of
it with its pixels in another order or its images turned. What a network has to know about a task
is the *scenario* (van de Ven and Tolias 2019): with ``"task"`` it is told which task an image
belongs to and has one head for each; with ``"domain"`` all tasks share one head; with ``"class"``
the classes of all tasks so far have to be told apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ewc_lib.data import Images

__all__ = ["Scenario", "Stream", "Task", "permute_pixels", "permuted", "rotated", "split"]

Scenario: TypeAlias = Literal["task", "domain", "class"]
Labelled: TypeAlias = tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]


class Source(Protocol):
    """A data set: :class:`ewc_lib.data.Images`, or anything with these tensors."""

    @property
    def x_train(self) -> Float[Tensor, "N D"]: ...
    @property
    def y_train(self) -> Int[Tensor, " N"]: ...
    @property
    def x_test(self) -> Float[Tensor, "M D"]: ...
    @property
    def y_test(self) -> Int[Tensor, " M"]: ...


class Task(NamedTuple):
    """One task of a stream.

    Parameters
    ----------
    name
        For tables and figures.
    train, test
        Inputs ``[N, D]`` and labels ``[N]``, which count from the first of the outputs.
    outputs
        The outputs of the network that are read while it learns the task.
    """

    name: str
    train: Labelled
    test: Labelled
    outputs: range


@dataclass(frozen=True, eq=False)
class Stream(Sequence[Task]):
    """Tasks in their order. Each is made when it is asked for, so only one is in memory.

    Attributes
    ----------
    name
        For tables and files.
    source
        The data set that all tasks are made from.
    scenario
        ``"task"``, ``"domain"`` or ``"class"``.
    n_classes
        Number of classes of one task.
    names
        Of the tasks.
    change
        Turns inputs and labels of the data set into those of a task, by its number. Labels are
        then from 0 to ``n_classes - 1``.
    settings
        What the tasks depend on beside the data set, such as a seed. A checkpoint of another
        stream is told by them.
    """

    name: str
    source: Source
    scenario: Scenario
    n_classes: int
    names: tuple[str, ...]
    change: Callable[[int, Tensor, Tensor], Labelled]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """Size of an input."""
        return self.source.x_train.shape[1]

    @property
    def n_outputs(self) -> int:
        """Number of outputs that the network needs."""
        return self.n_classes if self.scenario == "domain" else self.n_classes * len(self)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Task]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Task:  # type: ignore[override]
        t = range(len(self))[operator.index(t)]
        train = self._part(t, self.source.x_train, self.source.y_train, "training")
        test = self.test(t)
        _check_classes(f"task {self.names[t]!r}", train[1], test[1])
        return Task(self.names[t], train, test, self.outputs(t, after=t))

    def test(self, t: int) -> Labelled:
        """Return the test part of a task alone, which is smaller than the whole task."""
        return self._part(t, self.source.x_test, self.source.y_test, "test")

    def _part(self, t: int, x: Tensor, y: Tensor, which: str) -> Labelled:
        x, y = self.change(t, x, y)
        if not len(x):
            raise ValueError(f"task {self.names[t]!r} has no {which} data")
        return x, y + (self.n_classes * t if self.scenario == "class" else 0)

    def outputs(self, task: int, after: int) -> range:
        """Return the outputs that are read for a task when task ``after`` is the last learned.

        They differ with ``after`` in the class scenario only, where all classes so far compete.
        """
        k = self.n_classes
        if self.scenario == "domain":
            return range(k)
        if self.scenario == "task":
            return range(k * task, k * (task + 1))
        return range(k * (after + 1))


def _check_classes(name: str, train: Tensor, test: Tensor) -> None:
    if unseen := sorted(set(test.unique().tolist()) - set(train.unique().tolist())):
        raise ValueError(f"the test data of {name} hold classes {unseen} without training data")


def permute_pixels(images: Images, seed: int) -> Images:
    """Shuffle the pixels of all images by one fixed random permutation: a new task.

    The new task is exactly as hard as the old one for a network without convolutions, and what
    one of them taught about pixels is useless for the other (Goodfellow et al. 2014).

    Parameters
    ----------
    images
        The original task.
    seed
        Which permutation.

    Returns
    -------
    Images
        The same labels and images, with their pixels in another order.

    Examples
    --------
    >>> from ewc_lib import data
    >>> a = data.digits()
    >>> b = permute_pixels(a, seed=1)
    >>> bool((a.x_train.sum(1) - b.x_train.sum(1)).abs().max() < 1e-4)  # pixels only moved
    True
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images.n_features, generator=generator)
    return images._replace(
        name=f"{images.name}, permuted by {seed}",
        x_train=images.x_train[:, order],
        x_test=images.x_test[:, order],
    )


def permuted(images: Source, n_tasks: int, *, seed: int, scenario: Scenario = "domain") -> Stream:
    """Return tasks that differ by the order of the pixels, which is random in all of them.

    Parameters
    ----------
    images
        The data set.
    n_tasks
        How many tasks.
    seed
        Of all permutations.
    scenario
        By default all tasks share one head, as usual for permuted images (Goodfellow et al.
        2014; Kirkpatrick et al. 2017).

    Raises
    ------
    ValueError
        If the number of tasks is not positive, the scenario is unknown, or the data set is empty
        or has negative labels.

    Examples
    --------
    >>> from ewc_lib import data
    >>> stream = permuted(data.digits(), 3, seed=0)
    >>> len(stream), stream.n_outputs, stream[2].train[0].shape
    (3, 10, torch.Size([1437, 64]))
    """
    _check(images, n_tasks, scenario)
    generator = torch.Generator().manual_seed(seed)
    n_features = images.x_train.shape[1]
    orders = [torch.randperm(n_features, generator=generator) for _ in range(n_tasks)]

    def change(t: int, x: Tensor, y: Tensor) -> Labelled:
        return x[:, orders[t]], y

    names = tuple(f"permutation {t + 1}" for t in range(n_tasks))
    n_classes = _n_classes(images)
    return Stream("permuted", images, scenario, n_classes, names, change, {"seed": seed})


def rotated(images: Source, angles: Sequence[float], *, scenario: Scenario = "domain") -> Stream:
    """Return tasks that differ by the angle by which all images are turned.

    Unlike permutations, small angles leave the tasks similar (Lopez-Paz and Ranzato 2017).

    Parameters
    ----------
    images
        The data set, of square images.
    angles
        In degrees, counter-clockwise. What comes in from outside the image is black.
    scenario
        As for :func:`permuted`.

    Raises
    ------
    ValueError
        If there is no angle, the scenario is unknown, the images are not square, or the data set
        is empty or has negative labels.

    Examples
    --------
    >>> import torch
    >>> from ewc_lib import data
    >>> digits = data.digits()
    >>> stream = rotated(digits, [0, 90])
    >>> torch.allclose(stream[0].train[0], digits.x_train, atol=1e-5)
    True
    """
    angles = [float(angle) for angle in angles]
    _check(images, len(angles), scenario)
    n_features = images.x_train.shape[1]
    if math.isqrt(n_features) ** 2 != n_features:
        raise ValueError(f"only square images can be turned, got {n_features} pixels")

    def change(t: int, x: Tensor, y: Tensor) -> Labelled:
        return turn(x, angles[t]), y

    names = tuple(f"{angle:g}°" for angle in angles)
    n_classes = _n_classes(images)
    return Stream("rotated", images, scenario, n_classes, names, change, {"angles": angles})


def turn(x: Float[Tensor, "N D"], degrees: float) -> Float[Tensor, "N D"]:
    """Turn flattened square images counter-clockwise, with bilinear interpolation."""
    side, angle = math.isqrt(x.shape[1]), math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    where = torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]], dtype=x.dtype, device=x.device)
    grid = F.affine_grid(where, [1, 1, side, side], align_corners=False)
    images = x.reshape(1, -1, side, side)  # as the channels of one image, all by the same grid
    return F.grid_sample(images, grid, align_corners=False).reshape(x.shape)


def split(
    images: Source, n_tasks: int = 5, *, scenario: Scenario, seed: int | None = None
) -> Stream:
    """Return tasks with some of the classes each, as many in every task.

    Parameters
    ----------
    images
        The data set.
    n_tasks
        How many tasks.
    scenario
        Whether the network is told the task, need not know it, or has to infer it.
    seed
        Of the order in which the classes come; None keeps their own order.

    Raises
    ------
    ValueError
        If the number of classes is not a multiple of the number of tasks, if test data hold a
        class without training, if the scenario is unknown, or if the data set is empty.

    Examples
    --------
    >>> from ewc_lib import data
    >>> stream = split(data.digits(), scenario="class")
    >>> [task.outputs for task in stream][:2], stream[1].train[1].unique()
    ([range(0, 2), range(0, 4)], tensor([2, 3]))
    """
    _check(images, n_tasks, scenario)
    classes = images.y_train.unique()
    _check_classes("the data set", images.y_train, images.y_test)
    if len(classes) % n_tasks:
        raise ValueError(f"{len(classes)} classes cannot be split into {n_tasks} equal tasks")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        classes = classes[torch.randperm(len(classes), generator=generator).to(classes.device)]
    groups = classes.chunk(n_tasks)

    def change(t: int, x: Tensor, y: Tensor) -> Labelled:
        match = y[:, None] == groups[t]
        chosen = match.any(1)
        return x[chosen], match[chosen].int().argmax(1)  # numbered in the order of the group

    names = tuple(" and ".join(map(str, group.tolist())) for group in groups)
    return Stream("split", images, scenario, len(groups[0]), names, change, {"seed": seed})


def _check(images: Source, n_tasks: int, scenario: str) -> None:
    if not len(images.y_train):
        raise ValueError("the data set has no training data")
    if n_tasks < 1:
        raise ValueError(f"a stream needs at least one task, got {n_tasks}")
    if scenario not in get_args(Scenario):
        known = ", ".join(map(repr, get_args(Scenario)))
        raise ValueError(f"scenario must be one of {known}, got {scenario!r}")


def _n_classes(images: Source) -> int:
    if (lowest := int(images.y_train.min())) < 0:
        raise ValueError(f"labels must not be negative, got {lowest}")
    return int(images.y_train.max()) + 1
