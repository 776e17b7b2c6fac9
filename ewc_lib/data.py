"""Images to learn from: small and always there, or MNIST and its like from a copy you have.

Nothing here uses the network. :func:`digits` ships with scikit-learn, :func:`mnist` and the others
read a local copy and check every byte, :func:`images` picks one of the first two, so that the same
code runs on either.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from ewc_lib import _archives

__all__ = [
    "Images",
    "cifar10",
    "digits",
    "fashion_mnist",
    "hold_out",
    "images",
    "kmnist",
    "local_copy",
    "mnist",
    "padded",
]

Pixels = Float[Tensor, "N D"]
Labels = Int64[Tensor, "N"]


class Images(NamedTuple):
    """Flattened images in [0, 1] and their classes, split into train and test.

    Images with three colours are flattened colour by colour.

    Examples
    --------
    >>> x, y = digits().train
    >>> x.shape, y.shape
    (torch.Size([1437, 64]), torch.Size([1437]))
    """

    name: str
    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels

    @property
    def train(self) -> tuple[Pixels, Labels]:
        """Images and labels to learn from."""
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[Pixels, Labels]:
        """Images and labels held out."""
        return self.x_test, self.y_test

    @property
    def n_classes(self) -> int:
        """Number of classes: ten in all data sets here."""
        return 10

    @property
    def n_features(self) -> int:
        """Number of pixels of one image, times that of colours."""
        return self.x_train.shape[1]


def digits(
    *, test_fraction: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Images:
    """Return scikit-learn's 1,797 real 8x8 images of handwritten digits.

    Parameters
    ----------
    test_fraction : float
        Share of the images held out, between 0 and 1. Every digit keeps its share.
    seed : int
        Which split; the same seed gives the same split. The global random state is not used.
    dtype : torch.dtype
        Floating-point type of the images.

    Examples
    --------
    >>> data = digits()
    >>> data.x_train.shape, data.x_test.shape
    (torch.Size([1437, 64]), torch.Size([360, 64]))
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install scikit-learn") from error
    if not 0 < test_fraction < 1:  # scikit-learn would read 1 as one image
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        pixels, labels, test_size=test_fraction, random_state=seed, stratify=labels
    )
    return _scaled("digits", (x_train, y_train, x_test, y_test), white=16, dtype=dtype)


