"""The data sets: what they hold, where they are looked for, and what is said when they are wrong.

MNIST need not be there: a tiny archive, with checksums of its own, stands in for it. The public
``mnist`` reads it through the description it would otherwise use of MNIST itself.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ewc_lib import _archives, data
from ewc_lib.data import digits, hold_out, images, mnist, padded

REAL_COPY = os.environ.get("EWC_DATA")  # before the fixture below hides it
KEYS = ("x_train", "y_train", "x_test", "y_test")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts with an empty home and no EWC_DATA."""
    monkeypatch.delenv("EWC_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def arrays() -> Arrays:
    """Five training images and three test images of two by three pixels."""
    rng = np.random.default_rng(0)
    shapes = dict(zip(KEYS, ((5, 2, 3), (5,), (3, 2, 3), (3,)), strict=True))
    drawn = {key: rng.integers(0, 10, shape, dtype=np.uint8) for key, shape in shapes.items()}
    drawn["x_train"][0, 0] = 0, 51, 255
    return drawn


@pytest.fixture
def tiny(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mnist`` expect the tiny archive instead of MNIST."""
    parts = tuple(
        _archives.Part(key, name.removesuffix("-ubyte"), arrays[key].shape, md5(arrays[key]))
        for key, name in zip(KEYS, FILES, strict=True)
    )
    monkeypatch.setattr(_archives, "MNIST", _archives.MNIST._replace(parts=parts))


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes in the format of MNIST's own files."""
    magic = {1: 2049, 3: 2051}[array.ndim]
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *array.shape))
    return header + array.tobytes()


def md5(array: np.ndarray) -> str:
    return hashlib.md5(idx(array)).hexdigest()


def write_npz(folder: Path, arrays: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "mnist.npz", **arrays)
    return folder / "mnist.npz"


