"""What to do about data in a form that nobody can read."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ewc_lib import EWC, fisher_information
from ewc_lib._forms import check_iterable, is_data_set, is_read_once, is_whole, pair, picked
from ewc_lib.fisher import MatrixFree
from ewc_lib.integrations import distributed
from ewc_lib.regularizers import EWCDR, MAS, KroneckerLaplace, LwF, Replay
from ewc_lib.score import per_observation_gradients
from tests.scenarios import same

X, Y = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 1, 0])


class Table:
    """What a data frame of pandas looks like from outside."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(["first column", "second column"])

    def __len__(self):
        return len(self.values)

    def to_numpy(self):
        return self.values.numpy()


class Words(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, n):
        return X[n], "cat" if Y[n] else "dog"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def boxes(batch):
    """Collate as the recipes for detection do."""
    return tuple(zip(*batch, strict=True))


OBJECTS = [(X[n], {"boxes": torch.ones(n + 1, 4), "labels": torch.ones(n + 1)}) for n in range(4)]

# Each as one item of a list of batches and, where that can be, as all data

OF_PAIRS = {
    "None for targets": ((X, None), r"targets are None: .*give any .* torch\.zeros\(len\(inputs\)"),
    "no targets": ((X,), "got 1 items .*targets matter to kind='empirical' alone"),
    "a task beside": (
        (X, Y, Y),
        r"got 3 items .* one tuple, \(\(x, z\), y\).*by batch=lambda b: \(b\[0\]",
    ),
    "boxes in a list": ((X, [o[1] for o in OBJECTS]), "a list of several tensors, as boxes"),
    "boxes in a dict": ((X, {"boxes": X, "labels": Y}), "a dict of several tensors, as boxes"),
    "a list of strings": ((X, ["a", "b", "a", "b"]), r"strings: .*numpy\.unique\(targets"),
    "an array of strings": ((X, np.array(["a", "b", "a", "b"])), r"strings: .*numpy\.unique"),
    "an array of objects": ((X, np.array(["a", None, 1, 2], dtype=object)), "targets are strings"),
    "numbers in a list": ((X, [0, 1, 1, 0]), r"a list of int: give torch\.tensor\(list\)"),
    "numbers in a tuple": ((X, (0.0, 1.0, 1.0, 0.0)), r"a tuple of float: give torch\.tensor"),
    "numbers in lists": ((X, [[0], [1], [1], [0]]), r"a list of int: give torch\.tensor\(list\)"),
    "a data frame": ((X, Table(Y)), r"targets are a Table: give \.to_numpy\(\) of it"),
    "inputs in a data frame": ((Table(X), Y), r"inputs are a Table: give \.to_numpy\(\) of it"),
    "dates": ((X, np.array(["2026-01-01"] * 4, "datetime64[D]")), "ndarray, not torch.Tensor"),
    "a masked array": ((X, np.ma.masked_equal(Y.numpy(), 0)), "MaskedArray, not torch.Tensor"),
    "numbers of another precision": ((X.numpy().astype(np.longdouble), Y), "inputs are no tensor"),
    "texts": ((("a", "b", "a", "b"), Y), "inputs are strings: .* tokenise texts"),
    "nothing among the inputs": (((X, None), Y), "inputs are None, not torch.Tensor"),
    "numbers for everything": (([[0.0, 1.0]] * 3), r"3 items of list; give tensors, as by torch"),
    "one number": ((X, 1), "targets are int, not torch.Tensor; batches have one observation per"),
    "sparse inputs": ((X.to_sparse(), Y), r"torch\.sparse_coo.*give \.to_dense\(\)"),
}


@pytest.mark.parametrize(("raw", "message"), OF_PAIRS.values(), ids=OF_PAIRS)
def test_a_pair_in_another_form_is_answered_by_what_to_do(raw, message):
    with pytest.raises(ValueError, match=f"^batch 3 .*{message}"):
        pair(raw, "batch 3")
    with pytest.raises(ValueError, match=f"^batch 0 .*{message}"):
        fisher_information(nn.Linear(2, 2), [raw])
    if is_whole(raw):
        with pytest.raises(ValueError, match=f"^data must .*{message}|^data holds .*{message}"):
            EWC(nn.Linear(2, 2), 1.0).consolidate(raw)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR tensor support")
