"""Which way a parameter goes, on how many observations that is tried, and when it is kept."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib._batches import Batch
from ewc_lib.score.trial import Trial
from tests.scenarios import SCENARIOS, N, cut, estimate, relative_error
from tests.score.cases import batch, of, three_paths


def spy_on_trials(monkeypatch):
    """Return the list to which every judged pass adds its number of observations."""
    judged, judge = [], Trial._judged

    def spy(self, *rest):
        judged.append(len(self.forward))
        return judge(self, *rest)

    monkeypatch.setattr(Trial, "_judged", spy)
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


def test_rules_are_tried_on_a_few_observations_once(monkeypatch):
    judged = spy_on_trials(monkeypatch)
    model = SCENARIOS["mlp_categorical"]().model.eval()
    found = of(model)
    for n in (20, 20, 17):  # a ragged last batch needs no second trial
        found.run(Batch(torch.randn(n, 4).double(), torch.zeros(n, dtype=torch.long), 0))
    assert judged == [5]  # a quarter of the first batch


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
    assert judged == [5, 20]
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


# Batches that differ in length, so that the first says nothing of the others


class Ragged(nn.Module):
    """Two layers, and a function of a sequence of any length."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.rare = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def two_views(m, x):
    """Positions of two views in one axis: with one position, views and positions look alike."""
    views = torch.cat([x.reshape(-1, 6), x.flip(-1).reshape(-1, 6)])
    a, b = torch.tanh(m.first(views)).view(2, len(x), -1, 4)
    return m.last((a * b).sum(1))


def repeated_positions(m, x):
    return m.last(torch.tanh(m.first(x) + m.table.repeat(3, 1)[: x.shape[1]]).sum(1))


def rare_layer(m, x):
    """Positions come first, and in the first batch one position of one observation is rare."""
    z = x.transpose(0, 1)
    return m.last((torch.tanh(m.first(z)) + m.rare(z) * (z[..., :1] > 3)).sum(0))


def permuted(m, x):
    """Rows in an order by value, by products with a permutation matrix."""
    z = x.sum(1)
    p = nn.functional.one_hot(x[:, 0, 0].argsort().argsort(), len(x)).to(x).T
    return m.last(p.T @ torch.tanh(m.first(p @ z)))


def batches(function, lengths):
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(4, t, 6, generator=generator).double() for t in lengths]
    if function is rare_layer:
        for i, x in enumerate(found):
            x.clamp_(-2, 2)
            if i in (0, len(found) - 1):
                x[0, 0, 0] = 4
            else:
                x[1:, 1:, 0] += 3
    if function is permuted:
        for i in (0, -1):
            found[i] = found[i][found[i][:, 0, 0].argsort()]
    return [(x, torch.arange(4) % 3) for x in found]


@pytest.mark.parametrize(
    ("function", "lengths"),
    [
        (two_views, (1, 5, 3, 7, 4, 1)),
        (repeated_positions, (4, 9, 8, 7, 9, 4)),
        (rare_layer, (4, 8, 4, 8, 4, 8, 4)),
        (permuted, (3, 5, 4, 5, 4, 3)),
    ],
)
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_what_the_first_batch_shows_is_not_taken_for_all(function, lengths, structure):
    torch.manual_seed(0)
    model, data = Ragged(function).double(), batches(function, lengths)
    options = {"kind": "empirical", "structure": structure}
    found = fisher_information(model, data, **options).to_dense()
    alone = [cut(x, y, 1) for x, y in data]
    expected = fisher_information(model, [pair for b in alone for pair in b], **options).to_dense()
    assert relative_error(found, expected) < 1e-10


def imputing(m, x):
    """Missing inputs are replaced by the mean of the others."""
    missing = x < -900
    mean = x.masked_fill(missing, 0).sum(0) / (~missing).sum(0)
    return m.last(torch.tanh(m.first(torch.where(missing, mean, x))).sum(1))


def test_always_compares_the_outputs_of_all_observations():
    torch.manual_seed(0)
    model, x = Ragged(imputing).double(), torch.randn(40, 4, 6).double()
    x[7, 1, 2] = x[14, 0, 0] = x[31, 3, 5] = -999
    with pytest.raises(ValueError, match="mixes observations"):
        fisher_information(model, (x, torch.arange(40) % 3), certify="always")
    with pytest.raises(ValueError, match="certify must be one of 'auto', 'always'"):
        fisher_information(model, (x, torch.arange(40) % 3), certify="never")


def clamped(m, x):
    with torch.no_grad():
        m.first.weight.clamp_(-0.1, 0.1)
    return m.last(torch.tanh(m.first(x)).sum(1))


def test_a_constraint_on_a_parameter_is_undone():
    torch.manual_seed(0)
    model = Ragged(clamped).double()
    before = model.first.weight.detach().clone()
    found = fisher_information(model, batches(clamped, (3, 4)))
    assert torch.equal(model.first.weight, before)
    clamped(model, torch.ones(1, 1, 6).double())
    torch.testing.assert_close(
        found.diagonal(), fisher_information(model, batches(clamped, (3, 4))).diagonal()
    )


def chosen(m, x):
    h = torch.cond(m.last.bias.sum() > -9, lambda z: m.first(z).tanh(), lambda z: m.first(z), (x,))
    return m.last(h.sum(1))


def test_control_flow_that_needs_a_compiler_is_refused_by_name():
    model = Ragged(chosen).double()
    with pytest.raises(ValueError, match=r"torch\.cond"):
        fisher_information(model, batches(chosen, (3,)))


class RefusalError(Exception):
    """An error of a model's own."""


def test_a_model_may_refuse_rows_in_another_order():
    def in_order(model, inputs):
        if (inputs[0].diff(dim=0)[:, 0] < 0).any():
            raise RefusalError
        return None

    case = SCENARIOS["mlp_categorical"]()
    x = torch.randn(40, 4).double().sort(0).values
    data = x, torch.zeros(40, dtype=torch.long)
    free = fisher_information(case.model, data).diagonal()
    case.model.register_forward_pre_hook(in_order)
    bound = fisher_information(case.model, data).diagonal()
    assert all(torch.allclose(bound[name], free[name]) for name in free)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 12, 15, 16, 36, 64])
@pytest.mark.parametrize(
    "others",
    [lambda h: h.flip(0), lambda h: h.roll(len(h) // 2, 0), lambda h: h.roll(1, 0)],
    ids=["from the other end", "half a batch away", "next"],
)
def test_a_mixture_of_two_rows_is_seen_in_a_batch_of_any_size(others, n):
    case = SCENARIOS["mlp_categorical"]()
    case.model.register_forward_hook(lambda model, inputs, output: output + others(output.detach()))
    data = torch.randn(n, 4).double(), torch.zeros(n, dtype=torch.long)
    with pytest.raises(ValueError, match="mixes observations"):
        fisher_information(case.model, data)
