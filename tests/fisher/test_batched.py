from itertools import product

import pytest
import torch
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import mlp
from ewc_lib.fisher.batched import in_many
from ewc_lib.fisher.output import root
from ewc_lib.likelihood.outputs import Categorical


def small(dtype=torch.float64):
    """A network, and two observations of which it is not sure."""
    model = mlp((2, 3, 3), seed=0).to(dtype)
    x = torch.tensor([[1.0, -2.0], [0.5, 1.5]], dtype=dtype)
    return model, x, torch.tensor([0, 2])


def flat(fisher):
    return torch.cat([d.flatten() for d in fisher.diagonal().values()])


def over_all_signs(monkeypatch, model, data, **options):
    """Estimates with every choice of signs, all equally likely."""
    outputs = [model(x).shape for x, _ in data]
    sizes = [shape.numel() for shape in outputs]
    found = []
    for bits in product((0, 1), repeat=sum(sizes)):
        parts = iter(torch.tensor(bits).split(sizes))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, parts=parts, **__: next(parts).view(-1, 3))
            found.append(flat(fisher_information(model, data, kind="batched", **options)))
    return torch.stack(found)


@pytest.mark.claim("eq-batched")
@pytest.mark.parametrize("together", [True, False])
def test_the_mean_over_all_signs_is_the_definition_however_data_are_batched(monkeypatch, together):
    model, x, y = small()
    data = [(x, y)] if together else [(x[:1], y[:1]), (x[1:], y[1:])]
    found = over_all_signs(monkeypatch, model, data)
    exact = flat(fisher_information(model, (x, y)))
    torch.testing.assert_close(found.mean(0), exact, rtol=1e-12, atol=1e-15)
    assert found.std(0).max() > 0.1 * exact.max()  # no single one of them is


@pytest.mark.claim("eq-batched-variance")
def test_the_variance_over_all_signs_is_that_of_the_theorem(monkeypatch):
    model, x, y = small()
    found = over_all_signs(monkeypatch, model, [(x, y)])
    columns = torch.cat(list(root(Categorical(), model(x).detach())))  # [K, N, C]
    w = torch.stack([along(model, x, column) for column in columns])  # [K, N, P]
    of_batch = w.square().sum((0, 1))
    want = 2 * (of_batch.square() - w.pow(4).sum((0, 1))) / len(x) ** 2
    torch.testing.assert_close(found.var(0, correction=0), want, rtol=1e-10, atol=1e-15)


def along(model, x, column):
    """The gradient of each observation along a column, one row each."""
    rows = []
    for n in range(len(x)):
        total = (model(x[n : n + 1]) * column[n]).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def test_batches_of_one_observation_give_the_sketch():
    model, x, y = small()
    found = [
        flat(fisher_information(model, [(x[:1], y[:1]), (x[1:], y[1:])], kind=kind, draws=3))
        for kind in ("batched", "sketch")
    ]
    torch.testing.assert_close(*found)


def test_more_draws_bring_it_nearer():
    model, x, y = small()
    exact = flat(fisher_information(model, (x, y)))
    errors = [
        (flat(fisher_information(model, (x, y), kind="batched", draws=m)) - exact).norm()
        for m in (1, 2000)
    ]
    assert errors[1] < 0.1 * exact.norm() < errors[0]


def test_parts_of_the_data_pool_to_the_whole():
    model, x, y = small()
    x, y = x.repeat(4, 1), y.repeat(4)
    batches = list(zip(x.split(2), y.split(2), strict=True))
    options = {"kind": "batched", "generator": torch.Generator().manual_seed(3)}
    first = fisher_information(model, batches[:1], **options)
    rest = fisher_information(model, batches[1:], **options)
    options["generator"].manual_seed(3)
    whole = fisher_information(model, batches, **options)
    together = first.pool(rest)
    torch.testing.assert_close(flat(together), flat(whole))
    assert (together.n_samples, together.kind) == (8, "batched")


@pytest.mark.parametrize(("n", "sizes"), [(5, [2, 1]), (100, [3, 1]), (10_000, [128, 16])])
def test_one_tuple_of_tensors_makes_many_batches(n, sizes):
    data = torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)
    found = [len(y) for _, y in in_many(data)]
    assert len(found) >= min(n / 2, 32)
    assert sum(found) == n
    assert sorted({*found}, reverse=True) == sizes


