"""Lengths are right in every precision, and read at once."""

import pytest
import torch

from ewc_lib.experiments.cost.counts import asked
from ewc_lib.score import lengths

TENSORS = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.zeros(0)]


def test_lengths_of_several_groups_are_read_at_once():
    assert lengths.norms(TENSORS, [], TENSORS[:1]) == [[5.0, 3.0, 0.0], [], [5.0]]
    assert lengths.norms() == []
    assert asked(lambda: lengths.norms(TENSORS, TENSORS)).waits == 1


@pytest.mark.parametrize("size", [1e-6, 6e4])
def test_half_precision_neither_overflows_nor_vanishes(size):
    tensor = torch.full((100,), size, dtype=torch.float16)
    assert lengths.norm(tensor) == pytest.approx(10 * float(tensor[0]), rel=1e-6)
    (difference,) = lengths.differences([tensor], [-tensor])
    assert lengths.norm(difference) == pytest.approx(20 * float(tensor[0]), rel=1e-6)


def test_truth_values_and_whole_numbers_have_lengths():
    assert lengths.norm(torch.tensor([True, False])) == 1
    assert lengths.norm(torch.tensor([0, 2])) == 2


def test_sums_start_at_zero_in_the_precision_of_sums():
    like = {"a": torch.ones(2, 3).half(), "b": torch.ones(4).double(), "c": torch.tensor(1.0)}
    found = lengths.zeros(like)
    assert found.keys() == like.keys()
    assert {name: t.dtype for name, t in found.items()} == {
        "a": torch.float32,
        "b": torch.float64,
        "c": torch.float32,
    }
    for name, tensor in found.items():
        assert tensor.shape == like[name].shape
        assert not tensor.any()
        tensor += 1  # they share no entry
    assert all((tensor == 1).all() for tensor in found.values())


@pytest.mark.parametrize("room", [1, 4, 7, 100])
def test_pieces_hold_every_item_once_in_order(room):
    sizes = [3, 1, 4, 1, 5, 9, 2, 6]
    pieces = list(lengths.in_pieces(list(range(8)), lambda i: sizes[i], room))
    assert [i for piece in pieces for i in piece] == list(range(8))
    assert all(sum(sizes[i] for i in piece[1:]) < max(room, 1) for piece in pieces)
