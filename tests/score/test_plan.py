"""Which way a parameter goes, on how many observations that is tried, and when it is kept."""

import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib._batches import Batch
from ewc_lib.score.plan import Planner
from tests.scenarios import SCENARIOS, N, cut, estimate, relative_error
from tests.score.cases import batch, of, three_paths


def spy_on_trials(monkeypatch):
    """Return the list to which every judged pass adds its number of observations."""
    judged, judge = [], Planner._try
    monkeypatch.setattr(
        Planner, "_try", lambda self, b, trial: judged.append(len(trial)) or judge(self, b, trial)
    )
    return judged


def test_each_parameter_takes_the_path_that_its_operations_allow():
    network = three_paths()
    network.run(batch(5))
    assert network.paths() == {
        "by_rule.weight": "rule",
        "by_rule.bias": "rule",
        "by_generic": "generic",
        "idle": "unused",
    }


def test_rules_are_tried_on_eight_observations_once(monkeypatch):
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
    x[:, 0] = -1
    x[11, 0] = 1
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
