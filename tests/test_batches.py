"""Data in every form that people have them, cut into batches."""

from collections import UserDict
from itertools import islice

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import _batches
from ewc_lib._batches import Reading, batches, join, marking_last
from ewc_lib.errors import EmptyData
from tests.scenarios import PROPERTY, cut, same

CPU = torch.device("cpu")
N = 10
X, Y = torch.arange(2.0 * N).reshape(N, 2), torch.arange(N)
NAN = float("nan")


class Record(dict):
    """What a collator of another library may return."""


FORMS = {
    "one tuple of tensors": lambda: (X, Y),
    "a loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "a list of pairs": lambda: cut(X, Y, 4),
    "a tuple of pairs": lambda: tuple(cut(X, Y, 4)),
    "a list of lists": lambda: [list(pair) for pair in cut(X, Y, 4)],
    "a generator": lambda: iter(cut(X, Y, 4)),
    "dicts": lambda: [{"x": x, "labels": y} for x, y in cut(X, Y, 4)],
    "dicts of another class": lambda: [Record(x=x, labels=y) for x, y in cut(X, Y, 4)],
    "pairs of several inputs": lambda: [((x, x + 1), y) for x, y in cut(X, Y, 4)],
    "one tuple of several inputs": lambda: ((X, X + 1), Y),
    "one tuple of named inputs": lambda: ({"x": X}, Y),
    "batches of one": lambda: cut(X, Y, 1),
    "one tuple of named inputs of another class": lambda: (UserDict(x=X), Y),
    "one tuple of arrays": lambda: (X.numpy(), Y.numpy()),
    "pairs of arrays": lambda: [(x.numpy(), y.numpy()) for x, y in cut(X, Y, 4)],
    "arrays and tensors": lambda: ((X.numpy(), X), Y),
    "arrays that may not be written to": lambda: tuple(
        np.frombuffer(t.numpy().tobytes(), t.numpy().dtype).reshape(t.shape) for t in (X, Y)
    ),
    "arrays that run backwards": lambda: (X.flip(0).numpy()[::-1], Y.flip(0).numpy()[::-1]),
    "with an empty batch": lambda: [(X[:3], Y[:3]), (X[:0], Y[:0]), (X[3:], Y[3:])],
}


def first_input(inputs):
    if isinstance(inputs, dict):
        return inputs["x"]
    return inputs[0] if isinstance(inputs, tuple) else inputs


@pytest.mark.parametrize("form", FORMS)
def test_every_form_yields_the_same_observations_in_order(form):
    found = list(batches(FORMS[form](), CPU))
    assert same(torch.cat([first_input(batch.inputs) for batch in found]), X)
    assert same(torch.cat([batch.target for batch in found]), Y)
    assert [batch.first for batch in found] == [int(batch.target[0]) for batch in found]
    assert all(len(batch) > 0 for batch in found)


def test_dicts_keep_all_inputs_but_the_labels():
    (batch,) = batches([{"a": X, "labels": Y, "b": Y}], CPU)
    assert same(batch.inputs, {"a": X, "b": Y})


def test_one_tuple_of_tensors_is_cut_into_batches(monkeypatch):
    monkeypatch.setattr(_batches, "BATCH_SIZE", 4)
    assert [len(batch) for batch in batches((X, Y), CPU)] == [4, 4, 2]


def test_everything_is_moved_to_the_device():
    (batch,) = batches([((Y, {"a": Y}), Y)], torch.device("meta"))
    x, named = batch.inputs
    assert {t.device.type for t in (x, named["a"], batch.target)} == {"meta"}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 24))
@PROPERTY
def test_exactly_n_samples_are_used_however_the_data_are_cut(sizes, n_samples):
    total = sum(sizes)
    labels = iter(torch.arange(total).split(sizes))
    data = [(label.double(), label) for label in labels]
    if n_samples > total:
        with pytest.raises(ValueError, match=r"empty|holds only"):
            list(batches(data, CPU, n_samples))
    else:
        found = list(batches(data, CPU, n_samples))
        assert torch.cat([b.target for b in found]).tolist() == list(range(n_samples))
        assert torch.cat([b.inputs for b in found]).tolist() == list(range(n_samples))


