import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost import _plain
from ewc_lib.experiments.cost._plain import (
    func_empirical,
    func_exact,
    loop_empirical,
    loop_exact,
    plain_pass,
)
from ewc_lib.experiments.cost.benchmarks import _text
from ewc_lib.experiments.cost.models import GPT2

WAYS = {"empirical": (func_empirical, loop_empirical), "exact": (func_exact, loop_exact)}


@pytest.mark.parametrize("exact", [True, False])
def test_the_loop_is_right_for_softmax_regression(exact):
    model = nn.Linear(3, 4)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(9) % 4
    p = model(x).softmax(-1).detach()
    weight = p * (1 - p) if exact else (F.one_hot(y, 4) - p).square()
    found = (loop_exact if exact else loop_empirical)(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    torch.testing.assert_close(found["bias"], weight.mean(0))
    torch.testing.assert_close(found["weight"], weight.T @ x.square() / 9)


@pytest.mark.parametrize("kind", WAYS)
def test_chunks_do_not_change_the_answer(kind, monkeypatch):
    by_func, by_loop = WAYS[kind]
    monkeypatch.setattr(_plain, "CHUNK_BYTES", {"cpu": 1})
    model = mlp((4, 5, 3), 0).double()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [(x[:4], torch.arange(4) % 3), (x[4:], torch.arange(3))]
    torch.testing.assert_close(by_func(model, batches), by_loop(model, batches))


def test_a_plain_pass_computes_the_gradient_of_the_mean_loss():
    model = GPT2(6, 5, width=4, layers=1, heads=2)
    x, y = _text(4, torch.Generator().manual_seed(0), length=5, vocabulary=6)
    plain_pass(model, [(x, y)])
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


@pytest.mark.parametrize("columns", [1, 10])
def test_chunks_are_larger_on_a_card(columns):
    class There(nn.Module):
        def parameters(self):
            return iter([torch.empty(2**20, device="meta")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_plain.CHUNK_BYTES, "meta", _plain.CHUNK_BYTES["cuda"])
        there = _plain._chunk(There(), columns)
    assert there == _plain.CHUNK_BYTES["cuda"] // (columns * 2**22)
    assert there > _plain._chunk(There(), columns) == _plain.CHUNK_BYTES["cpu"] // (columns * 2**22)
