"""Data in every form are read batch after batch, in an order that the seed fixes."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ewc_lib._forms import picked
from ewc_lib.continual._reading import Training, check_again, in_order, some
from ewc_lib.errors import EmptyData

X, Y = torch.arange(10.0)[:, None], torch.arange(10) % 3


class Disk(Dataset):
    """A data set on a disk, which counts what was read and what of it is still in memory."""

    def __init__(self, n=10):
        self.n, self.read, self.alive, self.most = n, [], 0, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return Item(self, i), i % 3


class Item:
    """One observation, which tells its data set that it is gone."""

    def __init__(self, disk, i):
        self.disk, self.i = disk, i
        disk.alive += 1
        disk.most = max(disk.most, disk.alive)

    def __del__(self):
        self.disk.alive -= 1


def collate(items):
    return torch.tensor([[float(x.i)] for x, _ in items]), torch.tensor([y for _, y in items])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Rows(list):
    """What a data set of another library looks like."""

    def __getitems__(self, rows):
        return [self[i] for i in rows]


def read(data, device=None, **options):
    options = {"steps": None, "epochs": None, "batch_size": 4, "seed": 0} | options
    training = Training(data, **options)
    return [(p.inputs[:, 0].tolist(), p.target.tolist()) for p in training.pieces(device)]


@pytest.mark.parametrize("options", [{"steps": 7}, {"epochs": 2}, {"steps": 3, "batch_size": 16}])
def test_a_data_set_has_the_batches_of_a_tuple_of_its_tensors(options):
    rows = Rows(zip(X, Y, strict=True))
    assert read((X, Y), **options) == read(TensorDataset(X, Y), **options) == read(rows, **options)
    assert read((X, Y), **options) != read((X, Y), **options | {"seed": 1})


def test_a_pass_sees_every_observation_once():
    for data in ((X[:8], Y[:8]), TensorDataset(X[:8], Y[:8])):
        seen = [x for inputs, _ in read(data, epochs=1) for x in inputs]
        assert sorted(seen) == X[:8, 0].tolist()
        assert seen != X[:8, 0].tolist()


def test_a_stream_is_cut_into_batches_and_read_again():
    found = read(Endless(), steps=4)
    assert [len(x) for x, _ in found] == [4, 4, 2, 4]
    assert found[0] == found[3] == ([0.0, 1.0, 2.0, 3.0], [0, 1, 2, 0])
    assert len(read(Endless(), epochs=2)) == 6


def test_a_loader_is_read_as_it_is():
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True)
    assert [len(x) for x, _ in read(loader, steps=4)] == [3, 3, 3, 3]
    assert read(loader, epochs=2) == 2 * read(loader, epochs=1)
    assert Training(loader, steps=None, epochs=2, batch_size=9, seed=0).steps == 6


def test_no_batch_is_read_that_is_not_trained_on():
    disk = Disk()
    loader = DataLoader(disk, batch_size=2, collate_fn=collate)
    read(loader, steps=3)
    assert disk.read == [0, 1, 2, 3, 4, 5]


def test_a_data_set_on_disk_is_never_in_memory_as_a_whole():
    disk = Disk(100)
    disk_in_tensors = DataLoader(disk, batch_size=5, collate_fn=collate)
    read(disk_in_tensors, epochs=3)
    assert sorted(disk.read) == sorted(3 * list(range(100)))
    assert sum(len(p.target) for p in in_order(disk_in_tensors, None)) == 100
    assert disk.most <= 6  # a batch, and what of the one before is still in a frame


def test_what_a_generator_yields_is_trained_on_once_and_not_again():
    assert len(read(((X, Y) for _ in range(3)), steps=3)) == 3
    with pytest.raises(ValueError, match="ended after 3 batches, and cannot be read again"):
        read(((X, Y) for _ in range(3)), steps=4)
    with pytest.raises(EmptyData, match="used up"):
        read(iter([]), steps=1)
    with pytest.raises(ValueError, match=r"training data are an iterator.*give a DataLoader"):
        check_again(picked(iter([]), lambda b: b), "training data")


@pytest.mark.parametrize("data", [[], (X[:0], Y[:0]), TensorDataset(X[:0], Y[:0])])
def test_nothing_to_read_is_refused(data):
    with pytest.raises(ValueError, match=r"got 0 and 0|is empty"):
        read(data, steps=1)
    with pytest.raises(ValueError, match=r"got 0 and 0|is empty"):
        list(in_order(data, None))


def test_batches_without_observations_are_passed_over():
    found = read([(X[:0], Y[:0]), (X, Y)], steps=2)
    assert [len(x) for x, _ in found] == [10]


@pytest.mark.parametrize("epochs", [None, 1])
def test_either_steps_or_epochs_are_given(epochs):
    with pytest.raises(ValueError, match="either steps or epochs"):
        Training((X, Y), steps=epochs, epochs=epochs, batch_size=1, seed=0)


def triples(n=3):
    """Return data with something between inputs and targets, in every form."""
    between = torch.full((10,), 99)
    whole = (X, between, Y)
    return [whole, TensorDataset(*whole), DataLoader(TensorDataset(*whole), batch_size=n)]


@pytest.mark.parametrize("data", triples(), ids=["tuple", "data set", "loader"])
def test_a_function_picks_from_longer_batches(data):
    chosen = picked(data, lambda b: (b[0], b[2]))
    for x, y in read(chosen, epochs=1):
        assert [int(value) % 3 for value in x] == y
    pieces = list(in_order(chosen, None))
    assert torch.equal(torch.cat([p.target for p in pieces]), Y)
    part = some(chosen, 4, seed=0)
    assert sum(len(p.target) for p in in_order(part, None)) == 4


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        [{"x": X[:3], "labels": Y[:3]}, {"x": X[3:], "labels": Y[3:]}],
        Endless(),
    ],
    ids=["tuple", "data set", "loader", "shuffling loader", "list", "dicts", "stream"],
)
def test_some_observations_are_as_many_as_wanted_and_all_if_there_are_fewer(data):
    for wanted in (1, 4, 10, 11):
        pieces = list(in_order(some(data, wanted, seed=0), None))
        inputs = [p.inputs["x"] if p.labelled else p.inputs for p in pieces]
        seen = torch.cat(inputs)[:, 0].tolist()
        assert len(set(seen)) == len(seen) == min(wanted, 10)
        for x, piece in zip(inputs, pieces, strict=True):
            assert torch.equal(x[:, 0].long() % 3, piece.target)


def test_some_of_a_data_set_are_some_of_its_tensors():
    one, other = (some(d, 4, seed=0) for d in ((X, Y), TensorDataset(X, Y)))
    assert torch.equal(one[0], torch.cat([p.inputs for p in in_order(other, None)]))
    assert one[0][:, 0].tolist() != [0.0, 1.0, 2.0, 3.0]


def test_arrays_and_several_inputs_are_read():
    for inputs in ((X, X + 1), {"a": X, "b": X + 1}):
        training = Training((inputs, Y.numpy()), steps=1, epochs=None, batch_size=4, seed=0)
        (piece,) = training.pieces(None)
        leaves = list(piece.inputs.values() if isinstance(piece.inputs, dict) else piece.inputs)
        assert torch.equal(leaves[0] + 1, leaves[1])
        assert torch.equal(leaves[0][:, 0].long() % 3, piece.target)