def test_no_batch_is_drawn_after_n_samples():
    source = iter(cut(X, Y, 4))
    assert [len(batch) for batch in batches(source, CPU, n_samples=6)] == [4, 2]
    assert len(list(source)) == 1


def test_a_bad_input_after_n_samples_does_no_harm():
    x = X.clone()
    x[6] = NAN
    assert sum(len(batch) for batch in batches((x, Y), CPU, n_samples=6)) == 6


@pytest.mark.parametrize("n_samples", [0, -1])
def test_n_samples_below_one_is_refused(n_samples):
    with pytest.raises(ValueError, match=f"n_samples must be at least 1, got {n_samples}"):
        list(batches((X, Y), CPU, n_samples))


def test_more_samples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="n_samples=11, but data holds only 10 observations"):
        list(batches(cut(X, Y, 4), CPU, 11))


@pytest.mark.parametrize(
    "data", [[], (X[:0], Y[:0]), [(X[:0], Y[:0])], DataLoader(TensorDataset(X[:0], Y[:0]))]
)
def test_empty_data_are_refused(data):
    with pytest.raises(EmptyData, match="data is empty"):
        list(batches(data, CPU))


def test_a_used_up_iterator_is_refused_with_a_hint():
    source = iter(cut(X, Y, 4))
    list(batches(source, CPU))
    with pytest.raises(ValueError, match="was an iterator used up"):
        list(batches(source, CPU))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (X, x), lambda x: {"a": X, "b": x}])
@pytest.mark.parametrize("form", ["whole", "batches"])
@pytest.mark.parametrize("bad", [0, 3, 7, 9])
def test_a_nan_is_named_by_its_observation_in_the_whole_data(wrap, form, bad):
    x = X.clone()
    x[bad, 1] = NAN
    inputs = wrap(x)
    if form == "whole":
        data = (inputs, Y)
    else:
        pick = torch.utils._pytree.tree_map
        parts = [slice(0, 3), slice(3, 8), slice(8, N)]
        data = [(pick(lambda t, part=part: t[part], inputs), Y[part]) for part in parts]
    with pytest.raises(ValueError, match=f"the input of observation {bad} holds NaN"):
        [batch.checked() for batch in batches(data, CPU)]


def test_the_first_of_several_nans_is_named():
    x = X.clone()
    x[4:] = NAN
    with pytest.raises(ValueError, match="observation 4 "):
        [batch.checked() for batch in batches((x, Y), CPU)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((X, Y[:3]), r"batch 1 have different lengths: \[10, 3\]"),
        ((X, Y[:0]), r"batch 1 have different lengths: \[10, 0\]"),
        ((X[:0], Y), r"batch 1 have different lengths: \[0, 10\]"),
        (((X, X[:4]), Y), r"batch 1 have different lengths: \[10, 4, 10\]"),
        ((X[0], Y[0]), "batch 1 .* 0-d tensor"),
        ((X, Y[0]), "batch 1 .* 0-d tensor"),
        ((X, X.to_sparse()), "batch 1 .* torch.sparse_coo"),
        (None, "batch 1 must be a pair .* NoneType"),
        ((X, Y.tolist()), "batch 1 must hold tensors, but its targets are a list of int"),
    ],
)
def test_a_batch_of_another_form_is_named_by_its_number(second, message):
    with pytest.raises(ValueError, match=message):
        list(batches([(X, Y), second], CPU))


def test_data_and_targets_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"different lengths: \[10, 9\]"):
        list(batches((X, Y[:9]), CPU))


