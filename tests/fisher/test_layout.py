"""Cutting a tensor into what the operation would have seen with each observation alone."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ewc_lib.fisher.layout import Layout, layouts, weigh
from tests.scenarios import PROPERTY

FIRST, SECOND, THIRD = Layout(), Layout(1), Layout(2)
INNER = Layout(inner=True)

SIZES = st.lists(st.integers(1, 4), max_size=3)


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@st.composite
def laid_out(draw):
    """A layout, observations as a batch, and the tensor that holds them so."""
    n, axis, after = draw(st.integers(1, 5)), draw(st.integers(0, 2)), draw(SIZES)
    before = draw(st.lists(st.integers(1, 4), min_size=axis, max_size=axis))
    if axis:  # an axis of their own
        positions, layout = 1, Layout(axis)
    else:  # flattened together with positions
        positions, layout = draw(st.integers(1, 4)), Layout(inner=draw(st.booleans()))
    alone = numbered(n, *before, positions, *after)
    whole = alone.movedim(0, axis + layout.inner)
    return layout, n, alone, whole.flatten(axis, axis + 1)


@PROPERTY
@given(laid_out())
def test_each_part_is_what_the_operation_would_see_alone(case):
    layout, n, alone, whole = case
    assert layout.fits(whole.shape, n)
    assert torch.equal(layout.split(whole, n), alone)


@PROPERTY
@given(laid_out())
def test_a_tensor_need_not_be_contiguous(case):
    layout, n, alone, whole = case
    strided = whole.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(layout.split(strided, n), alone)


@PROPERTY
@given(st.integers(1, 6), st.lists(st.integers(0, 6), max_size=4))
def test_every_layout_that_is_tried_fits_and_the_usual_one_comes_first(n, sizes):
    shape = torch.Size(sizes)
    found = list(layouts(shape, n))
    assert len(set(found)) == len(found)
    for layout in found:
        if 0 not in shape:
            assert layout.fits(shape, n)
            parts = layout.split(numbered(*shape), n)
            assert len(parts) == n
            assert sorted(parts.reshape(-1).tolist()) == list(range(shape.numel()))
    if FIRST.fits(shape, n):
        assert found[0] == FIRST
    for axis in range(1, len(shape)):
        assert (Layout(axis) in found) == (shape[axis] == n)
        assert Layout(axis, inner=True) not in found


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
    found = [layout for layout in layouts(torch.Size(shape), n) if layout.fits(shape, n)]
    assert found == expected


@pytest.mark.parametrize(
    ("layout", "shape", "fits"),
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
def test_a_shape_must_have_room_for_all_observations(layout, shape, fits):
    assert layout.fits(torch.Size(shape), 3) == fits


@PROPERTY
@given(laid_out(), st.sampled_from([torch.float32, torch.float64]))
def test_weights_multiply_whole_observations(case, dtype):
    layout, n, alone, whole = case
    weights = torch.arange(1.0, n + 1, dtype=torch.float64)
    found = weigh(layout.split(whole.to(dtype), n), weights)
    assert found.dtype == dtype
    for i in range(n):
        assert torch.equal(found[i], (i + 1) * alone[i].to(dtype))
