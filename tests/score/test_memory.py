"""Work is cut within a budget, and sums are precise enough."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ewc_lib.score import memory
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


# Devices

GIB = 2**30


@pytest.mark.parametrize("free", [2**24, GIB, 8 * GIB, 80 * GIB])
def test_pieces_on_an_accelerator_take_a_share_of_the_free_memory_and_at_most_a_gibibyte(free):
    budget = memory.accelerator(free)
    sizes = (budget.squares, budget.rows, budget.vmap, budget.windows, budget.batch)
    assert all(size <= budget.limit for size in (*sizes, budget.columns))
    assert budget.limit == max(2**20, min(GIB, free // 8))


def test_no_layer_is_cut_in_more_than_a_few_pieces_unless_memory_is_short():
    n, row_bytes = 128, 512 * 512 * 9 * 4  # a layer of ResNet-18, 9 MiB for each observation
    plenty, little = memory.accelerator(80 * GIB), memory.accelerator(GIB)
    assert len(list(plenty.pieces_of_squares(n, row_bytes))) <= 9
    assert len(list(memory.CPU.pieces_of_squares(n, row_bytes))) == n
    for part in little.pieces_of_squares(n, row_bytes):
        assert (part.stop - part.start) * row_bytes <= little.limit


def test_a_cpu_keeps_pieces_in_its_cache_and_columns_apart():
    assert memory.budget(torch.device("cpu")) == memory.CPU
    assert memory.CPU.squares == 2**22
    assert memory.CPU.columns == 0
    assert not memory.CPU.by_reduction


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_what_the_allocator_keeps_unused_counts_as_free(kind, monkeypatch):
    backend = getattr(torch, kind)
    monkeypatch.setattr(backend, "mem_get_info", lambda device: (3 * GIB, 80 * GIB), raising=False)
    monkeypatch.setattr(backend, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(backend, "memory_allocated", lambda device: GIB)
    assert memory.budget(torch.device(kind)) == memory.accelerator(4 * GIB)


def test_an_apple_device_counts_what_it_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB)
    assert memory.budget(torch.device("mps")) == memory.accelerator(4 * GIB)


def test_a_pretended_device_lasts_as_long_as_its_block():
    with memory.as_on("cuda", free=8 * GIB):
        assert memory.budget(torch.device("cpu")) == memory.accelerator(8 * GIB)
        with memory.as_on("cpu"):
            assert memory.budget(torch.device("cuda")) == memory.CPU
        assert memory.budget(torch.device("cpu")) == memory.accelerator(8 * GIB)
    assert memory.budget(torch.device("cpu")) == memory.CPU
