"""One run through a network, and the way back from its output."""

import weakref
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ewc_lib.score.forward_pass import ForwardPass, in_units, pull_through
from ewc_lib.score.record import Recorder
from tests.scenarios import HiddenLinear

W = nn.Parameter(torch.arange(12.0, dtype=torch.float64).reshape(3, 4) / 12)
SQUARE = nn.Parameter(torch.eye(4, dtype=torch.float64))


def passed(function, *shape):
    x = torch.ones(shape, dtype=torch.float64)
    with Recorder({"w": W, "square": SQUARE}, [W, SQUARE], x) as recorder:
        output = function(x)
    return ForwardPass(x, output, recorder)


def linear(x):
    return F.linear(x, W)


def test_columns_come_back_to_the_uses_that_they_reach():
    run = passed(lambda x: linear(x).tanh() + 0 * linear(x).detach(), 5, 4)
    columns = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = columns * (1 - linear(run.inputs).tanh().square())
    for some in (slice(0, 1), slice(None)):  # alone, and together with another
        found = run.pull([0, 1], columns[some])
        assert found.keys() == {0}
        torch.testing.assert_close(found[0], expected[some])
    assert run.pull([], columns) == {}


def branches(x):
    """A use on the way to another, one beside it, and one that the output does not reach."""
    h = linear(x) @ torch.ones(3, 4, dtype=torch.float64) + F.linear(x, W.T @ W)
    linear(x)
    return linear(h.tanh())


def test_gradients_are_handed_out_as_they_arrive_and_are_those_of_a_whole_way_back():
    run, order = passed(branches, 5, 4), []
    column, found = torch.randn(5, 3, dtype=torch.float64), {}
    numbers = range(len(run.uses))
    run.visit(numbers, column, lambda i, g: order.append(i) or found.update({i: g}))
    expected = run.pull(numbers, column[None])
    assert found.keys() == expected.keys()
    assert len(order) == len(found)
    for i, g in expected.items():
        torch.testing.assert_close(found[i], g)
    assert order[0] == max(order)  # the last one of the model comes first
    run.visit([], column, lambda i, g: pytest.fail("there is nothing to hand out"))


def test_what_is_handed_out_can_be_let_go_before_the_next_arrives():
    """Of a deep network, the gradients of two layers exist at a time, not of all."""
    run = passed(lambda x: reduce(lambda h, _: torch.tanh(h @ SQUARE), range(20), x), 5, 4)
    alive, most = weakref.WeakSet(), []

    def take(i, g):
        alive.add(g)
        most.append(len(alive))

    run.visit(range(len(run.uses)), torch.ones(5, 4, dtype=torch.float64), take)
    assert len(most) == 20
    assert max(most) <= 2


def test_a_failure_on_the_way_leaves_no_hook_behind():
    run = passed(branches, 5, 4)
    column = torch.ones(5, 3, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError):
        run.visit(range(len(run.uses)), column, lambda i, g: 1 / 0)
    run.pull(range(len(run.uses)), column[None])  # and nobody is asked


def test_an_output_without_a_gradient_uses_nothing():
    run = passed(lambda x: linear(x).detach(), 5, 4)
    assert run.uses == []
    assert len(run) == 5


@pytest.mark.parametrize("shape", [(2, 4), (7, 4)])
def test_the_number_of_observations_changes_no_signature(shape):
    assert passed(linear, *shape).signature == passed(linear, 5, 4).signature


def test_the_number_of_positions_changes_the_signature_only_where_they_are_flattened():
    def flattened(x):
        return linear(x.reshape(-1, 4)).reshape(len(x), -1)

    assert passed(linear, 5, 2, 4).signature == passed(linear, 5, 7, 4).signature
    assert passed(flattened, 5, 2, 4).signature != passed(flattened, 5, 7, 4).signature
    assert passed(flattened, 5, 2, 4).way == passed(flattened, 5, 7, 4).way


def test_what_is_not_known_to_leave_rows_in_place_is_not_predictable():
    assert passed(linear, 5, 4).is_predictable
    assert not passed(lambda x: linear(x[x[:, 0] > 0]), 5, 4).is_predictable
    assert not passed(lambda x: linear(x) + HiddenLinear.apply(x, W), 5, 4).is_predictable


@pytest.mark.parametrize("size", [1e-6, 1e8])
def test_small_and_large_columns_come_back_through_half_precision(size):
    run = passed(lambda x: linear(x).half().double(), 5, 4)
    column = torch.full((5, 3), size, dtype=torch.float64)
    torch.testing.assert_close(
        run.pull([0], column[None])[0][0].double(), column, rtol=1e-3, atol=0.0
    )


def test_units_are_powers_of_two_and_one_in_full_precision():
    column = torch.full((5, 3), 10.0, dtype=torch.float64)
    assert passed(linear, 5, 4).unit(column) == 1.0
    assert passed(lambda x: linear(x).half().double(), 5, 4).unit(column) == 16
    assert in_units(column, 1.0) is column


def test_where_a_column_does_not_reach_there_is_nothing():
    idle = torch.ones(2, requires_grad=True)
    output = W.sum().reshape(1, 1)
    found = pull_through(
        output, [*map(get_gradient_edge, (W, idle))], torch.full((1, 1), 2.0, dtype=torch.float64)
    )
    assert torch.equal(found[0], torch.full_like(W, 2.0))
    assert found[1] is None
