"""L2 to the last optimum."""

import torch

from ewc_lib.regularizers import L2
from tests.regularizers.cases import TIGHT, copies, move, network


def test_it_is_the_squared_distance_to_the_last_optimum_however_many_tasks_there_were():
    model = network()
    regularizer = L2(model, strength=3.0)
    for t in range(3):
        move(model, t)
        regularizer.consolidate()
    last = copies(model)
    move(model, 7)
    squares = [(p - last[name]).square().sum() for name, p in model.named_parameters()]
    torch.testing.assert_close(regularizer.penalty(), 3 / 2 * sum(squares), **TIGHT)
    assert regularizer.n_tasks == 3