def write_raw(folder: Path, arrays: Arrays, *, compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in zip(KEYS, FILES, strict=True):
        content = idx(arrays[key])
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def in_npz_file(place: Path, arrays: Arrays) -> Path:
    return write_npz(place, arrays)


def in_folder_of_npz(place: Path, arrays: Arrays) -> Path:
    return write_npz(place, arrays).parent


def in_torchvision_root(place: Path, arrays: Arrays) -> Path:
    write_raw(place / "MNIST" / "raw", arrays)
    return place


def in_torchvision_root_compressed(place: Path, arrays: Arrays) -> Path:
    write_raw(place / "MNIST" / "raw", arrays, compressed=True)
    return place


def in_raw_folder(place: Path, arrays: Arrays) -> Path:
    return write_raw(place, arrays)


def in_raw_folder_compressed(place: Path, arrays: Arrays) -> Path:
    return write_raw(place, arrays, compressed=True)


FOLDERS = (
    in_folder_of_npz,
    in_torchvision_root,
    in_torchvision_root_compressed,
    in_raw_folder,
    in_raw_folder_compressed,
)
LAYOUTS = (in_npz_file, *FOLDERS)
Layout = Callable[[Path, Arrays], Path]


def assert_holds(read: data.Images, arrays: Arrays) -> None:
    """Assert that what was read is what was written, scaled by 255 and flattened."""
    for field, array in arrays.items():
        expected = array if field[0] == "y" else array.reshape(len(array), -1) / np.float32(255)
        np.testing.assert_array_equal(getattr(read, field).numpy(), expected)


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_the_1797_images_of_scikit_learn() -> None:
    pixels, labels = load_digits(return_X_y=True)
    split = digits(dtype=torch.float64)
    rows = torch.cat([split.x_train * 16, split.x_test * 16]).numpy()
    targets = torch.cat([split.y_train, split.y_test]).numpy()
    ours, theirs = np.column_stack([rows, targets]), np.column_stack([pixels, labels])
    assert len(ours) == 1797
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_digits_train_and_test_images_are_disjoint() -> None:
    split = digits()
    train = {row.numpy().tobytes() for row in split.x_train}
    assert not train & {row.numpy().tobytes() for row in split.x_test}


def test_digits_have_the_documented_shapes_and_types() -> None:
    split = digits()
    assert split.name == "digits"
    assert (split.n_classes, split.n_features) == (10, 64)
    assert split.x_train.shape == (1437, 64)
    assert split.x_test.shape == (360, 64)
    assert split.y_train.shape == (1437,)
    assert split.y_test.shape == (360,)
    assert split.x_train.dtype == split.x_test.dtype == torch.float32
    assert split.y_train.dtype == split.y_test.dtype == torch.int64
    assert split.train == (split.x_train, split.y_train)
    assert split.test == (split.x_test, split.y_test)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_digits_lie_between_0_and_1_in_every_floating_type(dtype: torch.dtype) -> None:
    split = digits(dtype=dtype)
    assert split.x_train.dtype == split.x_test.dtype == dtype
    assert split.x_train.min() == 0
    assert split.x_train.max() == 1
    assert split.x_test.min() == 0
    assert split.x_test.max() == 1


def test_digits_refuse_a_type_that_cannot_hold_fractions() -> None:
    with pytest.raises(ValueError, match=r"floating-point type, got torch\.int64"):
        digits(dtype=torch.int64)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_digits_are_split_by_class_in_the_given_proportion(fraction: float) -> None:
    split = digits(test_fraction=fraction)
    train, test = split.y_train.bincount(), split.y_test.bincount()
    assert len(split.y_test) == np.ceil(fraction * 1797)
    assert (test - fraction * (train + test)).abs().max() <= 1


@pytest.mark.parametrize("fraction", [0.0, 1, 1.5, -0.2, float("nan")])
def test_digits_refuse_a_fraction_outside_0_to_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
        digits(test_fraction=fraction)


def test_digits_are_the_same_for_the_same_seed() -> None:
    for one, other in zip(digits(seed=3)[1:], digits(seed=3)[1:], strict=True):
        assert torch.equal(one, other)


def test_digits_are_split_otherwise_for_another_seed() -> None:
    assert not torch.equal(digits(seed=0).x_train, digits(seed=1).x_train)


def test_digits_depend_on_no_global_random_state_and_leave_it_alone() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        states.append(digits())
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_equal(np.random.get_state(), before[1])
        assert random.getstate() == before[2]
    assert torch.equal(states[0].x_train, states[1].x_train)


def test_digits_belong_to_the_caller_who_may_write_into_them() -> None:
    digits().x_train.fill_(7)
    assert digits().x_train.max() == 1


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits()


# --- MNIST: where it is found ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.usefixtures("tiny")
def test_every_layout_is_read_from_root(
    layout: Layout, kind: type, tmp_path: Path, arrays: Arrays
) -> None:
    assert_holds(mnist(kind(layout(tmp_path / "copy", arrays))), arrays)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiny")
def test_every_layout_is_read_from_the_environment(
    layout: Layout, tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWC_DATA", str(layout(tmp_path / "copy", arrays)))
    assert_holds(mnist(), arrays)


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.usefixtures("tiny")
def test_every_folder_layout_is_read_from_the_cache(
    layout: Layout, home: Path, arrays: Arrays
) -> None:
    layout(home / ".cache" / "ewc_lib", arrays)
    assert_holds(mnist(), arrays)


@pytest.mark.usefixtures("tiny")
def test_a_tilde_means_home_in_root_and_in_the_environment(
    home: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(home / "somewhere", arrays)
    assert_holds(mnist("~/somewhere"), arrays)
    monkeypatch.setenv("EWC_DATA", "~/somewhere")
    assert_holds(mnist(), arrays)


@pytest.mark.usefixtures("tiny")
def test_an_npz_file_may_have_any_name(tmp_path: Path, arrays: Arrays) -> None:
    copy = write_npz(tmp_path, arrays).rename(tmp_path / "digits of 1998.npz")
    assert_holds(mnist(copy), arrays)


@pytest.mark.usefixtures("tiny")
def test_root_comes_before_the_environment_which_comes_before_the_cache(
    tmp_path: Path, home: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache" / "ewc_lib").mkdir(parents=True)
    (home / ".cache" / "ewc_lib" / "mnist.npz").write_text("never read")
    monkeypatch.setenv("EWC_DATA", str(write_npz(tmp_path / "environment", arrays)))
    assert_holds(mnist(), arrays)
    monkeypatch.setenv("EWC_DATA", str(tmp_path / "nowhere"))
    assert_holds(mnist(write_npz(tmp_path / "root", arrays)), arrays)


@pytest.mark.usefixtures("tiny")
def test_an_empty_environment_variable_counts_as_unset(
    home: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWC_DATA", "")
    assert images().name == "digits"
    write_npz(home / ".cache" / "ewc_lib", arrays)
    assert_holds(mnist(), arrays)


@pytest.mark.usefixtures("tiny")
def test_a_plain_idx_file_is_read_before_its_compressed_twin(
    tmp_path: Path, arrays: Arrays
) -> None:
    write_raw(tmp_path, arrays)
    for name in FILES:
        (tmp_path / f"{name}.gz").write_text("never read")
    assert_holds(mnist(tmp_path), arrays)


@pytest.mark.usefixtures("tiny")
def test_plain_and_compressed_idx_files_may_be_mixed(tmp_path: Path, arrays: Arrays) -> None:
    write_raw(tmp_path, arrays)
    write_raw(tmp_path, arrays, compressed=True)
    for name in (FILES[0], FILES[3]):
        (tmp_path / name).unlink()
    assert_holds(mnist(tmp_path), arrays)


# --- MNIST: where it is not found -----------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("origin", ["the argument root", "the environment variable EWC_DATA"])
@pytest.mark.usefixtures("tiny")
def test_a_wrong_place_is_named_with_its_origin_and_no_other_place_is_tried(
    origin: str,
    exists: bool,
    tmp_path: Path,
    home: Path,
    arrays: Arrays,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong, good = tmp_path / "wrong", write_npz(tmp_path / "good", arrays)
    write_npz(home / ".cache" / "ewc_lib", arrays)
    if exists:
        wrong.mkdir()
    by_root = origin == "the argument root"
    monkeypatch.setenv("EWC_DATA", str(good if by_root else wrong))
    with pytest.raises(FileNotFoundError) as raised:
        mnist(wrong if by_root else None)
    message = str(raised.value)
    assert message.startswith(f"{wrong}, named by {origin}, ")
    assert ("holds no MNIST" if exists else "does not exist") in message
    assert "mnist.npz" in message
    assert "MNIST/raw/*-ubyte[.gz]" in message


@pytest.mark.usefixtures("tiny")
def test_an_empty_root_is_not_taken_for_no_root(
    tmp_path: Path, home: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(home / ".cache" / "ewc_lib", arrays)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="named by the argument root"):
        mnist("")


@pytest.mark.parametrize("cache_exists", [True, False])
def test_without_any_copy_one_sentence_says_how_to_get_it(cache_exists: bool, home: Path) -> None:
    cache = home / ".cache" / "ewc_lib"
    if cache_exists:
        cache.mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as raised:
        mnist()
    message = str(raised.value)
    assert "EWC_DATA" in message
    assert str(cache) in message
    assert "MNIST/raw" in message
    assert "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz" in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.usefixtures("tiny")
def test_an_incomplete_raw_folder_is_an_error_that_names_what_it_lacks(
    missing: str, tmp_path: Path, arrays: Arrays
) -> None:
    (write_raw(tmp_path, arrays) / missing).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        mnist(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert missing in str(raised.value)
    assert sum(name in str(raised.value) for name in FILES) == 1


# --- MNIST: wrong files ---------------------------------------------------------------------------


def complaint(root: Path, file: Path) -> str:
    """Return what ``mnist`` says of a file (or a folder's file), which it must name first."""
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}") as raised:
        mnist(root)
    return str(raised.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.usefixtures("tiny")
def test_a_missing_key_is_named(key: str, tmp_path: Path, arrays: Arrays) -> None:
    del arrays[key]
    file = write_npz(tmp_path, arrays)
    assert f"{key} is not a file in the archive" in complaint(tmp_path, file)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiny")
def test_a_wrong_shape_is_named_with_the_right_one(
    layout: Layout, key: str, tmp_path: Path, arrays: Arrays
) -> None:
    shape = arrays[key].shape
    arrays[key] = arrays[key][1:]
    message = complaint(layout(tmp_path / "copy", arrays), tmp_path / "copy")
    assert key in message or FILES[KEYS.index(key)] in message
    assert str(arrays[key].shape) in message
    assert str(shape) in message


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiny")
def test_a_single_changed_bit_is_a_wrong_checksum(
    layout: Layout, key: str, tmp_path: Path, arrays: Arrays
) -> None:
    right = md5(arrays[key])
    arrays[key].reshape(-1)[-1] ^= 1
    message = complaint(layout(tmp_path / "copy", arrays), tmp_path / "copy")
    assert key in message or FILES[KEYS.index(key)] in message
    assert "checksum" in message
    assert right in message
    assert md5(arrays[key]) in message


@pytest.mark.usefixtures("tiny")
def test_labels_swapped_between_images_are_a_wrong_checksum(tmp_path: Path, arrays: Arrays) -> None:
    arrays["y_train"] = np.roll(arrays["y_train"], 1)
    file = write_npz(tmp_path, arrays)
    assert "(y_train) has the checksum" in complaint(tmp_path, file)


@pytest.mark.usefixtures("tiny")
def test_a_wrong_type_is_named(tmp_path: Path, arrays: Arrays) -> None:
    arrays["y_test"] = arrays["y_test"].astype(np.int64)
    file = write_npz(tmp_path, arrays)
    assert "(y_test) is int64 (3,), expected uint8 (3,)" in complaint(tmp_path, file)


@pytest.mark.usefixtures("tiny")
def test_the_order_in_memory_of_a_stored_array_does_not_matter(
    tmp_path: Path, arrays: Arrays
) -> None:
    stored = {key: np.asfortranarray(array) for key, array in arrays.items()}
    assert_holds(mnist(write_npz(tmp_path, stored)), arrays)


@pytest.mark.usefixtures("tiny")
def test_a_pickle_is_never_opened(tmp_path: Path, arrays: Arrays) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (opened,)

    arrays["y_test"] = np.array([Trap()], dtype=object)
    file = write_npz(tmp_path, arrays)
    assert "allow_pickle=False" in complaint(tmp_path, file)
    assert not opened.exists()


@pytest.mark.usefixtures("tiny")
def test_an_array_that_mnist_does_not_have_is_not_looked_at(tmp_path: Path, arrays: Arrays) -> None:
    stored = {**arrays, "extra": np.array([None], dtype=object)}
    assert_holds(mnist(write_npz(tmp_path, stored)), arrays)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 Not Found</html>", b"\x93NUMPY", b"PK\x03\x04"]
)
@pytest.mark.usefixtures("tiny")
def test_a_file_that_is_no_archive_is_called_that(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mnist.npz"
    file.write_bytes(content)
    assert "not a zip file" in complaint(tmp_path, file)


@pytest.mark.usefixtures("tiny")
def test_an_npz_cut_short_anywhere_is_named(tmp_path: Path, arrays: Arrays) -> None:
    file = write_npz(tmp_path, arrays)
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert "cannot be read" in complaint(tmp_path, file)


@pytest.mark.parametrize("layout", [in_folder_of_npz, in_raw_folder, in_raw_folder_compressed])
@pytest.mark.usefixtures("tiny")
def test_a_damaged_byte_is_an_error_that_names_the_file_or_does_no_harm(
    layout: Layout, tmp_path: Path, arrays: Arrays
) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(layout(tmp_path / "copy", arrays).iterdir()):
        whole = file.read_bytes()
        refused = 0
        for position in rng.permutation(len(whole))[:200]:
            damaged = bytearray(whole)
            damaged[position] ^= rng.integers(1, 256)
            file.write_bytes(damaged)
            with suppress(ValueError):
                assert_holds(mnist(file.parent), arrays)  # harmless: a date or a flag, say
                continue
            complaint(file.parent, file)
            refused += 1
        file.write_bytes(whole)
        assert refused > 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.usefixtures("tiny")
def test_an_idx_file_cut_short_anywhere_is_named(
    suffix: str, name: str, tmp_path: Path, arrays: Arrays
) -> None:
    file = write_raw(tmp_path, arrays, compressed=bool(suffix)) / f"{name}{suffix}"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert "cannot be read" in complaint(tmp_path, file)


@pytest.mark.usefixtures("tiny")
def test_an_idx_file_with_bytes_to_spare_is_named(tmp_path: Path, arrays: Arrays) -> None:
    file = write_raw(tmp_path, arrays) / FILES[0]
    file.write_bytes(file.read_bytes() + b"\0")
    assert "cannot reshape array of size 31 into shape" in complaint(tmp_path, file)


@pytest.mark.usefixtures("tiny")
def test_images_in_place_of_labels_are_a_wrong_magic_number(tmp_path: Path, arrays: Arrays) -> None:
    write_raw(tmp_path, arrays)
    (tmp_path / FILES[1]).write_bytes((tmp_path / FILES[0]).read_bytes())
    assert "magic number 2051, expected 2049" in complaint(tmp_path, tmp_path / FILES[1])


@pytest.mark.usefixtures("tiny")
def test_a_plain_file_that_calls_itself_compressed_is_named(tmp_path: Path, arrays: Arrays) -> None:
    folder = write_raw(tmp_path, arrays)
    file = (folder / FILES[2]).rename(folder / f"{FILES[2]}.gz")
    assert "Not a gzipped file" in complaint(tmp_path, file)


def test_the_tiny_archive_is_not_taken_for_mnist(tmp_path: Path, arrays: Arrays) -> None:
    file = write_npz(tmp_path, arrays)
    assert "uint8 (5, 2, 3), expected uint8 (60000, 28, 28)" in complaint(tmp_path, file)


def test_blank_images_of_the_right_shape_are_not_taken_for_mnist(tmp_path: Path) -> None:
    shapes = ((60000, 28, 28), (60000,), (10000, 28, 28), (10000,))
    blank = {key: np.zeros(shape, np.uint8) for key, shape in zip(KEYS, shapes, strict=True)}
    file = write_npz(tmp_path, blank)
    assert "expected 6bbc9ace898e44ae57da46a324031adb" in complaint(tmp_path, file)


def test_the_four_published_checksums_and_shapes_are_the_ones_expected() -> None:
    assert [(part.md5, part.shape) for part in _archives.MNIST.parts] == [
        ("6bbc9ace898e44ae57da46a324031adb", (60000, 28, 28)),
        ("a25bea736e30d166cdddb491f175f624", (60000,)),
        ("2646ac647ad5339dbf082846283269ea", (10000, 28, 28)),
        ("27ae3e4e09519cfbb04c329615203637", (10000,)),
    ]


# --- MNIST: what is read --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.usefixtures("tiny")
def test_mnist_pixels_are_flattened_and_divided_by_255(
    dtype: torch.dtype, tmp_path: Path, arrays: Arrays
) -> None:
    read = mnist(write_npz(tmp_path, arrays), dtype=dtype)
    assert (read.name, read.n_classes, read.n_features) == ("mnist", 10, 6)
    assert read.x_train.dtype == read.x_test.dtype == dtype
    assert read.y_train.dtype == read.y_test.dtype == torch.int64
    assert torch.equal(read.x_train[0, :3], torch.tensor([0.0, 0.2, 1.0], dtype=dtype))


@pytest.mark.usefixtures("tiny")
def test_mnist_refuses_a_type_that_cannot_hold_fractions(tmp_path: Path, arrays: Arrays) -> None:
    with pytest.raises(ValueError, match=r"floating-point type, got torch\.uint8"):
        mnist(write_npz(tmp_path, arrays), dtype=torch.uint8)


@pytest.mark.skipif(REAL_COPY is None, reason="EWC_DATA names no copy of MNIST")
def test_the_real_mnist_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWC_DATA", str(REAL_COPY))
    read = images()
    assert (read.name, read.n_features) == ("mnist", 784)
    assert read.x_train.shape == (60000, 784)
    assert read.x_test.shape == (10000, 784)
    assert read.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert read.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert read.x_train.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert read.x_train.min() == 0
    assert read.x_train.max() == 1


# --- images ---------------------------------------------------------------------------------------


def test_images_are_the_digits_when_no_data_are_named() -> None:
    assert torch.equal(images().x_train, digits().x_train)


@pytest.mark.usefixtures("tiny")
def test_images_are_the_digits_even_when_mnist_lies_in_the_cache(
    home: Path, arrays: Arrays
) -> None:
    write_npz(home / ".cache" / "ewc_lib", arrays)
    assert images().name == "digits"


@pytest.mark.usefixtures("tiny")
def test_images_are_mnist_when_the_environment_names_a_copy(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWC_DATA", str(write_npz(tmp_path, arrays)))
    assert_holds(images(), arrays)


def test_images_do_not_fall_back_to_the_digits_when_the_named_copy_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EWC_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="EWC_DATA"):
        images()


def test_padding_puts_the_image_in_the_middle_of_a_black_frame():
    plain = digits(seed=1)
    framed = padded(plain, 11)
    for before, after in zip(plain[1::2], framed[1::2], strict=True):
        picture = after.reshape(-1, 11, 11)
        assert torch.equal(picture[:, 1:9, 1:9].flatten(1), before)
        assert picture.sum() == before.sum()
    assert framed.y_train is plain.y_train


@pytest.mark.parametrize("side", [7, 0])
def test_padding_refuses_to_shrink_an_image(side):
    with pytest.raises(ValueError, match=f"64 pixels to {side}x{side}"):
        padded(digits(), side)


def test_padding_refuses_images_that_are_not_square():
    three_by_two = digits()._replace(x_train=torch.zeros(4, 6), x_test=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="6 pixels"):
        padded(three_by_two, 8)


def test_padding_refuses_test_images_of_another_size():
    mixed = digits()._replace(x_test=torch.zeros(4, 100))
    with pytest.raises(ValueError, match="cannot pad images of 64 and 100 pixels to 12x12"):
        padded(mixed, 12)


def test_validation_images_are_training_images_that_are_not_trained_on() -> None:
    everything = digits()
    rest, valid = hold_out(everything, 0.25, seed=3)
    assert torch.equal(rest.x_test, everything.x_test)
    assert valid.x_train is rest.x_train
    assert valid.y_train is rest.y_train
    parts = torch.cat([rest.x_train, valid.x_test]), torch.cat([rest.y_train, valid.y_test])
    before, now = (
        sorted((*pixels, label) for pixels, label in zip(x.tolist(), y.tolist(), strict=True))
        for x, y in (everything.train, parts)
    )
    assert before == now
    assert len(valid.x_test) == round(0.25 * len(everything.x_train))


def test_which_images_are_held_out_depends_on_the_seed_alone() -> None:
    first, again, other = (hold_out(digits(), seed=seed)[1].x_test for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, 1e-6, math.nan, math.inf])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1 and split 1437 images, got {share}"):
        hold_out(digits(), share)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_to_hold_some_out_are_refused(n: int) -> None:
    few = digits()
    with pytest.raises(ValueError, match=f"split {n} images"):
        hold_out(few._replace(x_train=few.x_train[:n], y_train=few.y_train[:n]), 0.5)
