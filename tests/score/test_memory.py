"""Work is cut within a budget, and sums are precise enough."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ewc_lib.score.memory import pieces, sum_dtype
from tests.scenarios import PROPERTY


@PROPERTY
@given(st.integers(0, 9), st.integers(0, 200), st.integers(1, 400))
def test_pieces_cover_every_row_once_within_the_budget(n, row_bytes, budget):
    parts = list(pieces(n, row_bytes, budget))
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    lengths = [len(range(n)[part]) for part in parts]
    assert all(length * row_bytes <= budget or length == 1 for length in lengths)
    assert all(length == lengths[0] for length in lengths[:-1])
    assert not lengths or row_bytes == 0 or lengths[0] in (n, max(1, budget // row_bytes))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_at_least_in_single_precision(given, expected):
    assert sum_dtype(torch.ones((), dtype=given)) == expected
