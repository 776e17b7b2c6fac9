"""Settings for all tests of the engine."""

import pytest
import torch

from tests.budgets import set_budget


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Run tiny models on one thread: several would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def batches_as_given(monkeypatch):
    """Run every batch by itself, so that a test means the batch sizes that it names."""
    set_budget(monkeypatch, batch=0)