@pytest.mark.parametrize("made", ["inputs", "targets", "both"])
@pytest.mark.parametrize("form", ["whole", "batches", "a loader"])
def test_data_that_were_made_in_inference_mode_become_ordinary_ones(made, form):
    with torch.inference_mode():
        x = X.clone() if made != "targets" else X
        y = Y.clone() if made != "inputs" else Y
        data = {"whole": (x, y), "batches": cut(x, y, 4)}.get(form)
    data = data or DataLoader(TensorDataset(x, y), batch_size=4)
    for inside in (False, True):
        with torch.inference_mode(inside):
            found = list(batches(data, CPU))
        assert not any(t.is_inference() for batch in found for t in (batch.inputs, batch.target))
        assert same(torch.cat([batch.inputs for batch in found]), X)


# Joining small batches


def joined(data, *enough):
    """Join with another target for each batch that is handed out, the last one for the rest."""
    asked = iter([*enough, *enough[-1:] * 99])
    target = [next(asked)]
    for batch in join(batches(data, CPU), lambda: target[0]):
        yield batch
        target[0] = next(asked)


@given(st.integers(1, 12), st.integers(0, 12))
@PROPERTY
def test_joined_batches_hold_the_same_observations_in_order(size, enough):
    found = list(joined(cut(X, Y, size), enough))
    assert same(torch.cat([batch.inputs for batch in found]), X)
    assert same(torch.cat([batch.target for batch in found]), Y)
    assert [batch.first for batch in found] == [int(batch.target[0]) for batch in found]
    assert all(len(batch) >= min(enough, N) for batch in found[:-1])
    assert all(len(batch) <= max(enough - 1, 0) + size for batch in found)


def test_batches_are_joined_no_further_than_needed():
    assert [len(batch) for batch in joined(cut(X, Y, 2), 0)] == [2] * 5
    assert [len(batch) for batch in joined(cut(X, Y, 2), 0, 3)] == [2, 4, 4]
    assert [len(batch) for batch in joined(cut(X, Y, 2), 100)] == [10]


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(2, 3), torch.arange(2)),
        (torch.zeros(2, 2, dtype=torch.float64), torch.arange(2)),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), torch.arange(2)),
        (torch.zeros(2, 2), torch.zeros(2, 1)),
    ],
    ids=["longer rows", "another dtype", "more inputs", "other targets"],
)
def test_batches_of_another_form_are_not_joined(other):
    first = (X[:2], Y[:2])
    assert [len(b) for b in joined([first, first, other, first], 100)] == [4, 2, 2]


def test_joined_batches_of_named_inputs_keep_their_names():
    (batch,) = joined([{"x": x, "labels": y} for x, y in cut(X, Y, 4)], 100)
    assert same(batch.inputs, {"x": X})


def test_what_was_joined_comes_apart_as_it_was():
    (together,) = join(marking_last(batches(cut(X, Y, 4), CPU)), lambda: 100)
    parts, before = list(together.apart()), list(marking_last(batches(cut(X, Y, 4), CPU)))
    assert [same(part[:4], own[:4]) for part, own in zip(parts, before, strict=True)] == [True] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("looked", [0, 1, 2, 99])
def test_looking_ahead_loses_nothing(form, looked):
    reading = Reading(FORMS[form](), lambda raw: raw)
    seen = list(islice(reading.ahead(), looked))
    read = list(batches(reading, CPU))
    expected = list(batches(FORMS[form](), CPU))
    assert len(seen) <= looked
    assert all(same(a.target, b.target) for a, b in zip(read, expected, strict=True))
    if form != "a generator":
        assert len(list(batches(reading, CPU))) == len(expected)


def test_what_is_read_is_changed_and_what_is_looked_at_is_not():
    reading = Reading([(X, Y)], lambda pair: (pair[0], -pair[1]))
    ((_, seen),) = reading.ahead()
    ((_, read),) = reading
    assert same(seen, Y)
    assert same(read, -Y)


def test_looking_ahead_starts_one_pass_only():
    passes = []

    class Counted:
        def __iter__(self):
            passes.append(1)
            return iter(cut(X, Y, 4))

    reading = Reading(Counted(), lambda raw: raw)
    next(reading.ahead())
    list(reading)
    assert len(passes) == 1
    list(reading)
    assert len(passes) == 2
