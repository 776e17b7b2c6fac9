"""Some outputs of a network are read at a time, and the others have no part in anything."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.heads import MultiHead, all_outputs, read, read_now

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return MultiHead(nn.Linear(3, 6))


def test_a_model_returns_the_outputs_that_are_read(model):
    assert torch.equal(model(X), model.net(X))
    model.outputs = range(2, 4)
    assert torch.equal(model(X), model.net(X)[:, 2:4])
    assert torch.equal(all_outputs(model, X), model.net(X))


def test_what_is_read_now_is_told_for_models_with_and_without_heads(model):
    assert read_now(model, 6) == read_now(model.net, 6) == range(6)
    model.outputs = range(1, 3)
    assert read_now(model, 6) == range(1, 3)
    assert torch.equal(read(model.net(X), None), model.net(X))


def test_what_is_not_read_has_no_gradient_and_no_information(model):
    model.outputs = range(2, 4)
    nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 1, 0, 1])).backward()
    information = fisher_information(model, (X, torch.zeros(5, dtype=torch.long))).diagonal()
    rows = torch.tensor([False, False, True, True, False, False])
    assert torch.equal(model.net.weight.grad.any(1), rows)
    assert torch.equal(information["net.weight"].any(1), rows)
