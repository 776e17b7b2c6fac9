"""Parameters as one vector, and data as rows."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Size

from ewc_lib._parameters import count, ravel, row, rows, unravel
from tests.scenarios import PROPERTY, same

SHAPES = st.dictionaries(
    st.sampled_from("dacb"), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4
)


@given(SHAPES)
@PROPERTY
def test_unravelling_a_ravelled_dict_gives_it_back(shapes):
    theta = {name: torch.randn(shape) for name, shape in shapes.items()}
    flat, restore = ravel(theta)
    assert flat.shape == (sum(value.numel() for value in theta.values()),)
    assert same(restore(flat), theta)
    assert list(restore(flat)) == list(theta)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_unravelling_a_ravelled_tensor_gives_it_back(shape):
    theta = torch.randn(shape)
    flat, restore = ravel(theta)
    assert flat.dim() == 1
    assert same(restore(flat), theta)


def test_named_parameters_are_concatenated_in_the_order_of_the_dict():
    flat, _ = ravel({"z": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)})
    assert flat.tolist() == [1, 2, 3]


def test_ravelling_is_differentiable():
    theta = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    (torch.tensor([1.0, 2.0, 3.0]) @ ravel(theta)[0]).backward()
    assert theta["a"].grad.tolist() == [1, 2]
    assert theta["b"].grad.tolist() == [3]


def test_a_vector_of_the_wrong_length_is_refused():
    with pytest.raises(RuntimeError, match="split"):
        unravel(torch.zeros(5), {"a": Size([2]), "b": Size([2])})


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(3),
        torch.zeros(3, 2),
        (torch.zeros(3, 2), torch.zeros(3)),
        {"a": torch.zeros(3), "b": torch.zeros(3, 1)},
        ({"a": torch.zeros(3), "b": (torch.zeros(3),)}, torch.zeros(3)),
    ],
)
def test_observations_are_counted_along_the_first_axis_of_any_nesting(data):
    assert count(data) == 3
    assert len(list(rows(data))) == 3


def test_a_row_holds_the_same_observation_of_every_tensor():
    data = ({"a": torch.arange(3)}, torch.arange(6).reshape(3, 2))
    assert same(row(data, 1), ({"a": torch.tensor(1)}, torch.tensor([2, 3])))
    assert [inputs["a"].item() for inputs, _ in rows(data)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0), "data is empty"),
        ((torch.zeros(0, 2), torch.zeros(0)), "data is empty"),
        ((torch.zeros(3), torch.zeros(2)), r"different lengths: \[3, 2\]"),
        (torch.tensor(1.0), "0-d tensor"),
        ((torch.zeros(2), torch.tensor(1.0)), "0-d tensor"),
        ((), "must be a tensor"),
        ([1.0, 2.0], "must be a tensor"),
        ((torch.zeros(2), [1, 2]), "must be a tensor"),
    ],
)
def test_data_without_rows_of_one_length_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        count(data)
