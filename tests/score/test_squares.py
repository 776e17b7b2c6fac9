"""Squares are added right, on every device in as few operations as suit it."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ewc_lib.experiments.cost.counts import asked
from ewc_lib.score import memory
from ewc_lib.score.squares import SquareSums
from tests.scenarios import PROPERTY

ON_GPU = memory.accelerator(2**35)
each_budget = pytest.mark.parametrize("budget", [memory.CPU, ON_GPU], ids=["cpu", "gpu"])


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.booleans()), min_size=1),
    st.integers(1, 4000),
    st.booleans(),
)
def test_every_square_is_added_once_whatever_waits_for_what(sizes, room, on_gpu):
    budget = replace(ON_GPU if on_gpu else memory.CPU, squares=room)
    squares, pairs = SquareSums(budget), []
    for seed, (n, width, reusable) in enumerate(sizes):
        rows, out = normal(n, 2, width, seed=seed), normal(width, seed=100 + seed)
        pairs.append((out, out + rows.square().sum((0, 1))))
        squares.add(out, rows.clone() if reusable else rows, reusable)
    squares.finish()
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


@each_budget
def test_several_rows_for_one_sum_are_all_added(budget):
    out, rows = torch.zeros(3, dtype=torch.float64), normal(4, 3)
    squares = SquareSums(budget)
    for part in (rows, rows, rows[:2]):
        squares.add(out, part)
    squares.finish()
    squares.finish()  # nothing is left
    torch.testing.assert_close(out, (2 * rows.square()).sum(0) + rows[:2].square().sum(0))


@each_budget
def test_rows_that_are_kept_for_something_else_stay_as_they_are(budget):
    rows = normal(2**10, 2**8)
    before, squares = rows.clone(), SquareSums(replace(budget, squares=2**10))
    squares.add(torch.zeros(2**8, dtype=torch.float64), rows)
    squares.finish()
    assert torch.equal(rows, before)


@pytest.mark.parametrize("n", [3, 300])
def test_on_an_accelerator_many_small_sums_take_as_many_operations_as_few(n):
    outs = [torch.zeros(5) for _ in range(n)]
    rows = [torch.ones(2, 5) for _ in range(n)]

    def run():
        squares = SquareSums(ON_GPU)
        for out, own in zip(outs, rows, strict=True):
            squares.add(out, own)
        squares.finish()

    assert asked(run).operations == 3  # join, reduce, add


def test_large_squares_are_reduced_without_being_written():
    squares, rows = SquareSums(ON_GPU), torch.ones(16, 2**18)
    found = asked(lambda: squares.add(torch.zeros(2**18), rows))
    assert found.calls["linalg_vector_norm"] == 1
    assert found.calls["pow"] == found.calls["mul"] == 0


def test_no_more_waits_than_a_part_of_a_piece():
    squares = SquareSums(replace(ON_GPU, squares=2**12))
    out = torch.zeros(2**8)
    found = asked(lambda: [squares.add(out, torch.ones(4, 2**8)) for _ in range(8)])
    assert found.calls["_foreach_addcmul_"] > 0
    assert out.sum() > 0


def test_memory_for_pieces_is_used_again():
    squares, like = SquareSums(memory.CPU), torch.zeros(1)
    first, second = squares.scratch(like, 4, 5), squares.scratch(like, 2, 3)
    assert first.data_ptr() == second.data_ptr()
    assert (first.shape, second.shape) == ((4, 5), (2, 3))
    assert squares.scratch(like, 40, 5).numel() == 200
    assert squares.scratch(like.double(), 1).dtype == torch.float64
