"""The score of a network for every observation, against one observation at a time."""

import pytest
import torch
from torch import nn

from ewc_lib._calling import forward
from ewc_lib.likelihood import network_log_prob
from ewc_lib.likelihood.outputs import output_distribution
from ewc_lib.score import per_observation_gradients, scores
from tests.scenarios import BATCH_SIZES, SCENARIOS, N, cut, same, slow_path_allowed, trace_of


def whole(pieces):
    """Put the gradients of all observations together."""
    pieces = list(pieces)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def one_by_one(case, value):
    """Gradients of a number that a single observation has, by autograd."""
    case.model.eval()
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    rows = []
    for x, y in cut(case.x, case.y, *[1] * N):
        number = value(forward(case.model, x), y).sum()
        found = torch.autograd.grad(number, [*parameters.values()], allow_unused=True)
        pairs = zip(parameters.values(), found, strict=True)
        rows.append([torch.zeros_like(p) if g is None else g.to_dense() for p, g in pairs])
    return {n: torch.stack(g) for n, g in zip(parameters, zip(*rows, strict=True), strict=True)}


def random_direction(output, target):
    """A direction that depends on the observation alone, not on its place in the batch."""
    return (3 * output).sin()


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_gradients_of_the_log_likelihood_are_those_of_single_observations(name, batch_size):
    case = SCENARIOS[name]()
    data = cut(case.x, case.y, *[batch_size] * (N // batch_size), N % batch_size)
    data = [(x, y) for x, y in data if len(y)]
    with slow_path_allowed():
        found = whole(per_observation_gradients(case.model, data, case.likelihood))
    expected = one_by_one(case, output_distribution(case.likelihood).log_prob)
    assert list(found) == list(expected)
    for n, g in found.items():
        torch.testing.assert_close(g, expected[n], rtol=1e-9, atol=1e-10)


def test_they_are_the_scores_by_definition():
    case = SCENARIOS["mlp_categorical"]()
    (found,) = per_observation_gradients(case.model, (case.x, case.y), case.likelihood)
    expected = scores(*network_log_prob(case.model, case.likelihood), (case.x, case.y))
    rows = torch.cat([g.flatten(1) for g in found.values()], 1)
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [1, 300, None])
@pytest.mark.parametrize("name", ["mlp_categorical", "linear_and_einsum", "tied_weights"])
def test_any_direction_goes_back_for_each_observation(name, max_bytes):
    case = SCENARIOS[name]()
    found = per_observation_gradients(
        case.model, (case.x, case.y), direction=random_direction, max_bytes=max_bytes
    )
    expected = one_by_one(case, lambda out, y: out * random_direction(out.detach(), y))
    for n, g in whole(found).items():
        torch.testing.assert_close(g, expected[n], rtol=1e-9, atol=1e-10)


def test_pieces_hold_as_many_observations_as_the_memory_allows():
    model = nn.Linear(3, 2)
    row_bytes = 4 * sum(p.numel() for p in model.parameters())
    data = torch.randn(7, 3), torch.zeros(7, dtype=torch.long)
    found = per_observation_gradients(model, data, max_bytes=3 * row_bytes)
    assert [len(piece["bias"]) for piece in found] == [3, 3, 1]


def test_the_model_is_as_it_was_whenever_gradients_are_handed_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    data = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long)) for _ in range(2)]
    before = trace_of(model)
    for _ in per_observation_gradients(model, data):
        assert same(trace_of(model), before)


def test_only_the_chosen_parameters_and_observations_are_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    data = torch.randn(7, 3), torch.zeros(7, dtype=torch.long)
    (found,) = per_observation_gradients(model, data, params="1.*", n_samples=5)
    assert {name: tuple(g.shape) for name, g in found.items()} == {
        "1.weight": (5, 2, 4),
        "1.bias": (5, 2),
    }


