"""A stream makes its tasks when they are asked for, and knows which outputs they have."""

import pytest
import torch

from ewc_lib import data
from ewc_lib.continual import permuted, split


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def test_in_the_class_scenario_old_tasks_are_read_by_all_outputs_so_far(digits):
    stream = split(digits, scenario="class")
    assert stream.outputs(0, after=3) == range(8)
    assert split(digits, scenario="task").outputs(0, after=3) == range(2)
    assert split(digits, scenario="domain").outputs(0, after=3) == range(2)


def test_tasks_are_made_when_they_are_asked_for_and_not_kept(digits):
    stream = permuted(digits, 2, seed=0)
    first, again = stream[1], stream[1]
    assert torch.equal(first.train[0], again.train[0])
    assert first.train[0].data_ptr() != again.train[0].data_ptr()
    assert torch.equal(stream.test(1)[0], first.test[0])


def test_a_stream_is_a_sequence(digits):
    stream = permuted(digits, 3, seed=0)
    assert len(stream) == len(list(stream)) == 3
    assert stream[-1].name == stream[2].name == "permutation 3"
    with pytest.raises(IndexError):
        stream[3]


def test_a_stream_has_no_slices_and_is_equal_to_itself_alone(digits):
    stream = permuted(digits, 3, seed=0)
    with pytest.raises(TypeError, match="slice"):
        stream[:2]
    assert stream == stream
    assert stream != permuted(data.digits(), 3, seed=0)
