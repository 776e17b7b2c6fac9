"""Memory aware synapses, against the formula of Aljundi et al. 2018 written out."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib.regularizers import MAS
from tests.budgets import set_budget
from tests.regularizers.cases import DOUBLE, TIGHT, copies, move, network, task


def sensitivity(model, x):
    """The mean of absolute gradients, one observation after the other."""
    total = {name: torch.zeros_like(p) for name, p in copies(model).items()}
    for one in x:
        squared_length = (model(one[None]) ** 2).sum()
        gradients = torch.autograd.grad(squared_length, [*model.parameters()])
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.abs() / len(x)
    return total


@pytest.mark.parametrize("outputs", [None, range(0, 2), range(1, 4)])
def test_the_importance_is_that_of_the_paper_summed_over_tasks(outputs):
    model = network()
    model.outputs = outputs
    regularizer, total = MAS(model, strength=4.0), {}
    for t in range(3):
        move(model, t)
        x, y = task(t)
        own = sensitivity(model, x)
        total = {name: total.get(name, 0) + value for name, value in own.items()}
        found = regularizer.consolidate((x, y))
        for name, value in found.values.items():
            torch.testing.assert_close(value, own[name], **TIGHT)
    last = copies(model)
    move(model, 7)
    d = {name: p - last[name] for name, p in copies(model).items()}
    expected = 4 / 2 * sum((total[name] * d[name] ** 2).sum() for name in d)
    torch.testing.assert_close(regularizer.penalty(), expected, **TIGHT)


def test_observations_do_not_cancel():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    shifted = nn.Sequential(model)
    shifted.forward = lambda x: model(x) + 2.0  # 2 (w x + 2) x is 6 and -2
    value = MAS(shifted, 1.0).consolidate((x, torch.zeros(2, dtype=torch.long))).values["0.weight"]
    assert value.item() == pytest.approx((6 + 2) / 2, rel=1e-12)


@pytest.mark.parametrize("limit", [1, 100, 2**24])
def test_the_result_does_not_depend_on_how_many_gradients_are_held_at_once(limit, monkeypatch):
    set_budget(monkeypatch, rows=8 * limit)
    model = network()
    x, y = task()
    expected = sensitivity(model, x)
    for name, value in MAS(model, 1.0).consolidate((x, y)).values.items():
        torch.testing.assert_close(value, expected[name], **TIGHT)


def test_exactly_n_samples_are_used_drawn_by_the_generator_from_one_tuple():
    model = network()
    x, y = task()
    found = {
        seed: MAS(model, 1.0).consolidate(
            (x, y), n_samples=5, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    }
    default = MAS(model, 1.0).consolidate((x, y), n_samples=5)
    assert torch.equal(default.values["net.0.bias"], found[0].values["net.0.bias"])
    for seed, importance in found.items():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        expected = sensitivity(model, x[order[:5]])
        assert importance.n_samples == 5
        torch.testing.assert_close(importance.values["net.0.bias"], expected["net.0.bias"], **TIGHT)
    first = MAS(model, 1.0).consolidate([(x, y)], n_samples=5)
    expected = sensitivity(model, x[:5])
    torch.testing.assert_close(first.values["net.0.bias"], expected["net.0.bias"], **TIGHT)


def test_dropout_is_off():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    found = MAS(model, 1.0).consolidate(task())
    expected = sensitivity(model.eval(), task()[0])
    torch.testing.assert_close(found.values["0.weight"], expected["0.weight"], **TIGHT)


def test_tied_weights_count_once_with_both_their_uses():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second).double()
    second.weight = first.weight
    found = MAS(model, 1.0).consolidate(task())
    assert list(found.values) == ["0.weight"]
    expected = sensitivity(model, task()[0])
    torch.testing.assert_close(found.values["0.weight"], expected["0.weight"], **TIGHT)


def test_a_model_that_mixes_observations_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).double()
    with pytest.raises(ValueError, match="mixes observations"):
        MAS(model, 1.0).consolidate(task())


def test_the_random_state_is_kept_though_the_data_are_shuffled():
    x, y = task()
    loader = DataLoader(TensorDataset(x, y), 3, shuffle=True)
    before = torch.get_rng_state()
    MAS(network(), 1.0).consolidate(loader)
    assert torch.equal(torch.get_rng_state(), before)