def test_tensors_without_rows_are_answered_by_what_to_do():
    nested = torch.nested.nested_tensor(list(X), layout=torch.jagged)
    for inputs, message in [(nested, "jagged.* pad a nested"), (X.to_sparse_csr(), "csr.*dense")]:
        with pytest.raises(ValueError, match=f"^data holds a tensor with the layout .*{message}"):
            pair((inputs, Y), "data")


OF_DATA = {
    "a data set": (TensorDataset(X, Y), r"TensorDataset; make batches of it: .*DataLoader\("),
    "a data set without an iterator": (Words(), "Words; make batches of it"),
    "a stream": (Stream(), "Stream; make batches of it"),
    "a model": (nn.ModuleList([nn.Linear(2, 2)]), "ModuleList; the model comes first"),
    "one dict": ({"x": X, "labels": Y}, "dict; if it is one batch, give a list with it"),
    "inputs alone": (X, r"Tensor; inputs and targets go together, \(inputs, targets\)"),
    "an array alone": (X.numpy(), "ndarray; inputs and targets go together"),
    "a data frame alone": (Table(X), "Table; inputs and targets go together"),
    "a file": ("train.csv", "str; read the file first"),
    "a function": (lambda: iter([]), "function; call it, and give what it returns"),
    "a number": (3, "int$"),
    "None": (None, "NoneType$"),
}


@pytest.mark.parametrize(("data", "message"), OF_DATA.values(), ids=OF_DATA)
def test_data_that_are_no_batches_are_answered_by_what_to_do(data, message):
    with pytest.raises(ValueError, match=f"must be a DataLoader.* got {message}"):
        check_iterable(data)
    with pytest.raises(ValueError, match=f"must be a DataLoader.* got {message}"):
        fisher_information(nn.Linear(2, 2), data)


def test_a_list_of_inputs_and_targets_is_told_from_batches():
    with pytest.raises(
        ValueError, match=r"got Tensor; .* one tuple \(inputs, targets\), not a list"
    ):
        fisher_information(nn.Linear(2, 2), [X, Y])


def test_what_loaders_make_of_odd_data_sets_is_answered_too():
    for loader, message in [
        (DataLoader(Words(), batch_size=2), "targets are strings"),
        (
            DataLoader(OBJECTS, batch_size=2, collate_fn=boxes),
            "a tuple of several tensors, as boxes",
        ),
        (DataLoader(TensorDataset(X), batch_size=2), "1 items"),
        (DataLoader(TensorDataset(X, Y), batch_size=None), "0-d tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            fisher_information(nn.Linear(2, 2), loader)


def test_a_dict_without_labels_says_what_it_has():
    with pytest.raises(
        ValueError, match=r"without 'labels'; it has \['1', 'label', 'x'\]\. Give its"
    ):
        pair({"x": X, "label": Y, 1: Y}, "batch 0")


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "uint8", "int32", "bool", ">f8"])
def test_arrays_of_numbers_keep_their_precision(dtype):
    values = np.array([[0, 1], [1, 1]]).astype(dtype)
    if dtype == ">f8":
        with pytest.raises(ValueError, match=r"inputs are no tensor: .*byte"):
            pair((values, Y[:2]), "data")
        return
    inputs, _ = pair((values, Y[:2]), "data")
    assert str(inputs.dtype) == f"torch.{dtype}"
    assert inputs.tolist() == values.tolist()


def test_arrays_are_as_good_as_tensors_for_everyone_who_reads_data():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    of_tensors, of_arrays = (X, Y), (X.numpy(), Y.numpy())
    found = fisher_information(model, of_arrays).diagonal()
    assert same(found, fisher_information(model, of_tensors).diagonal())
    replay = Replay(model)
    replay.consolidate(of_arrays)
    assert replay.n_stored == 4


def test_the_two_items_of_a_tuple_are_data_or_batches():
    assert is_whole((X, Y))
    assert is_whole(((X, X), Y))
    assert is_whole(({"x": X}, Y.numpy()))
    assert is_whole((X, None))
    assert not is_whole(((X, Y), (X, Y)))
    assert not is_whole(())
    assert not is_whole([X, Y])


