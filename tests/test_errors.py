"""Errors that a program may want to tell from others."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib._parameters import count
from ewc_lib.errors import EmptyData
from ewc_lib.score import per_observation_gradients

EMPTY = {
    "no batch": [],
    "an iterator that is used up": iter([]),
    "tensors without a row": (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
    "a batch without a row": [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))],
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_whoever_reads_data_without_an_observation_says_so_by_the_type_of_the_error(data):
    model = nn.Linear(3, 2)
    for read in (
        lambda: fisher_information(model, data),
        lambda: EWC(model, 1.0).consolidate(data),
        lambda: next(per_observation_gradients(model, data)),
    ):
        with pytest.raises(EmptyData, match="data is empty"):
            read()


def test_rows_that_are_not_there_are_no_other_mistake():
    with pytest.raises(EmptyData):
        count((torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(ValueError, match="different lengths") as found:
        count((torch.zeros(3), torch.zeros(2)))
    assert not isinstance(found.value, EmptyData)