def test_a_parameter_without_a_use_has_zeros():
    model = nn.Linear(3, 2)
    model.idle = nn.Parameter(torch.ones(2))
    (found,) = per_observation_gradients(
        model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), params=["idle", "bias"]
    )
    assert torch.equal(found["idle"], torch.zeros(4, 2))
    assert found["bias"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_half_precision_gets_gradients_in_single_precision(dtype, precision):
    model = nn.Linear(3, 2).to(dtype)
    x, y = torch.randn(4, 3).to(dtype), torch.tensor([0, 1, 1, 0])
    (found,) = per_observation_gradients(model, (x, y), precision=precision)
    (exact,) = per_observation_gradients(model.float(), (x.float(), y))
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name, g in found.items():
        torch.testing.assert_close(g, exact[name], rtol=0.05, atol=0.01)


def test_a_model_that_mixes_observations_is_refused():
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(ValueError, match="mixes observations"):
        list(per_observation_gradients(model, (torch.randn(9, 3), torch.zeros(9).long())))


def test_targets_are_not_read_if_a_direction_is_given():
    model = nn.Linear(3, 2)
    wrong = torch.full((4,), 99)
    found = per_observation_gradients(
        model, (torch.randn(4, 3), wrong), direction=lambda output, target: 2 * output
    )
    assert len(list(found)) == 1
    with pytest.raises(ValueError, match="99"):
        list(per_observation_gradients(model, (torch.randn(4, 3), wrong)))


class Sums(nn.Module):
    """Two biases that are added to one tensor, and a parameter whose gradient is expanded."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        hidden = self.a(x) + self.b(x.tanh()) + self.c
        return torch.cat([hidden, hidden.sum(1, keepdim=True)], 1)


def test_whoever_changes_a_gradient_changes_no_other():
    data = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    (found,) = per_observation_gradients(model := Sums(), data)
    before = {name: g.clone() for name, g in found.items()}
    for name, g in found.items():
        g.mul_(2)
        torch.testing.assert_close(g, 2 * before[name])
    (again,) = per_observation_gradients(model, data)
    torch.testing.assert_close(again, before)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (lambda output, target: output[:, :1], r"like the output, \(4, 2\), got \(4, 1\)"),
        (lambda output, target: output.sum(), r"got \(\)"),
        (lambda output, target: None, "got NoneType"),
        (lambda output, target: output * torch.nan, "finite"),
        (lambda output, target: torch.complex(output, output), "real"),
    ],
)
def test_a_direction_that_is_none_is_refused(direction, message):
    data = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        list(per_observation_gradients(nn.Linear(3, 2), data, direction=direction))


def test_a_random_direction_is_another_one_for_each_batch():
    drawn = []

    def noise(output, target):
        drawn.append(torch.randn_like(output))
        return drawn[-1]

    data = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))] * 2
    list(per_observation_gradients(nn.Linear(3, 2), data, direction=noise))
    assert not torch.equal(*drawn)


def test_the_model_may_change_between_batches_and_not_within_one():
    model = nn.Linear(3, 2)
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long)) for _ in range(2)]

    def learn():
        pairs = zip(data, per_observation_gradients(model, data), strict=True)
        for (x, y), found in pairs:
            own = model.weight.detach().clone().requires_grad_()
            loss = nn.functional.cross_entropy(x @ own.mT + model.bias, y, reduction="sum")
            (expected,) = torch.autograd.grad(-loss, own)
            torch.testing.assert_close(found["weight"].sum(0), expected)
            with torch.no_grad():
                model.weight += found["weight"].mean(0)

    learn()
    pieces = per_observation_gradients(model, data, max_bytes=1)
    next(pieces)
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ValueError, match="changed between two pieces"):
        next(pieces)


def test_parameters_that_were_exchanged_or_frozen_are_named():
    model = nn.Linear(3, 2)
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))] * 2
    for change in (
        lambda: setattr(model, "weight", nn.Parameter(torch.ones(2, 3))),
        lambda: model.weight.requires_grad_(False),
    ):
        found = per_observation_gradients(model, data)
        next(found)
        change()
        with pytest.raises(ValueError, match="'weight' was exchanged or frozen"):
            next(found)


def test_inputs_that_carry_a_graph_are_inputs_alone():
    embed, model = nn.Linear(3, 3), nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    (with_graph,) = per_observation_gradients(model, [(embed(x), y)])
    (without,) = per_observation_gradients(model, [(embed(x).detach(), y)])
    torch.testing.assert_close(with_graph, without)


@pytest.mark.parametrize("bad", [0, -1, 1e6, "1GB"])
def test_a_wrong_budget_is_refused_at_once(bad):
    data = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="max_bytes must be a positive whole number"):
        per_observation_gradients(nn.Linear(3, 2), data, max_bytes=bad)
