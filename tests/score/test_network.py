"""Batch after batch: paths, plans, checks of the output, and joined batches."""

import sys

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib._batches import Batch
from ewc_lib.likelihood.outputs import Categorical
from ewc_lib.score import memory
from ewc_lib.score.network import NetworkScores
from ewc_lib.score.network import _eager as eager
from ewc_lib.score.plan import Planner
from tests.scenarios import SCENARIOS, N, cut, estimate, relative_error, same


class ThreePaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_rule = nn.Linear(3, 4)
        self.by_generic = nn.Parameter(torch.ones(4, 4))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.by_rule(x)
        return torch.einsum("ni,oi,i->no", h, self.by_generic, torch.ones_like(h[0]))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return of(ThreePaths().double().eval())


def of(model):
    return NetworkScores(model, dict(model.named_parameters()), Categorical())


def batch(n, first=0):
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return Batch(x, torch.zeros(n, dtype=torch.long), first)


def spy_on_trials(monkeypatch):
    """Return the list to which every judged pass adds its number of observations."""
    judged, judge = [], Planner._try
    monkeypatch.setattr(
        Planner, "_try", lambda self, b, trial: judged.append(len(trial)) or judge(self, b, trial)
    )
    return judged


def test_each_parameter_takes_the_path_that_its_operations_allow(network):
    network.run(batch(5))
    assert network.paths() == {
        "by_rule.weight": "rule",
        "by_rule.bias": "rule",
        "by_generic": "generic",
        "idle": "unused",
    }


def test_both_paths_together_bring_back_the_gradient_of_the_batch(network):
    scores = network.run(batch(5))
    column = torch.randn(scores.output.shape, generator=torch.Generator().manual_seed(1)).double()
    names = ["by_rule.weight", "by_rule.bias", "by_generic"]
    parameters = dict(network.model.named_parameters())
    expected = torch.autograd.grad(
        scores.forward.output, [parameters[name] for name in names], column, retain_graph=True
    )
    found = {
        name: gradients.gradients().sum(0) for name, gradients in scores.by_rule(column).items()
    }
    for _, generic in scores.by_function([column]):
        found |= {name: g.sum((0, 1)) for name, g in generic.items()}
    assert set(found) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_an_output_without_one_row_per_observation_is_refused(network):
    network.model.forward = lambda x: x.sum(0)
    with pytest.raises(ValueError, match="one row per observation"):
        network.run(batch(5))


def test_an_output_that_is_not_finite_is_refused_by_its_observation(network):
    with torch.no_grad():
        network.model.by_rule.weight[0] = 1e300
    bad = batch(5, first=20)
    bad.inputs[3] = 1e300
    with pytest.raises(ValueError, match="the output of observation 23 is not finite"):
        network.run(bad)


# Decisions


def test_rules_are_tried_on_eight_observations_once(network, monkeypatch):
    judged = spy_on_trials(monkeypatch)
    model = SCENARIOS["mlp_categorical"]().model.eval()
    found = of(model)
    for n in (20, 20, 17):  # a ragged last batch needs no second trial
        found.run(Batch(torch.randn(n, 4).double(), torch.zeros(n, dtype=torch.long), 0))
    assert judged == [8]


def test_a_single_observation_settles_nothing(monkeypatch):
    judged = spy_on_trials(monkeypatch)
    estimate(SCENARIOS["attention"](), 1)
    assert judged == [1] * N


class Late(nn.Module):
    """A layer that takes part only in observations with a positive first input."""

    def __init__(self):
        super().__init__()
        self.always, self.late = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.always(x) + (x[:, :1] > 0) * self.late(x)


def test_a_layer_without_part_in_the_first_observations_is_tried_on_all(monkeypatch):
    judged = spy_on_trials(monkeypatch)
    torch.manual_seed(0)
    model = Late().double()
    x = torch.randn(20, 3).double()
    x[:8, 0] = -1
    y = torch.zeros(20, dtype=torch.long)
    found = fisher_information(model, (x, y), structure="dense").to_dense()
    assert judged == [8, 20]
    one_by_one = fisher_information(model, cut(x, y, 1), structure="dense").to_dense()
    assert relative_error(found, one_by_one) < 1e-10


