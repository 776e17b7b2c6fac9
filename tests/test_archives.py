"""Copies of data sets beside MNIST: found as others leave them, and read only if they are whole.

Tiny archives with checksums of their own stand in for the published ones.
"""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torch

from ewc_lib import _archives
from ewc_lib.data import cifar10, fashion_mnist, kmnist, local_copy, mnist

IDX = {"fashion_mnist": "FASHION_MNIST", "kmnist": "KMNIST", "mnist": "MNIST"}
READ = {"fashion_mnist": fashion_mnist, "kmnist": kmnist, "mnist": mnist}


def md5(content):
    return hashlib.md5(content).hexdigest()


def drawn(seed):
    """Return six training and four test images of two by two pixels, with labels."""
    rng = np.random.default_rng(seed)
    shapes = ((6, 2, 2), (6,), (4, 2, 2), (4,))
    return [rng.integers(0, 10, shape, dtype=np.uint8) for shape in shapes]


def idx_files(arrays):
    """Return the files of MNIST's format by name, compressed."""
    heads = ([0x803, 6, 2, 2], [0x801, 6], [0x803, 4, 2, 2], [0x801, 4])
    names = [part.idx for part in _archives.MNIST.parts]
    contents = (
        np.array(head, ">u4").tobytes() + array.tobytes()
        for head, array in zip(heads, arrays, strict=True)
    )
    return {
        f"{name}-ubyte.gz": gzip.compress(content, mtime=0)
        for name, content in zip(names, contents, strict=True)
    }


@pytest.fixture
def tiny(monkeypatch):
    """Let all archives of MNIST's format be tiny ones; return their files by name."""
    found = {}
    for seed, (name, constant) in enumerate(IDX.items()):
        archive = getattr(_archives, constant)
        arrays = drawn(seed)
        found[name] = idx_files(arrays)
        parts = []
        for part, array, content in zip(archive.parts, arrays, found[name].values(), strict=True):
            sum_ = md5(content if part.of_gz else gzip.decompress(content))
            parts.append(_archives.Part(part.key, part.idx, array.shape, sum_, part.of_gz))
        monkeypatch.setattr(_archives, constant, archive._replace(parts=tuple(parts)))
    return found


@pytest.fixture
def batches(monkeypatch):
    """Let CIFAR-10 have two batches of three images, and one for testing; return the files."""
    rng = np.random.default_rng(0)
    files = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({b"data": pixels, b"labels": [1, 0, 9]})
    sums = {name: md5(content) for name, content in files.items()}
    test = {"test_batch": sums.pop("test_batch")}
    monkeypatch.setattr(_archives, "CIFAR10", _archives.CIFAR10._replace(train=sums, test=test))
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
@pytest.mark.parametrize("whole", [True, False])
def test_compressed_files_are_read_where_torchvision_leaves_them(name, whole, tiny, tmp_path):
    raw = write(tmp_path / getattr(_archives, IDX[name]).folder / "raw", tiny[name])
    found = READ[name](tmp_path if whole else raw)
    assert found.name == name.replace("_", "-")
    x_train, y_train, x_test, y_test = drawn(list(IDX).index(name))
    for tensor, array in ((found.x_train, x_train), (found.x_test, x_test)):
        np.testing.assert_array_equal(tensor, array.reshape(len(array), -1) / np.float32(255))
    np.testing.assert_array_equal(found.y_train, y_train)
    np.testing.assert_array_equal(found.y_test, y_test)


def test_a_changed_byte_of_a_compressed_file_is_a_wrong_checksum(tiny, tmp_path):
    folder = write(tmp_path, tiny["kmnist"])
    file = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte[.]gz has the checksum"):
        kmnist(tmp_path)


def test_a_plain_file_without_a_published_checksum_is_not_read(tiny, tmp_path):
    folder = write(tmp_path, tiny["fashion_mnist"])
    file = folder / "train-labels-idx1-ubyte.gz"
    (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train-labels-idx1-ubyte.gz: only of the"):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize(("name", "title"), [("fashion_mnist", "Fashion"), ("kmnist", "Kuzushiji")])
def test_without_a_copy_the_message_names_the_data_set_and_its_folder(name, title, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"holds no {title}-MNIST: .*MNIST/raw/\*-ubyte"):
        READ[name](tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_the_batches_of_cifar_are_joined_in_their_order(whole, batches, tmp_path):
    folder = write(tmp_path / "cifar-10-batches-py", batches)
    found = cifar10(tmp_path if whole else folder)
    stored = [pickle.loads(content)[b"data"] for content in batches.values()]
    assert (found.name, found.n_classes, found.n_features) == ("cifar10", 10, 3072)
    assert torch.equal((found.x_train * 255).round().byte(), torch.tensor(np.vstack(stored[:2])))
    assert torch.equal((found.x_test * 255).round().byte(), torch.tensor(stored[2]))
    assert found.y_train.tolist() == [1, 0, 9, 1, 0, 9]
    assert found.y_train.dtype == torch.int64


def test_a_batch_that_is_not_the_published_one_is_never_opened(batches, tmp_path):
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return type(opened).touch, (opened,)

    write(tmp_path, {**batches, "data_batch_2": pickle.dumps(Trap())})
    with pytest.raises(ValueError, match="data_batch_2 has the checksum"):
        cifar10(tmp_path)
    assert not opened.exists()


def test_a_missing_batch_is_named(batches, tmp_path):
    del batches["test_batch"]
    with pytest.raises(FileNotFoundError, match="lacks test_batch"):
        cifar10(write(tmp_path, batches))


def test_the_batches_of_cifar_have_their_published_checksums():
    assert len(_archives.CIFAR10.train) == 5
    assert _archives.CIFAR10.train["data_batch_5"] == "482c414d41f54cd18b22e5b47cb7c3cb"
    assert _archives.CIFAR10.test == {"test_batch": "40351d587109b95175f43aff81a1287e"}


@pytest.mark.parametrize("name", IDX)
def test_a_local_copy_is_told_by_its_content(name, tiny, tmp_path):
    assert local_copy(write(tmp_path, tiny[name])).name == name.replace("_", "-")


def test_a_local_copy_may_be_cifar(batches, tmp_path):
    assert local_copy(write(tmp_path, batches)).name == "cifar10"


def test_of_several_copies_that_of_mnist_is_taken(tiny, tmp_path):
    for name, files in tiny.items():
        write(tmp_path / getattr(_archives, IDX[name]).folder / "raw", files)
    assert local_copy(tmp_path).name == "mnist"


def test_a_damaged_copy_is_no_reason_to_say_that_there_is_none(tiny, tmp_path):
    folder = write(tmp_path, tiny["fashion_mnist"])
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no whole data set: .*checksum.*holds no CIFAR-10"):
        local_copy(tmp_path)


def test_without_any_copy_that_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no MNIST"):
        local_copy(tmp_path)