def mnist(root: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> Images:
    """Return MNIST, 60,000 + 10,000 images of 28x28 pixels, read from a local copy.

    Parameters
    ----------
    root : path, optional
        The file ``mnist.npz`` (Keras), a folder that holds it, a folder that holds
        ``MNIST/raw/*-ubyte[.gz]`` (torchvision), or that raw folder itself. Default:
        ``$EWC_DATA`` if it is set and not empty, else ``~/.cache/ewc_lib``.
    dtype : torch.dtype
        Floating-point type of the images.

    Raises
    ------
    FileNotFoundError
        If there is no copy, or no whole one, at that place. No other place is then tried.
    ValueError
        If a file is damaged or differs from the published MNIST in a single byte.

    Examples
    --------
    Not run as a test, because there need not be a copy:

    >>> mnist("~/data").x_train.shape  # doctest: +SKIP
    torch.Size([60000, 784])
    """
    return _scaled("mnist", _archives.read(root, _archives.MNIST), white=255, dtype=dtype)


def fashion_mnist(root: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> Images:
    """Return Fashion-MNIST (Xiao et al. 2017), read from a local copy: clothes for digits.

    Parameters
    ----------
    root : path, optional
        A folder that holds ``FashionMNIST/raw/*-ubyte.gz``, as torchvision leaves it, or that raw
        folder itself. Checksums are published of the ``.gz`` files only, so these are read.
    dtype : torch.dtype
        Floating-point type of the images.

    Notes
    -----
    The default place and what is raised are as for :func:`mnist`.
    """
    arrays = _archives.read(root, _archives.FASHION_MNIST)
    return _scaled("fashion-mnist", arrays, white=255, dtype=dtype)


def kmnist(root: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> Images:
    """Return Kuzushiji-MNIST (Clanuwat et al. 2018), read from a local copy: ten hiragana.

    Parameters
    ----------
    root, dtype
        As for :func:`fashion_mnist`, with the folder ``KMNIST``.
    """
    return _scaled("kmnist", _archives.read(root, _archives.KMNIST), white=255, dtype=dtype)


def cifar10(root: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> Images:
    """Return CIFAR-10 (Krizhevsky 2009), 50,000 + 10,000 images of 3x32x32, from a local copy.

    Parameters
    ----------
    root : path, optional
        The folder ``cifar-10-batches-py`` of the version for Python, or one that holds it.
        Default: as for :func:`mnist`.
    dtype : torch.dtype
        Floating-point type of the images.

    Notes
    -----
    It fails as :func:`mnist` does. The files are pickles, which may run any code: each is compared
    with its published checksum before it is opened.
    """
    return _scaled("cifar10", _archives.read(root, _archives.CIFAR10), white=255, dtype=dtype)


def local_copy(root: str | Path | None = None) -> Images:
    """Return the first of MNIST, Fashion-MNIST, Kuzushiji-MNIST and CIFAR-10 that is at a place.

    Parameters
    ----------
    root : path, optional
        As for :func:`mnist`, which also says what is raised. Fashion-MNIST beside MNIST is found
        by its own raw folder.
    """
    problems: list[Exception] = []
    for read in (mnist, fashion_mnist, kmnist, cifar10):
        try:
            return read(root)
        except (FileNotFoundError, ValueError) as problem:
            problems.append(problem)
    if all(isinstance(problem, FileNotFoundError) for problem in problems):
        raise problems[0]
    raise ValueError(f"no whole data set: {'; '.join(map(str, problems))}")


def images() -> Images:
    """Return MNIST if ``$EWC_DATA`` is set, else the digits of scikit-learn.

    Examples
    --------
    >>> images().n_classes
    10
    """
    return mnist() if os.environ.get("EWC_DATA") else digits()


def hold_out(images: Images, share: float = 0.1, *, seed: int = 0) -> tuple[Images, Images]:
    """Hold some of the training images out, so that settings need not be chosen on test images.

    Parameters
    ----------
    images
        Any data set.
    share
        Of the training images, between 0 and 1, drawn at random.
    seed
        Which ones; the global random state is not used.

    Returns
    -------
    rest, valid
        Two data sets with the same training images, those that are left. The first has the test
        images, the second those that are held out in their place.

    Raises
    ------
    ValueError
        If the share is not between 0 and 1, or leaves one of the parts empty.

    Examples
    --------
    >>> rest, valid = hold_out(digits(), 0.2)
    >>> rest.x_train.shape, rest.x_test.shape, valid.x_test.shape
    (torch.Size([1150, 64]), torch.Size([360, 64]), torch.Size([287, 64]))
    """
    n = len(images.x_train)
    n_held = round(share * n) if 0 < share < 1 else 0
    if not 0 < n_held < n:
        raise ValueError(f"share must lie between 0 and 1 and split {n} images, got {share}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held, left = (rows.to(images.x_train.device) for rows in order.split([n_held, n - n_held]))
    rest = images._replace(x_train=images.x_train[left], y_train=images.y_train[left])
    return rest, rest._replace(x_test=images.x_train[held], y_test=images.y_train[held])


def padded(images: Images, side: int) -> Images:
    """Return square images with a black frame around them, as van de Ven and Tolias (2019) do.

    Parameters
    ----------
    images, side
        Square images of one channel, and pixels of each side of the result. An odd pixel goes to
        the right and to the bottom.

    Raises
    ------
    ValueError
        If the images are not square, of several sizes, or larger than the result.

    Examples
    --------
    >>> padded(digits(), 10).x_train.shape
    torch.Size([1437, 100])
    """
    sizes = {images.x_train.shape[1], images.x_test.shape[1]}
    old = math.isqrt(images.n_features)
    if sizes != {old**2} or side < old:
        pixels = " and ".join(map(str, sorted(sizes)))
        raise ValueError(f"cannot pad images of {pixels} pixels to {side}x{side}")
    frame = (side - old) // 2, (side - old + 1) // 2
    x_train, x_test = (
        nn.functional.pad(x.unflatten(1, (old, old)), frame * 2).flatten(1)
        for x in (images.x_train, images.x_test)
    )
    return images._replace(x_train=x_train, x_test=x_test)


def _scaled(name: str, arrays: Sequence[NDArray[Any]], *, white: int, dtype: torch.dtype) -> Images:
    """Flatten the pixels and divide them by the value that means white."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    x_train, y_train, x_test, y_test = (torch.tensor(array) for array in arrays)
    x_train, x_test = (x.to(dtype).flatten(1) / white for x in (x_train, x_test))
    return Images(name, x_train, y_train.long(), x_test, y_test.long())