class Flattened(nn.Module):
    """Positions and observations in one axis, the observation changing fastest."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)

    def forward(self, x):
        flat = self.layer(x.transpose(0, 1).reshape(-1, 2))
        return torch.tanh(flat).reshape(x.shape[1], len(x), 4).sum(0)


def test_a_plan_is_not_kept_where_positions_appear():
    """With one position both ways to flatten look alike."""
    torch.manual_seed(0)
    model = Flattened().double()
    y = torch.zeros(18, dtype=torch.long)
    short, long = (torch.randn(18, t, 2).double() for t in (1, 5))
    together = fisher_information(model, [(short, y), (long, y)], structure="dense").to_dense()
    parts = [fisher_information(model, [(x, y)], structure="dense") for x in (short, long)]
    assert relative_error(together, parts[0].pool(parts[1]).to_dense()) < 1e-12


class Switching(nn.Module):
    """The same layer, by a rule or hidden from it, as the length of the input says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3, bias=False)

    def forward(self, x):
        if x.shape[1] > 2:
            w, one = self.layer.weight, torch.ones_like(x[0, 0])
            return torch.tanh(torch.einsum("nti,oi,i->nto", x, w, one)).sum(1)
        return torch.tanh(self.layer(x)).sum(1)


def test_a_plan_is_not_kept_where_other_operations_follow():
    torch.manual_seed(0)
    model = Switching().double()
    y = torch.zeros(18, dtype=torch.long)
    short, long = (torch.randn(18, t, 2).double() for t in (2, 5))
    together = fisher_information(model, [(short, y), (long, y), (short, y)])
    assert together.paths == {"layer.weight": "generic"}
    parts = [fisher_information(model, [(x, y)]) for x in (short, long, short)]
    expected = parts[0].pool(parts[1]).pool(parts[2]).diagonal()
    torch.testing.assert_close(together.diagonal(), expected)


# Joined batches


@pytest.mark.parametrize("name", ["mlp_categorical", "attention", "tied_weights", "lstm"])
@pytest.mark.parametrize("size", [1, 3])
def test_joining_batches_changes_no_number(name, size, monkeypatch):
    case = SCENARIOS[name]()
    apart = estimate(case, size, structure="dense").to_dense()
    monkeypatch.setattr(memory, "BATCH_BYTES", 2**24)
    assert relative_error(estimate(case, size, structure="dense").to_dense(), apart) < 1e-12


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_joining_batches_changes_no_draw(kind, monkeypatch):
    case = SCENARIOS["mlp_categorical"]()
    options = {"kind": kind, "draws": 3, "structure": "dense"}
    apart = estimate(case, 3, **options).to_dense()
    monkeypatch.setattr(memory, "BATCH_BYTES", 2**24)
    assert relative_error(estimate(case, 3, **options).to_dense(), apart) < 1e-12


def test_small_batches_are_joined_after_the_first(monkeypatch):
    sizes, run = [], NetworkScores.run
    monkeypatch.setattr(NetworkScores, "run", lambda self, b: sizes.append(len(b)) or run(self, b))
    monkeypatch.setattr(memory, "BATCH_BYTES", 2**24)
    estimate(SCENARIOS["mlp_categorical"](), 2)
    assert sizes == [2, N - 2]


# No trace, and what was compiled


def test_everything_is_as_it_was_after_an_error(network):
    network.model.train()
    state = torch.get_rng_state()
    seen = []

    def fail():
        seen.append(network.model.training)
        torch.rand(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), network.leaving_no_trace():
        fail()
    assert seen == [False]
    assert network.model.training
    assert same(torch.get_rng_state(), state)


def test_the_compiler_is_only_touched_where_it_was_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: asked.append(stance))
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with eager():
        pass
    assert asked == []
