"""Warnings point to the line of the user, and say each thing once."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib._warning import Once, warn


def test_a_warning_points_to_the_line_that_called_the_package():
    model = nn.Linear(2, 2)
    ewc = EWC(model, 1.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ewc.consolidate((torch.randn(4, 2), torch.arange(4) % 2))
        ewc.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        ewc.proximal_step_(optimizer)
        warn("by itself")
    assert [w.filename for w in found] == [__file__, __file__]
    assert [w.category for w in found] == [RuntimeWarning, RuntimeWarning]


@pytest.mark.parametrize(
    "again", [lambda say: say, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_each_thing_is_said_once_also_by_a_copy(again):
    say = Once()
    with pytest.warns(RuntimeWarning, match="first"):
        say("a", "first")
    again(say)("a", "first")
    with pytest.warns(RuntimeWarning, match="second"):
        again(say)("b", "second")
