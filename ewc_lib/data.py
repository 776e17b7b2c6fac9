"""Handwritten digits to learn from: small and always there, or MNIST from a copy you have.

Nothing here uses the network. :func:`digits` ships with scikit-learn, :func:`mnist` reads a local
copy and checks every byte, :func:`images` picks one of them, so that the same code runs on either.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Images", "digits", "hold_out", "images", "mnist"]

Pixels = Float[Tensor, "N D"]
Labels = Int64[Tensor, "N"]


class Images(NamedTuple):
    """Flattened grey images in [0, 1] and the digits they show, split into train and test.

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
        """Number of classes: the ten digits."""
        return 10

    @property
    def n_features(self) -> int:
        """Number of pixels of one image."""
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
    source = _locate(root, _MNIST)
    read = _read_raw if source.is_dir() else _read_npz
    return _scaled("mnist", read(source, _MNIST), white=255, dtype=dtype)


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
        If the share leaves one of the parts empty.

    Examples
    --------
    >>> rest, valid = hold_out(digits(), 0.2)
    >>> rest.x_train.shape, rest.x_test.shape, valid.x_test.shape
    (torch.Size([1150, 64]), torch.Size([360, 64]), torch.Size([287, 64]))
    >>> valid.x_train is rest.x_train
    True
    """
    n = len(images.x_train)
    n_held = round(share * n)
    if not 0 < n_held < n:
        raise ValueError(f"a share of {share} leaves one part of the {n} training images empty")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held, left = (rows.to(images.x_train.device) for rows in order.split([n_held, n - n_held]))
    rest = images._replace(x_train=images.x_train[left], y_train=images.y_train[left])
    valid = rest._replace(x_test=images.x_train[held], y_test=images.y_train[held])
    return rest, valid


@dataclass(frozen=True)
class _Part:
    """One of an archive's four arrays: its names, its shape, the md5 of its idx file."""

    key: str
    idx: str
    shape: tuple[int, ...]
    md5: str

    @property
    def header(self) -> NDArray[np.uint32]:
        """What the idx file starts with: 8 for bytes, the number of axes, the shape."""
        return np.array([0x0800 + len(self.shape), *self.shape], ">u4")

    def files(self, folder: Path) -> list[Path]:
        """Return the idx files of this part in a folder, the plain one first."""
        names = (f"{self.idx}-ubyte", f"{self.idx}-ubyte.gz")
        return [folder / name for name in names if (folder / name).is_file()]


_Archive = tuple[_Part, _Part, _Part, _Part]  # in the order of the fields of Images

_MNIST: _Archive = (
    _Part("x_train", "train-images-idx3", (60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    _Part("y_train", "train-labels-idx1", (60000,), "a25bea736e30d166cdddb491f175f624"),
    _Part("x_test", "t10k-images-idx3", (10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    _Part("y_test", "t10k-labels-idx1", (10000,), "27ae3e4e09519cfbb04c329615203637"),
)


def _scaled(name: str, arrays: tuple[Any, ...], *, white: int, dtype: torch.dtype) -> Images:
    """Flatten the pixels and divide them by the value that means white."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    x_train, y_train, x_test, y_test = (torch.tensor(array) for array in arrays)
    x_train, x_test = (x.to(dtype).flatten(1) / white for x in (x_train, x_test))
    return Images(name, x_train, y_train.long(), x_test, y_test.long())


def _locate(root: str | Path | None, archive: _Archive) -> Path:
    """Return the npz file or the raw folder at the one place to look at."""
    named = (os.environ.get("EWC_DATA") or None) if root is None else root
    origin = "the environment variable EWC_DATA" if root is None else "the argument root"
    place = Path(os.path.expanduser("~/.cache/ewc_lib" if named is None else named))
    files = [file for file in (place, place / "mnist.npz") if file.is_file()]
    folders = (place / "MNIST" / "raw", place)
    found = files + [folder for folder in folders if any(part.files(folder) for part in archive)]
    if found:
        return found[0]
    if named is None:
        raise FileNotFoundError(
            f"found no MNIST: set EWC_DATA to any existing copy, or put one into {place}, either "
            "torchvision's folder MNIST/raw or Keras' mnist.npz "
            "(https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz)."
        )
    state = "holds no MNIST" if place.exists() else "does not exist"
    raise FileNotFoundError(
        f"{place}, named by {origin}, {state}: looked for the file mnist.npz and for a folder "
        "with mnist.npz, MNIST/raw/*-ubyte[.gz] or *-ubyte[.gz]"
    )


def _read_npz(path: Path, archive: _Archive) -> tuple[NDArray[np.uint8], ...]:
    content = path.read_bytes()
    with _blaming(path):
        zipfile.ZipFile(io.BytesIO(content)).close()  # of what is no zip np.load says "pickled"
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = [np.asarray(stored[part.key]) for part in archive]
    return tuple(_verified(a, p, f"{path} ({p.key})") for a, p in zip(arrays, archive, strict=True))


def _read_raw(folder: Path, archive: _Archive) -> tuple[NDArray[np.uint8], ...]:
    missing = [f"{part.idx}-ubyte" for part in archive if not part.files(folder)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: neither plain nor .gz")
    return tuple(_read_idx(part.files(folder)[0], part) for part in archive)


def _read_idx(path: Path, part: _Part) -> NDArray[np.uint8]:
    content = path.read_bytes()
    with _blaming(path):
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        header = np.frombuffer(content, ">u4", part.header.size)
        if header[0] != part.header[0]:
            raise ValueError(f"magic number {header[0]}, expected {part.header[0]}")
        array = np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:])
    return _verified(array, part, str(path))


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Name the file whatever its decoder raises, which depends on the byte that is damaged."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _verified(array: NDArray[Any], part: _Part, where: str) -> NDArray[np.uint8]:
    """Return the array if, written as an idx file, it is the one published."""
    if array.dtype != np.uint8 or array.shape != part.shape:
        raise ValueError(f"{where} is {array.dtype} {array.shape}, expected uint8 {part.shape}")
    md5 = hashlib.md5(part.header.tobytes() + array.tobytes(), usedforsecurity=False).hexdigest()
    if md5 != part.md5:
        raise ValueError(f"{where} has the checksum {md5}, expected {part.md5}")
    return array
