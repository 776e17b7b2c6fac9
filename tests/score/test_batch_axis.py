"""Cutting a tensor into what the operation would have seen with each observation alone."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ewc_lib.score.batch_axis import BatchAxis, RaggedRows, batch_axes, weigh
from tests.scenarios import PROPERTY

FIRST, SECOND, THIRD = BatchAxis(), BatchAxis(1), BatchAxis(2)
INNER = BatchAxis(inner=True)

SIZES = st.lists(st.integers(1, 4), max_size=3)


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@st.composite
def laid_out(draw):
    """An axis, observations as a batch, and the tensor that holds them so."""
    n, axis, after = draw(st.integers(1, 5)), draw(st.integers(0, 2)), draw(SIZES)
    before = draw(st.lists(st.integers(1, 4), min_size=axis, max_size=axis))
    if axis:  # an axis of their own
        positions, where = 1, BatchAxis(axis)
    else:  # flattened together with positions
        positions, where = draw(st.integers(1, 4)), BatchAxis(inner=draw(st.booleans()))
    alone = numbered(n, *before, positions, *after)
    whole = alone.movedim(0, axis + where.inner)
    return where, n, alone, whole.flatten(axis, axis + 1)


@PROPERTY
@given(laid_out())
def test_each_part_is_what_the_operation_would_see_alone(case):
    where, n, alone, whole = case
    assert where.fits(whole.shape, n)
    assert torch.equal(where.split(whole, n), alone)


@PROPERTY
@given(laid_out())
def test_a_tensor_need_not_be_contiguous(case):
    where, n, alone, whole = case
    strided = whole.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(where.split(strided, n), alone)


@PROPERTY
@given(st.integers(1, 6), st.lists(st.integers(0, 6), max_size=4))
def test_every_layout_that_is_tried_fits_and_the_usual_one_comes_first(n, sizes):
    shape = torch.Size(sizes)
    found = list(batch_axes(shape, n))
    assert len(set(found)) == len(found)
    for where in found:
        if 0 not in shape:
            assert where.fits(shape, n)
            parts = where.split(numbered(*shape), n)
            assert len(parts) == n
            assert sorted(parts.reshape(-1).tolist()) == list(range(shape.numel()))
    if FIRST.fits(shape, n):
        assert found[0] == FIRST
    for axis in range(1, len(shape)):
        assert (BatchAxis(axis) in found) == (shape[axis] == n)
        assert BatchAxis(axis, inner=True) not in found


@pytest.mark.parametrize(
    ("shape", "n", "expected"),
    [
        ((3,), 3, [FIRST]),
        ((3, 2), 3, [FIRST]),
        ((6, 2), 3, [FIRST, INNER]),
        ((6, 3), 3, [FIRST, INNER, SECOND]),
        ((2, 3), 3, [SECOND]),
        ((2, 6), 3, []),
        ((3, 3, 3), 3, [FIRST, SECOND, THIRD]),
        ((2, 4, 3), 3, [THIRD]),
        ((4, 2), 3, []),
        ((), 3, []),
        ((), 1, []),
        ((2, 1), 1, [FIRST, INNER, SECOND]),
        ((3, 0), 3, []),
        ((0, 3), 3, []),
    ],
)
def test_candidates(shape, n, expected):
    found = [where for where in batch_axes(torch.Size(shape), n) if where.fits(shape, n)]
    assert found == expected


@pytest.mark.parametrize(
    ("where", "shape", "fits"),
    [
        (FIRST, (6, 2), True),
        (FIRST, (5, 2), False),
        (FIRST, (), False),
        (FIRST, (6, 0), False),
        (FIRST, (0, 2), False),
        (INNER, (6, 2), True),
        (SECOND, (2, 3), True),
        (SECOND, (2, 4), False),
        (SECOND, (3,), False),
    ],
)
def test_a_shape_must_have_room_for_all_observations(where, shape, fits):
    assert where.fits(torch.Size(shape), 3) == fits


@PROPERTY
@given(laid_out(), st.sampled_from([torch.float32, torch.float64]))
def test_weights_multiply_whole_observations(case, dtype):
    where, n, alone, whole = case
    weights = torch.arange(1.0, n + 1, dtype=torch.float64)
    found = weigh(where.split(whole.to(dtype), n), weights)
    assert found.dtype == dtype
    for i in range(n):
        assert torch.equal(found[i], (i + 1) * alone[i].to(dtype))


@PROPERTY
@given(st.lists(st.integers(0, 4), max_size=9))
def test_ragged_rows_are_those_of_their_owners_in_order(owner):
    """The owner 4 stands for nobody."""
    rows, where = numbered(len(owner), 2) + 1, RaggedRows(torch.tensor(owner).long(), 4)
    assert where.fits(rows.shape, 4)
    cut = where.split(rows, 4)
    assert cut.shape[0] == 4
    for n, own in enumerate(cut):
        expected = rows[[i for i, whose in enumerate(owner) if whose == n]]
        assert torch.equal(own[: len(expected)], expected)
        assert not own[len(expected) :].any()


def test_other_numbers_of_rows_do_not_fit():
    where = RaggedRows(torch.tensor([0, 1, 1]), 2)
    assert not where.fits(torch.Size([4, 2]), 2)
    assert not where.fits(torch.Size([3, 2]), 3)
    assert not where.fits(torch.Size([]), 2)
