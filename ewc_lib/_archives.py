"""Local copies of published data sets: where they lie, and whether every byte is right."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = tuple[NDArray[np.uint8], ...]
"""Images and labels for training, then for testing."""


@dataclass(frozen=True)
class Part:
    """One of an archive's four arrays: its names, its shape, and a published md5.

    It is that of the idx file, or of its ``.gz`` file if only that is known.
    """

    key: str
    idx: str
    shape: tuple[int, ...]
    md5: str
    of_gz: bool = False

    @property
    def header(self) -> NDArray[np.uint32]:
        """What the idx file starts with: 8 for bytes, the number of axes, the shape."""
        return np.array([0x0800 + len(self.shape), *self.shape], ">u4")

    def files(self, folder: Path) -> list[Path]:
        """Return the files of this part in a folder that can be checked, the plain one first."""
        names = (f"{self.idx}-ubyte", f"{self.idx}-ubyte.gz")[self.of_gz :]
        return [folder / name for name in names if (folder / name).is_file()]


class Idx(NamedTuple):
    """An archive in the format of MNIST.

    Parameters
    ----------
    title
        What it is called.
    folder
        The one of torchvision.
    parts
        In the order of :data:`Arrays`.
    forms, looked_for
        For the messages: how a copy may be given, and what was looked for.
    npz
        The file of Keras, if it is read.
    """

    title: str
    folder: str
    parts: tuple[Part, ...]
    forms: str
    looked_for: str
    npz: str = ""

    def sources(self, place: Path) -> list[Path]:
        """Return the npz file and the raw folders at a place."""
        files = [file for file in (place, place / self.npz) if self.npz and file.is_file()]
        folders = (place / self.folder / "raw", place)
        return files + [f for f in folders if any(part.files(f) for part in self.parts)]

    def read(self, source: Path) -> Arrays:
        """Read one of the sources."""
        return self._raw(source) if source.is_dir() else self._of_npz(source)

    def _of_npz(self, path: Path) -> Arrays:
        content = path.read_bytes()
        with _blaming(path):
            zipfile.ZipFile(io.BytesIO(content)).close()  # of no zip np.load says "pickled"
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                arrays = [np.asarray(stored[part.key]) for part in self.parts]
        pairs = zip(arrays, self.parts, strict=True)
        return tuple(_verified(array, part, f"{path} ({part.key})") for array, part in pairs)

    def _raw(self, folder: Path) -> Arrays:
        missing = [part for part in self.parts if not part.files(folder)]
        if missing:
            gz = any(part.of_gz for part in missing)
            names = ", ".join(f"{part.idx}-ubyte{'.gz' * gz}" for part in missing)
            why = "only of the .gz files a checksum is published" if gz else "neither plain nor .gz"
            raise FileNotFoundError(f"{folder} lacks {names}: {why}")
        return tuple(_read_idx(part.files(folder)[0], part) for part in self.parts)


class Pickles(NamedTuple):
    """An archive of pickled batches, as CIFAR-10: names and md5 of the files, for both parts."""

    title: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    forms: str
    looked_for: str

    def sources(self, place: Path) -> list[Path]:
        """Return the folders at a place that hold a batch."""
        folders = (place / self.folder, place)
        return [f for f in folders if any((f / name).is_file() for name in self._files)]

    @property
    def _files(self) -> dict[str, str]:
        return {**self.train, **self.test}

    def read(self, source: Path) -> Arrays:
        """Read the batches of a folder, each of which is checked before it is opened."""
        if missing := [name for name in self._files if not (source / name).is_file()]:
            raise FileNotFoundError(f"{source} lacks {', '.join(missing)}")
        train, test = (_joined(source, files) for files in (self.train, self.test))
        return *train, *test


Archive: TypeAlias = Idx | Pickles


def read(root: str | Path | None, archive: Archive) -> Arrays:
    """Read the copy at the one place to look at: the root, ``$EWC_DATA``, or the cache."""
    named = (os.environ.get("EWC_DATA") or None) if root is None else root
    origin = "the environment variable EWC_DATA" if root is None else "the argument root"
    place = Path(os.path.expanduser("~/.cache/ewc_lib" if named is None else named))
    if found := archive.sources(place):
        return archive.read(found[0])
    if named is None:
        raise FileNotFoundError(
            f"found no {archive.title}: set EWC_DATA to any existing copy, or put one into "
            f"{place}, {archive.forms}."
        )
    state = f"holds no {archive.title}" if place.exists() else "does not exist"
    raise FileNotFoundError(f"{place}, named by {origin}, {state}: looked for {archive.looked_for}")


def _read_idx(path: Path, part: Part) -> NDArray[np.uint8]:
    content = path.read_bytes()
    if part.of_gz:
        _check(content, part.md5, str(path))
    with _blaming(path):
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        header = np.frombuffer(content, ">u4", part.header.size)
        if header[0] != part.header[0]:
            raise ValueError(f"magic number {header[0]}, expected {part.header[0]}")
        array = np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1:])
    return _verified(array, part, str(path))


def _joined(folder: Path, files: dict[str, str]) -> Arrays:
    batches = []
    for name, md5 in files.items():
        content = (folder / name).read_bytes()
        _check(content, md5, str(folder / name))
        batches.append(pickle.loads(content, encoding="bytes"))
    images = np.concatenate([batch[b"data"] for batch in batches])
    return images, np.concatenate([batch[b"labels"] for batch in batches]).astype(np.uint8)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Name the file whatever its decoder raises, which depends on the byte that is damaged."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _verified(array: NDArray[Any], part: Part, where: str) -> NDArray[np.uint8]:
    """Return the array if, written as an idx file, it is the one published."""
    if array.dtype != np.uint8 or array.shape != part.shape:
        raise ValueError(f"{where} is {array.dtype} {array.shape}, expected uint8 {part.shape}")
    if not part.of_gz:
        _check(part.header.tobytes() + array.tobytes(), part.md5, where)
    return array


def _check(content: bytes, expected: str, where: str) -> None:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != expected:
        raise ValueError(f"{where} has the checksum {md5}, expected {expected}")


def _parts(checksums: tuple[str, str, str, str], *, of_gz: bool = False) -> tuple[Part, ...]:
    """Return the parts of an archive with the names and the sizes of MNIST."""
    shapes: dict[str, tuple[int, ...]] = {
        "train-images-idx3": (60000, 28, 28),
        "train-labels-idx1": (60000,),
        "t10k-images-idx3": (10000, 28, 28),
        "t10k-labels-idx1": (10000,),
    }
    keys = ("x_train", "y_train", "x_test", "y_test")
    rows = zip(keys, shapes.items(), checksums, strict=True)
    return tuple(Part(key, idx, shape, md5, of_gz) for key, (idx, shape), md5 in rows)


def _compressed(title: str, folder: str, checksums: tuple[str, str, str, str]) -> Idx:
    """Return an archive whose ``.gz`` files have published checksums: torchvision's."""
    return Idx(
        title,
        folder,
        _parts(checksums, of_gz=True),
        forms=f"torchvision's folder {folder}/raw with its .gz files",
        looked_for=f"a folder with {folder}/raw/*-ubyte.gz or *-ubyte.gz",
    )


MNIST = Idx(
    "MNIST",
    "MNIST",
    _parts(
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        )
    ),
    forms="either torchvision's folder MNIST/raw or Keras' mnist.npz "
    "(https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz)",
    looked_for="the file mnist.npz and for a folder with mnist.npz, MNIST/raw/*-ubyte[.gz] or "
    "*-ubyte[.gz]",
    npz="mnist.npz",
)

FASHION_MNIST = _compressed(
    "Fashion-MNIST",
    "FashionMNIST",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)

KMNIST = _compressed(
    "Kuzushiji-MNIST",
    "KMNIST",
    (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
)

CIFAR10 = Pickles(
    "CIFAR-10",
    "cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    forms="the folder cifar-10-batches-py of the version for Python",
    looked_for="the folder cifar-10-batches-py and for a folder with data_batch_1",
)