def test_some_hundred_observations_in_one_tuple_are_not_one_draw():
    model, x, y = small()
    x, y = torch.randn(256, 2, dtype=x.dtype), torch.arange(256) % 3
    exact = flat(fisher_information(model, (x, y)))
    errors = [
        (flat(fisher_information(model, data, kind="batched")) - exact).norm()
        for data in ((x, y), [(x, y)])
    ]
    assert errors[0] < 0.6 * exact.norm()
    assert errors[0] < errors[1]


def test_only_so_many_observations_count():
    model, x, y = small()
    data = [(x.repeat(3, 1), y.repeat(3))]
    found = fisher_information(model, data, kind="batched", n_samples=2)
    whole = fisher_information(model, [(x, y)], kind="batched")
    torch.testing.assert_close(flat(found), flat(whole))


def test_labels_that_do_not_count_add_nothing():
    model, x, _ = small()
    found = fisher_information(model, (x, torch.tensor([-100, -100])), kind="batched")
    assert found.trace() == 0


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "bernoulli"])
def test_other_likelihoods_have_the_right_mean(likelihood):
    model, x, _ = small()
    y = torch.ones(2, 3, dtype=torch.float64)
    found = fisher_information(model, (x, y), likelihood, kind="batched", draws=4000)
    exact = fisher_information(model, (x, y), likelihood)
    assert (flat(found) - flat(exact)).norm() < 0.1 * flat(exact).norm()


def test_a_model_in_half_precision_is_run_in_single_precision():
    model, x, y = small(torch.bfloat16)
    found = fisher_information(model, (x, y), kind="batched")
    want = fisher_information(model.float(), (x.float(), y), kind="batched")
    torch.testing.assert_close(flat(found), flat(want))


class OneByOne(nn.Module):
    """Looks at a number of each observation, which no rule and no vmap allows."""

    def __init__(self):
        super().__init__()
        self.inner, self.spare = nn.Linear(2, 3), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return torch.stack([self.inner(row) * (1.0 if row.sum().item() > 0 else 0.5) for row in x])


def test_no_observation_is_run_alone_but_those_of_the_check(monkeypatch):
    model, data = OneByOne(), (torch.randn(32, 2), torch.zeros(32, dtype=torch.long))
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = fisher_information(model, [data], kind="batched")
    assert sizes.count(32) == 1
    assert sum(sizes) < 2 * 32
    assert found.paths == {"inner.weight": "rule", "inner.bias": "rule", "spare": "unused"}
    assert found.diagonal()["spare"].eq(0).all()


def test_the_model_is_left_as_it_was():
    model, x, y = small()
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    fisher_information(model, (x, y), kind="batched")
    assert model.training
    assert model[0].weight.grad.eq(1).all()
    assert model[0].bias.grad is None


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


def test_a_model_that_mixes_observations_is_refused():
    data = torch.randn(16, 2), torch.zeros(16, dtype=torch.long)
    with pytest.raises(ValueError, match="mixes observations"):
        fisher_information(Centred(), data, kind="batched")


def test_only_a_diagonal_is_offered():
    model, x, y = small()
    with pytest.raises(ValueError, match="gives structure='diagonal' only, not 'dense'"):
        fisher_information(model, (x, y), kind="batched", structure="dense")
    with pytest.raises(ValueError, match="gives structure='diagonal' only, not 'block'"):
        EWC(model, 1.0, kind="batched", structure="block")


def test_a_row_for_each_observation_is_needed():
    model, x, y = nn.Sequential(nn.Linear(2, 3), nn.Flatten(0)), *small(torch.float32)[1:]
    with pytest.raises(ValueError, match="one row per observation"):
        fisher_information(model, (x, y), kind="batched")


def test_ewc_takes_it():
    model, x, y = small()
    ewc = EWC(model, 1.0, kind="batched")
    first = ewc.consolidate((x, y))
    ewc.consolidate((x, y))
    assert ewc.n_tasks == 2
    assert first.kind == "batched"
    assert not torch.equal(flat(ewc.precision), 2 * flat(first))  # other signs for each task