TASK = torch.tensor([7, 7, 7, 7])


def of_three(form):
    """Return inputs, what no model takes, and targets, in one form."""
    data = TensorDataset(X, TASK, Y)
    return {
        "a tuple": (X, TASK, Y),
        "a loader": DataLoader(data, batch_size=3),
        "a list": [(X[:3], TASK[:3], Y[:3]), (X[3:], TASK[3:], Y[3:])],
    }[form]


def with_labels(batch):
    return {"input": batch[0], "labels": batch[2]}


READERS = {
    "fisher_information": lambda m, d, **o: fisher_information(m, d, **o).diagonal(),
    "eigenvalues, in two passes": lambda m, d, **o: fisher_information(
        m, d, structure="eigenkronecker", **o
    ).diagonal(),
    "MatrixFree": lambda m, d, **o: MatrixFree(m, d, **o) @ dict(m.named_parameters()),
    "gradients": lambda m, d, **o: {
        name: torch.cat([part[name] for part in per_observation_gradients(m, d, **o)])
        for name, _ in m.named_parameters()
    },
    "a group of processes": lambda m, d, **o: among_ranks(m, d, **o),
    "EWC": lambda m, d, **o: EWC(m, 1.0).consolidate(d, **o).diagonal(),
    "EWCDR": lambda m, d, **o: EWCDR(m, 1.0).consolidate(d, **o).diagonal(),
    "MAS": lambda m, d, **o: MAS(m, 1.0).consolidate(d, **o).diagonal(),
    "KroneckerLaplace": lambda m, d, **o: KroneckerLaplace(m, 1.0).consolidate(d, **o).diagonal(),
    "Replay": lambda m, d, **o: after(Replay(m), d, **o),
    "LwF": lambda m, d, **o: after(LwF(m), d, **o),
}


def among_ranks(model, data, **options):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return distributed.fisher_information(model, data, **options).diagonal()
    finally:
        dist.destroy_process_group()


def after(regularizer, data, **options):
    regularizer.consolidate(data, **options)
    return regularizer.state_dict()


def as_pair(batch):
    return batch[0], batch[2]


PICKS = [(name, as_pair) for name in READERS]
PICKS += [(name, with_labels) for name in READERS if name not in ("Replay", "LwF")]


@pytest.mark.parametrize("form", ["a tuple", "a loader", "a list"])
@pytest.mark.parametrize(("name", "pick"), PICKS)
def test_a_function_picks_inputs_and_targets_for_everyone_who_reads_data(name, pick, form):
    torch.manual_seed(0)
    model, read = nn.Linear(2, 2), READERS[name]
    expected = read(model, [(X[:3], Y[:3]), (X[3:], Y[3:])])
    found = read(model, of_three(form), batch=pick)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    with pytest.raises(ValueError, match=r"3 items|3 tensors|must be a pair"):
        read(model, of_three(form))


@pytest.mark.parametrize("form", ["a tuple", "a loader"])
def test_of_what_is_picked_a_random_part_is_drawn_as_of_pairs(form):
    torch.manual_seed(0)
    model, pick = nn.Linear(2, 2), lambda b: (b[0], b[2])
    of_pairs = fisher_information(model, (X, Y), n_samples=2).diagonal()
    found = fisher_information(model, of_three(form), n_samples=2, batch=pick).diagonal()
    assert same(found, of_pairs)


def test_what_picks_from_batches_is_a_function():
    with pytest.raises(ValueError, match="batch must be a function of one batch, got int"):
        fisher_information(nn.Linear(2, 2), (X, Y), batch=128)


def test_what_is_picked_can_be_read_again_and_tells_whether_it_can():
    chosen = picked([(X, Y)], lambda b: b)
    assert len(list(chosen)) == len(list(chosen)) == 1
    assert not is_read_once(chosen)
    assert is_read_once(picked(iter([(X, Y)]), lambda b: b))
    assert picked(chosen, None) is chosen


def test_data_sets_of_other_libraries_are_told_by_how_they_are_read():
    class Rows:
        def __getitems__(self, rows):
            return rows

    assert is_data_set(Rows())
    assert is_data_set(Words())
    assert not is_data_set([X, Y])
    assert not is_data_set(DataLoader(Words()))
