"""What may go back together, as it is judged on a few observations."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.score import memory
from ewc_lib.score.trial import Trial
from tests.scenarios import relative_error


def stands_for_several(g):
    try:
        g.data_ptr()
    except RuntimeError:  # it has no memory of its own
        return True
    return False


class Doubling(torch.autograd.Function):
    """The identity, of which a derivative for several columns at once is wrong or missing."""

    fails = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        if not stands_for_several(g):
            return g.clone()
        if Doubling.fails:
            raise RuntimeError("not for several at once")
        return 2 * g


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.second(Doubling.apply(self.first(x)))


@pytest.fixture
def together(monkeypatch):
    """Note of each plan whether columns may go back together."""
    found, plan = [], Trial.plan

    def spy(self):
        result = plan(self)
        found.append(result[0].together)
        return result

    monkeypatch.setattr(Trial, "plan", spy)
    return found


def data(n=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 5


@pytest.mark.parametrize("fails", [True, False])
def test_what_is_wrong_or_fails_for_several_columns_goes_one_after_the_other(
    fails, together, monkeypatch
):
    torch.manual_seed(0)
    model = Model()
    expected = fisher_information(model, data())
    monkeypatch.setattr(Doubling, "fails", fails)
    with memory.as_on("cuda"):
        found = fisher_information(model, data())
    assert not any(together)
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-6
    assert set(found.paths.values()) == {"rule"}


def test_columns_go_back_together_on_an_accelerator_and_not_on_a_cpu(together):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    expected = fisher_information(model, data())
    assert together == [False]
    with memory.as_on("cuda"):
        found = fisher_information(model, data())
    assert together == [False, True]
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-6
