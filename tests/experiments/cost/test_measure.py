from functools import partial

import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost import measure as module
from ewc_lib.experiments.cost.benchmarks import Benchmark, _vectors
from ewc_lib.experiments.cost.measure import peak_bytes, profile, quiet, require, seconds
from ewc_lib.experiments.cost.peers import plain_pass

TINY = Benchmark(
    "Tiny MLP",
    partial(mlp, (4, 5, 3), 0),
    partial(_vectors, shape=(4,), classes=3),
    n=20,
    batch_size=8,
)
MIB = 2**20


def impossible(model, batches):
    raise NotImplementedError


def test_a_run_leaves_the_model_alone():
    def vandal(model, batches):
        model.train()
        model.register_forward_hook(impossible)
        for p in model.parameters():
            p.data.zero_()

    model = TINY.model()
    seconds(vandal, model, TINY.batches(8))
    assert not model.training
    assert all(p.any() for p in model.parameters())
    model(TINY.batches(8)[0][0])


def test_peak_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(150 * MIB)  # 600 MiB
    wide = TINY._replace(
        build=partial(mlp, (100_000, 1, 3), 0), draw=partial(_vectors, shape=(100_000,), classes=3)
    )
    small, large = (peak_bytes(plain_pass, wide, n, 1) for n in (1, 501))
    assert small < 4 * ballast.numel()
    assert large - small > 0.9 * 500 * 100_000 * 4


def test_a_profile_names_the_operations():
    assert "aten::addmm" in profile(TINY, "plain", threads=1)
    assert "aten::addmm" in profile(TINY, "sketch", threads=1)
    with pytest.raises(ValueError, match="unknown kind 'mc'; there are plain, exact"):
        profile(TINY, "mc")


def test_threads_and_the_collector_are_put_back():
    before = torch.get_num_threads()
    with quiet(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


class PretendedCard:
    """A graphics card that works for as long as it is told to, while the processor goes on."""

    def __init__(self, monkeypatch):
        self.clock, self.queue, self.held, self.peak = 0.0, 0.0, 5 * MIB, 900 * MIB
        monkeypatch.setattr(torch.accelerator, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.clock)

    def synchronize(self):
        self.clock, self.queue = self.clock + self.queue, 0.0

    def reset(self):
        self.peak = self.held

    def run(self, model, batches):
        """Take one second of the processor and nine of the card, and 70 MiB."""
        self.clock, self.queue, self.peak = self.clock + 1, self.queue + 9, self.held + 70 * MIB


def test_a_clock_waits_for_a_card_before_and_after(monkeypatch):
    card = PretendedCard(monkeypatch)
    there = TINY._replace(device="meta")
    card.queue = 100  # of somebody else
    assert seconds(card.run, there.model(), there.batches(8)) == 10
    assert seconds(card.run, TINY.model(), TINY.batches(8)) == 1  # nobody waits on a processor


def test_peak_memory_on_a_card_is_what_a_run_takes_of_its_allocator(monkeypatch):
    card = PretendedCard(monkeypatch)
    assert peak_bytes(card.run, TINY._replace(device="meta"), 8, 1) == 70 * MIB
    assert card.held == 5 * MIB


def test_only_the_processor_and_cuda_can_be_measured(monkeypatch):
    require("cpu")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'mps'"):
        require("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        require("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require("cuda")
