"""Per-observation gradients without rules: by vmap, one by one, and in parts."""

import warnings

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib._calling import Caller
from ewc_lib.score.by_vmap import VmapGradients
from tests.budgets import set_budget
from tests.scenarios import SCENARIOS, N, Scenario, estimate, same, slow_path_allowed

VECTORISED = ("cnn_with_norms", "attention", "tied_weights", "weight_norm", "sequence_of_labels")


def prepare(name, k=2):
    case = SCENARIOS[name]()
    case.model.eval()
    parameters = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    output = case.model(case.x)
    shape = (k, *output.shape)
    columns = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    return case, parameters, columns


def gradients(path, names, x, columns):
    with slow_path_allowed():
        parts = list(path.gradients(names, x, columns))
    covered = [i for part, _ in parts for i in range(len(x))[part]]
    assert covered == list(range(len(x)))
    return {name: torch.cat([found[name] for _, found in parts], 1) for name in names}, len(parts)


def expected_gradients(case, parameters, columns):
    """Autograd on one observation and one column at a time."""
    found = {n: torch.zeros(*columns.shape[:2], *p.shape).double() for n, p in parameters.items()}
    for i in range(N):
        for k in range(len(columns)):
            output = case.model(case.x[i : i + 1])
            grads = torch.autograd.grad(output, list(parameters.values()), columns[k, i : i + 1])
            for name, g in zip(parameters, grads, strict=True):
                found[name][k, i] = g
    return found


