"""A rule that is wrong, or a use that nobody saw, is found out on the user's own model."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.fisher.capture import Pulled, Recorder, Use
from ewc_lib.fisher.certificate import Challenge, check_alone
from ewc_lib.fisher.rules import Broadcast, OuterProduct
from tests.scenarios import CLASSES, SCENARIOS, N, cut, estimate, oracle, relative_error

# Rules broken on purpose


def shifted_observations(monkeypatch):
    """The gradients of one observation are given to the next."""
    factors = OuterProduct._factors
    monkeypatch.setattr(OuterProduct, "_factors", lambda self, a, g: factors(self, a.roll(1, 0), g))
    return "weight"


def wrong_scale(monkeypatch):
    total, gradients = Broadcast.total, Broadcast.gradients
    monkeypatch.setattr(Broadcast, "total", lambda self, a, g: 1.01 * total(self, a, g))
    monkeypatch.setattr(Broadcast, "gradients", lambda self, a, g: 1.01 * gradients(self, a, g))
    return "bias"


def forgotten_use(monkeypatch):
    """Only the first use of a parameter is seen, and the others are not missed."""

    def forgetting(self, func, types, args=(), kwargs=None):
        before = {use.name for use in self.uses}, set(self.unknown)
        n = len(self.uses)
        output = watch(self, func, types, args, kwargs)
        self.uses[n:] = [use for use in self.uses[n:] if use.name not in before[0]]
        self.unknown = before[1]
        return output

    watch = Recorder.__torch_function__
    monkeypatch.setattr(Recorder, "__torch_function__", forgetting)
    return "layer"


def unseen_use(monkeypatch):
    """An operation without a rule is not noticed."""
    watch = Recorder.__torch_function__

    def blind(self, func, types, args=(), kwargs=None):
        output = watch(self, func, types, args, kwargs)
        self.unknown = set()
        return output

    monkeypatch.setattr(Recorder, "__torch_function__", blind)
    return "weight"


def wrong_sign_of_one_observation(monkeypatch):
    to = Pulled.to

    def spoiled(self, dtype):
        pulled = to(self, dtype)
        signs = torch.ones(len(pulled.gradient), *[1] * (pulled.gradient.dim() - 1)).to(dtype)
        signs[-1] = -1
        return Pulled(pulled.use, pulled.gradient * signs)

    monkeypatch.setattr(Pulled, "to", spoiled)
    return ""


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize(
    ("name", "break_rule"),
    [
        ("mlp_categorical", shifted_observations),
        ("positions_in_a_plane", shifted_observations),
        ("mlp_categorical", wrong_scale),
        ("module_called_twice", forgotten_use),
        ("linear_and_einsum", unseen_use),
        ("mlp_categorical", wrong_sign_of_one_observation),
    ],
)
def test_a_broken_rule_is_replaced_by_the_generic_path(name, break_rule, structure, monkeypatch):
    case = SCENARIOS[name]()
    broken = break_rule(monkeypatch)
    for size in (1, 7, N):
        if size == 1 and break_rule is shifted_observations:
            continue  # there is no other observation
        found = estimate(case, size, structure=structure)
        diagonal = torch.cat([d.reshape(-1) for d in found.diagonal().values()])
        assert relative_error(diagonal, oracle(name, "exact").diagonal()) < 1e-10
        assert {n for n, path in found.paths.items() if path == "generic"} == {
            n for n in found.paths if broken in n
        }


def test_the_broken_rules_would_be_wrong_without_a_certificate(monkeypatch):
    case, expected = SCENARIOS["mlp_categorical"](), oracle("mlp_categorical", "exact").diagonal()
    shifted_observations(monkeypatch)
    monkeypatch.setattr(Challenge, "failed_rules", lambda self, pulled: set())
    found = torch.cat([d.reshape(-1) for d in estimate(case).diagonal().values()])
    assert relative_error(found, expected) > 0.01


# Questions and answers


def network_and_output(x):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(x.shape[-1], CLASSES, dtype=x.dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    parameters = dict(layer.named_parameters())
    return parameters, layer(x)


def inputs(n=5, dtype=torch.float64):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def honest(challenge, x):
    g = challenge.direction
    return {
        "weight": [Pulled(Use("weight", OuterProduct(torch.Size([CLASSES, 4])), x, None, ""), g)],
        "bias": [Pulled(Use("bias", Broadcast(torch.Size([CLASSES])), x, None, ""), g)],
    }


def test_the_answer_is_the_weighted_gradient():
    x = inputs()
    parameters, output = network_and_output(x)
    challenge = Challenge.pose(output, parameters)
    weighted = challenge.weights.unsqueeze(1) * challenge.direction
    assert torch.allclose(challenge.answer["weight"], weighted.mT @ x, atol=1e-12)
    assert torch.allclose(challenge.answer["bias"], weighted.sum(0), atol=1e-12)
    assert challenge.failed_rules(honest(challenge, x)) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_honest_rules_pass_and_small_lies_fail_in_every_precision(dtype):
    x = inputs(n=50, dtype=dtype)
    parameters, output = network_and_output(x)
    challenge = Challenge.pose(output, parameters)
    assert challenge.failed_rules(honest(challenge, x)) == set()
    lie = 2 * torch.finfo(dtype).eps ** 0.5
    for name in ("weight", "bias"):
        pulled = honest(challenge, x)
        pulled[name] = [Pulled(p.use, (1 + lie) * p.gradient.double()) for p in pulled[name]]
        assert challenge.failed_rules(pulled) == {name}


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_large_and_small_gradients_are_compared_in_half_precision(scale):
    """Norms that float16 rounds to zero or to infinity would let everything pass."""
    x = (scale * inputs(n=500)).half()
    weights = torch.zeros(CLASSES, 4, dtype=torch.float16)
    expected = torch.full_like(weights, 600 * scale)
    challenge = Challenge(x[:, :CLASSES], x[:, 0], {"weight": expected}, conclusive=True)
    rule = OuterProduct(weights.shape)
    lie = [Pulled(Use("weight", rule, torch.zeros_like(x), None, ""), x[:, :CLASSES])]
    assert challenge.failed_rules({"weight": lie}) == {"weight"}


def test_a_parameter_without_a_rule_fails():
    x = inputs()
    parameters, output = network_and_output(x)
    challenge = Challenge.pose(output, parameters)
    pulled = honest(challenge, x)
    del pulled["bias"]
    assert challenge.failed_rules(pulled) == {"bias"}


def test_a_parameter_that_the_output_does_not_depend_on_has_no_answer():
    x = inputs()
    parameters, output = network_and_output(x)
    idle = parameters | {"idle": nn.Parameter(torch.ones(2))}
    challenge = Challenge.pose(output, idle)
    assert set(challenge.answer) == {"weight", "bias"}
    challenge.check_generic("idle", torch.zeros(2))
    with pytest.raises(ValueError, match="parameter 'idle'"):
        challenge.check_generic("idle", torch.ones(2))
    assert Challenge.pose(output.detach(), parameters).answer == {}


def test_questions_repeat_and_leave_the_graph_and_the_random_state():
    x = inputs()
    parameters, output = network_and_output(x)
    state = torch.get_rng_state()
    first, second = (Challenge.pose(output, parameters) for _ in range(2))
    assert torch.equal(first.direction, second.direction)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parameters.values())


def test_every_observation_has_a_weight_and_a_direction_of_its_own():
    challenge = Challenge.pose(*reversed(network_and_output(inputs(n=50))))
    assert challenge.weights.shape == (50,)
    assert challenge.direction.shape == (50, CLASSES)
    assert len(challenge.weights.unique()) == 50
    assert len(challenge.direction.unique()) == 50 * CLASSES


def test_only_a_gradient_of_every_parameter_is_conclusive():
    x = inputs()
    parameters, output = network_and_output(x)
    assert Challenge.pose(output, parameters).conclusive
    idle = parameters | {"idle": nn.Parameter(torch.ones(2))}
    assert not Challenge.pose(output, idle).conclusive
    parameters, output = network_and_output(torch.zeros_like(x))
    assert not Challenge.pose(output, parameters).conclusive
    assert not Challenge.pose(output.detach(), parameters).conclusive


def test_the_generic_answer_may_be_off_by_the_rounding_of_larger_gradients_only():
    x = inputs()
    parameters, output = network_and_output(x)
    challenge = Challenge.pose(output, parameters | {"zero": nn.Parameter(torch.ones(1))})
    challenge.check_generic("weight", challenge.answer["weight"] * (1 + 1e-9))
    challenge.check_generic("zero", torch.full((1,), 1e-15, dtype=torch.float64))
    for name, spoiled in (
        ("weight", challenge.answer["weight"] * (1 + 1e-6)),
        ("zero", torch.full((1,), 1e-10, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match=f"mixes observations: .* parameter '{name}'"):
            challenge.check_generic(name, spoiled)


# Outputs without the rest of the batch


def test_an_output_that_stays_the_same_without_the_rest_of_the_batch_passes():
    output = torch.randn(4, 3, dtype=torch.float64)
    masked = output.clone()
    masked[:, 0] = -torch.inf
    check_alone(output, output)
    check_alone(masked, masked)
    check_alone(output * (1 + 1e-12), output)
    check_alone(output[:1, 0].squeeze(), output[:1, 0])  # as models that squeeze return it


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f * (1 + 1e-6),
        lambda f: f.flip(0),
        lambda f: f[:1],
        lambda f: f.masked_fill(f == f.max(), -torch.inf),
    ],
)
def test_another_output_without_the_rest_of_the_batch_is_refused(spoil):
    output = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="mixes observations: the output of the first ones"):
        check_alone(spoil(output), output)


# Decisions


@pytest.fixture
def posed(monkeypatch):
    """Record the sizes of the batches about which a question is asked."""
    sizes, pose = [], Challenge.pose

    def recording(output, *rest):
        sizes.append(len(output))
        return pose(output, *rest)

    monkeypatch.setattr(Challenge, "pose", recording)
    return sizes


@pytest.mark.parametrize("name", ["mlp_categorical", "attention", "lstm", "sequence_of_labels"])
def test_a_decision_is_kept_over_ragged_batches(name, posed):
    estimate(SCENARIOS[name](), 3, kind="empirical")
    assert posed == [3]


def test_a_single_observation_settles_nothing(posed):
    case = SCENARIOS["mlp_categorical"]()
    fisher_information(case.model, cut(case.x, case.y, 1, 1, 3, 1, 2))
    assert posed == [1, 1, 3]


class Branching(nn.Module):
    """Observations with a large first input go through the first layer once more."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        h, again = self.first(x), x[:, :1] > 5
        if again.any():
            h = torch.where(again, self.first(torch.tanh(h)), h)
        return self.second(h)


def test_another_way_through_the_model_is_asked_about_once(posed):
    case = SCENARIOS["mlp_categorical"]()
    x = case.x.clone()
    x[[4, 6], 0] = 6.0
    fisher_information(Branching(), cut(x, case.y, 3, 2, 1, 2))
    assert posed == [3, 2]
