"""Streams: tasks made from one data set, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ewc_lib._forms import is_data_set
from ewc_lib.continual.tasks import Labelled, Scenario, Source, Stream, check_classes
from ewc_lib.data import Images

__all__ = ["permute_pixels", "permuted", "rotated", "split"]


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
    TypeError
        If the data set has not the four tensors of :class:`ewc_lib.data.Images`.

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
    TypeError
        If the data set has not the four tensors of :class:`ewc_lib.data.Images`.

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
    TypeError
        If the data set has not the four tensors of :class:`ewc_lib.data.Images`.

    Examples
    --------
    >>> from ewc_lib import data
    >>> stream = split(data.digits(), scenario="class")
    >>> [task.outputs for task in stream][:2], stream[1].train[1].unique()
    ([range(0, 2), range(0, 4)], tensor([2, 3]))
    """
    _check(images, n_tasks, scenario)
    classes = images.y_train.unique()
    check_classes("the data set", images.y_train, images.y_test)
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


def _check(images: Any, n_tasks: int, scenario: str) -> None:
    if missing := [n for n in ("x_train", "y_train", "x_test", "y_test") if not hasattr(images, n)]:
        way_out = ""
        if is_data_set(images):
            way_out = (
                "; learn takes data sets as they are, [(name, train, test), ...], and "
                "torch.utils.data.Subset(dataset, rows) makes one of some classes"
            )
        raise TypeError(
            "a stream is made from one object with the tensors x_train, y_train, x_test and "
            f"y_test, as ewc_lib.data.Images; {type(images).__name__} has no "
            f"{', '.join(missing)}{way_out}"
        )
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