@pytest.mark.parametrize("name", [*VECTORISED, "lstm"])
def test_agrees_with_autograd_one_by_one(name):
    case, parameters, columns = prepare(name)
    expected = expected_gradients(case, parameters, columns)
    found, _ = gradients(
        VmapGradients(Caller(case.model), parameters), list(parameters), case.x, columns
    )
    for n in parameters:
        assert torch.allclose(found[n], expected[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VECTORISED)
def test_the_loop_agrees_with_vmap(name):
    case, parameters, columns = prepare(name)
    names = list(parameters)
    vectorised, looped = (
        VmapGradients(Caller(case.model), parameters),
        VmapGradients(Caller(case.model), parameters),
    )
    looped.by_loop = True
    a, _ = gradients(vectorised, names, case.x, columns)
    b, _ = gradients(looped, names, case.x, columns)
    assert vectorised.looped == set()
    assert looped.looped == set(names)
    for n in names:
        assert torch.allclose(a[n], b[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cnn_with_norms", "lstm"])
def test_some_parameters_are_as_good_as_all(name):
    case, parameters, columns = prepare(name)
    path = VmapGradients(Caller(case.model), parameters)
    everything, _ = gradients(path, list(parameters), case.x, columns)
    for n in parameters:
        alone, _ = gradients(VmapGradients(Caller(case.model), parameters), [n], case.x, columns)
        assert torch.allclose(alone[n], everything[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("budget", "parts"), [(0, N), (1, N), (3, 3), (N - 1, 2), (N, 1), (99, 1)])
def test_the_budget_bounds_what_exists_at_once(budget, parts, monkeypatch):
    case, parameters, columns = prepare("cnn_with_norms")
    names = ["0.weight", "4.bias"]
    per_observation = sum(parameters[n].numel() for n in names) * 8 * len(columns)
    whole, _ = gradients(VmapGradients(Caller(case.model), parameters), names, case.x, columns)
    set_budget(monkeypatch, vmap=budget * per_observation)
    cut, n_parts = gradients(VmapGradients(Caller(case.model), parameters), names, case.x, columns)
    assert n_parts == parts
    for n in names:
        assert torch.allclose(cut[n], whole[n], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("name", ["cnn_with_norms", "linear_and_einsum"])
def test_the_budget_does_not_change_the_result(name, structure, monkeypatch):
    case = SCENARIOS[name]()
    expected = estimate(case, structure=structure).to_dense()
    set_budget(monkeypatch, vmap=1)
    found = estimate(case, structure=structure).to_dense()
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_inputs_and_parameters_keep_their_values_and_gradients():
    case, parameters, columns = prepare("tied_weights")
    before = {n: p.detach().clone() for n, p in parameters.items()}, case.x.clone()
    gradients(VmapGradients(Caller(case.model), parameters), list(parameters), case.x, columns)
    assert same(({n: p.detach() for n, p in parameters.items()}, case.x), before)
    assert all(p.grad is None for p in parameters.values())


def test_the_loop_warns_once_and_names_the_model_and_the_reason(monkeypatch):
    case, parameters, columns = prepare("lstm")
    set_budget(monkeypatch, vmap=1)
    path = VmapGradients(Caller(case.model), parameters)
    message = r"vmap cannot follow LSTM; .* slow \(.+\)"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        parts = list(path.gradients(["cell.weight_ih_l0"], case.x, columns))
    list(path.gradients(["head.bias"], case.x, columns))  # a warning would be an error
    assert len(parts) == N
    assert len(caught) == 1
    assert path.looped == {"cell.weight_ih_l0", "head.bias"}


def test_a_model_that_vmap_follows_slowly_gives_no_warning():
    """The fallback for attention warns of a drop in performance, which is none of the user's."""
    case, parameters, columns = prepare("multihead_attention")
    path = VmapGradients(Caller(case.model), parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(path.gradients(list(parameters), case.x, columns))
    assert path.looped == set()


class Leaky(nn.Module):
    """Its activation has a gradient that is wrong where one vmap runs within another."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Bilinear(3, 3, 4)
        self.activation = nn.PReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.activation(self.hidden(x, x)))


@pytest.mark.parametrize("k", [1, 2, N])
def test_any_number_of_columns_is_as_right_as_one(k):
    torch.manual_seed(0)
    model = Leaky().double().eval()
    x = torch.randn(N, 3, dtype=torch.float64)
    case = Scenario(model, x, "categorical", torch.zeros(N, dtype=torch.long))
    columns = torch.randn(k, N, 3, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    expected = expected_gradients(case, parameters, columns)
    found, _ = gradients(VmapGradients(Caller(model), parameters), list(parameters), x, columns)
    for n in parameters:
        assert torch.allclose(found[n], expected[n], rtol=1e-10, atol=1e-12)


def test_the_warning_points_at_the_line_outside_the_package():
    case, _, _ = prepare("checked_inputs")
    with pytest.warns(RuntimeWarning, match="vmap cannot follow Checked") as caught:
        fisher_information(case.model, (case.x, case.y), kind="empirical")
    assert [w.filename for w in caught if w.category is RuntimeWarning] == [__file__]


def test_observations_one_at_a_time_have_the_last_word(monkeypatch):
    """Where vmap gives wrong gradients, the certificate sees it and the loop is right."""
    case = SCENARIOS["custom_function"]()
    expected = estimate(case).diagonal()
    right = VmapGradients._vectorised

    def wrong(self, names, inputs, columns):
        return {name: 2 * g for name, g in right(self, names, inputs, columns).items()}

    monkeypatch.setattr(VmapGradients, "_vectorised", wrong)
    with pytest.warns(RuntimeWarning, match="other gradients than autograd"):
        found = fisher_information(case.model, (case.x, case.y))
    assert found.paths == {"unseen": "loop", "both": "loop"}
    for name, values in found.diagonal().items():
        torch.testing.assert_close(values, expected[name])


def test_a_mistake_in_the_model_is_not_hidden():
    case, parameters, columns = prepare("mlp_categorical")
    path = VmapGradients(Caller(case.model), parameters)
    with slow_path_allowed(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(path.gradients(["0.bias"], case.x[:, :2], columns))


class Deciding(nn.Module):
    """A model that looks at values before it computes."""

    def __init__(self, decide):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decide = decide

    def forward(self, x):
        return self.second(x) if self.decide(x) else torch.tanh(self.first(x)) * x


def deciding(decide):
    torch.manual_seed(0)
    model = Deciding(decide).double().eval()
    x = torch.arange(3 * N, dtype=torch.float64).reshape(N, 3)
    return Scenario(model, x, "categorical", torch.zeros(N, dtype=torch.long))


DECISIONS = {
    "the same in all": lambda x: (x >= 0).all(),
    "of half of them": lambda x: x.mean() > 10,
    "by a number": lambda x: int((x > 10).sum()) > 0,
    "by an item": lambda x: (x.sum() > 30).item(),
    "one after the other": lambda x: (x >= 0).all() and x.mean() > 4 and x.mean() > 12,
    "by where": lambda x: len((x > 10).any(1).nonzero()),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS)
def test_observations_of_which_the_same_is_computed_go_together(decide, k):
    case = deciding(decide)
    parameters = dict(case.model.named_parameters())
    columns = torch.randn(k, N, 3, dtype=torch.float64)
    expected = {n: torch.zeros(k, N, *p.shape).double() for n, p in parameters.items()}
    for i in range(N):
        for j in range(k):
            output = case.model(case.x[i : i + 1])
            used = [n for n in parameters if ("second" in n) == bool(decide(case.x[i : i + 1]))]
            found = torch.autograd.grad(
                output, [parameters[n] for n in used], columns[j, i : i + 1]
            )
            for n, g in zip(used, found, strict=True):
                expected[n][j, i] = g
    path = VmapGradients(Caller(case.model), parameters)
    found, _ = gradients(path, list(parameters), case.x, columns)
    assert path.looped == set()
    for n in parameters:
        assert torch.allclose(found[n], expected[n], rtol=1e-10, atol=1e-12)


def test_where_each_observation_decides_otherwise_they_go_one_by_one():
    case = deciding(lambda x: float(x.sum()) > 30)
    path = VmapGradients(Caller(case.model), dict(case.model.named_parameters()))
    with pytest.warns(RuntimeWarning, match="depends on a value that is another in each"):
        list(path.gradients(["first.weight"], case.x, torch.ones(1, N, 3).double()))
    assert path.looped == {"first.weight"}
