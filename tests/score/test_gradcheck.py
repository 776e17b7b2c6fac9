"""A rule that is wrong, or a use that nobody saw, is found out on the user's own model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ewc_lib import fisher_information
from ewc_lib._checking import settle
from ewc_lib.score import operations, record
from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.gradcheck import GradientCheck, Placements, apart
from ewc_lib.score.gradients import ParameterGradients, UseInBatch
from ewc_lib.score.graph import Graph
from ewc_lib.score.record import ParameterUse, Recorder
from ewc_lib.score.rules import Broadcast, Convolution, OuterProduct, Rows, Scale
from tests.scenarios import (
    CLASSES,
    SCENARIOS,
    HiddenLinear,
    N,
    Scenario,
    cut,
    definition,
    estimate,
    oracle,
    relative_error,
    same,
    trace_of,
)

# Rules broken on purpose


def shifted_observations(monkeypatch):
    """The gradients of one observation are given to the next."""
    sides = OuterProduct.sides
    monkeypatch.setattr(OuterProduct, "sides", lambda self, a, g: sides(self, a.roll(1, 0), g))
    return "weight"


def shifted_images(monkeypatch):
    sides = Convolution.sides
    monkeypatch.setattr(Convolution, "sides", lambda self, a, g: sides(self, a.roll(1, 0), g))
    return ("0.weight", "3.weight")


def wrong_scale(monkeypatch):
    sums = Broadcast._sums
    monkeypatch.setattr(Broadcast, "_sums", lambda self, terms: 1.01 * sums(self, terms))
    return "bias"


def say(monkeypatch, axes):
    """Let the check find these axes in a use, whatever arrives there."""

    def placements(self, uses, plain, weighted):
        n = len(self.weights)
        found = {i: axes(uses[i].input, g, n) for i, g in plain.items()}
        return Placements(found, dict.fromkeys(plain, 1.0), set())

    monkeypatch.setattr(GradientCheck, "placements", placements)


def wrong_axis(monkeypatch):
    """Observations are always said to come first."""

    def axes(input, plain, n):
        fits = all(BatchAxis().fits(t.shape, n) for t in (input, plain))
        return [BatchAxis()] if fits else []

    say(monkeypatch, axes)
    return ("layer", "scale")


def wrong_order(monkeypatch):
    """Positions are said to change slowest along a flattened axis."""
    say(monkeypatch, lambda *rest: [BatchAxis(inner=True)])
    return ""


def wrong_padding(monkeypatch):
    """All zeros are said to come before the image."""
    padding = operations._padding

    def shifted(*args):
        return tuple((before + after, 0) for before, after in padding(*args))

    monkeypatch.setattr(operations, "_padding", shifted)
    return "0.weight"


def shifted_rows(monkeypatch):
    of_each = Rows._of_each
    monkeypatch.setattr(Rows, "_of_each", lambda self, a, g: of_each(self, a, g.roll(1, 0)))
    return "table"


def forgotten_use(monkeypatch):
    """Only the first use of a parameter is seen, and the others are not missed."""
    record = Recorder._record

    def forgetting(self, *args):
        before = {key: len(steps) for key, steps in self._steps.items()}
        record(self, *args)
        for key, count in before.items():
            if count:
                del self._steps[key][count:]

    monkeypatch.setattr(Recorder, "_record", forgetting)
    return "layer"


def unseen_use(monkeypatch):
    """An operation without a rule is not noticed."""
    recorded, match = Recorder._record, operations.match

    def blind(self, func, *args):
        if func is not torch.einsum:
            recorded(self, func, *args)

    monkeypatch.setattr(record, "match", lambda f, *args: match(f, *args))
    monkeypatch.setattr(Recorder, "_record", blind)
    return "weight"


def wrong_sign_of_one_observation(monkeypatch):
    cut = UseInBatch.cut

    def spoiled(self, gradient):
        g = cut(self, gradient).clone()
        g[-1] *= -1
        return g

    monkeypatch.setattr(UseInBatch, "cut", spoiled)
    return ""


def failing_rule(monkeypatch):
    """A rule that cannot even be applied."""

    def fail(self, terms):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Broadcast, "_sums", fail)
    return "bias"


BREAKAGES = [
    ("mlp_categorical", shifted_observations),
    ("positions_in_a_plane", shifted_observations),
    ("cnn_with_norms", shifted_images),
    ("mlp_categorical", wrong_scale),
    ("sequence_first", wrong_axis),
    ("flattened_positions", wrong_order),
    ("cnn_with_norms", wrong_padding),
    ("embedding", shifted_rows),
    ("module_called_twice", forgotten_use),
    ("linear_and_einsum", unseen_use),
    ("mlp_categorical", wrong_sign_of_one_observation),
    ("mlp_categorical", failing_rule),
]
NEED_OTHERS = {shifted_observations, shifted_images, shifted_rows, wrong_axis, wrong_order}
"""Where there is no other observation, these are no mistakes."""


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize(("name", "break_rule"), BREAKAGES)
def test_a_broken_rule_is_replaced_by_the_generic_path(name, break_rule, structure, monkeypatch):
    case = SCENARIOS[name]()
    broken = break_rule(monkeypatch)
    broken = (broken,) if isinstance(broken, str) else broken
    for size in (1, 7, N):
        if size == 1 and break_rule in NEED_OTHERS:
            continue
        found = estimate(case, size, structure=structure)
        diagonal = torch.cat([d.reshape(-1) for d in found.diagonal().values()])
        assert relative_error(diagonal, oracle(name, "exact").diagonal()) < 1e-10
        assert {n for n, path in found.paths.items() if path == "generic"} == {
            n for n in found.paths if any(part in n for part in broken)
        }


def test_a_rule_that_fails_on_a_few_observations_is_not_used_on_the_rest(posed, monkeypatch):
    small = SCENARIOS["mlp_categorical"]()
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    case = Scenario(small.model, x, "categorical", torch.arange(30) % CLASSES)
    expected = definition(case, "exact")
    shifted_observations(monkeypatch)
    found = estimate(case, 30, structure="dense")
    assert posed == [7]  # a quarter of the batch
    assert relative_error(found.to_dense(), expected) < 1e-10
    assert found.paths["0.weight"] == found.paths["2.weight"] == "generic"
    assert found.paths["0.bias"] == found.paths["2.bias"] == "rule"


def pass_all(check, found):
    check.sizes.update(dict.fromkeys(check.answer, 1.0))
    return set()


@pytest.mark.parametrize(("name", "break_rule"), BREAKAGES[:-2])
def test_the_broken_rules_would_be_wrong_without_a_certificate(name, break_rule, monkeypatch):
    case, expected = SCENARIOS[name](), oracle(name, "exact")
    break_rule(monkeypatch)
    monkeypatch.setattr(GradientCheck, "failures", pass_all)
    found = estimate(case, structure="dense").to_dense()
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


def along(parameter, rule, a, g, source=None):
    """What arrived at one use, as if the watcher had seen it."""
    source = parameter if source is None else source
    use = ParameterUse(source, rule, a, None, g.shape, "")
    dtype = torch.promote_types(g.dtype, torch.float32)
    use_in_batch = UseInBatch.of(use, BatchAxis(), len(g), dtype)
    return ParameterGradients(
        parameter, [use_in_batch], [use_in_batch.cut(g[None])], source is parameter
    )


def honest(check, parameters, x):
    g = check.direction
    weight, bias = parameters["weight"], parameters["bias"]
    return {
        "weight": along(weight, OuterProduct(weight.shape), x, g),
        "bias": along(bias, Broadcast(bias.shape), x.new_zeros(()).expand(g.shape), g),
    }


def failed(check, found):
    return set(check.failures(found))


@pytest.mark.claim("eq-certificate")
def test_the_answer_is_the_weighted_gradient():
    x = inputs()
    parameters, output = network_and_output(x)
    check = GradientCheck.pose(output, parameters)
    weighted = check.weights.unsqueeze(1) * check.direction
    assert torch.equal(check.weighted, weighted)
    assert torch.allclose(check.answer["weight"], weighted.mT @ x, atol=1e-12)
    assert torch.allclose(check.answer["bias"], weighted.sum(0), atol=1e-12)
    assert failed(check, honest(check, parameters, x)) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.claim("prop-certificate")
def test_honest_rules_pass_and_small_lies_fail_in_every_precision(dtype):
    x = inputs(n=50, dtype=dtype)
    parameters, output = network_and_output(x)
    check = GradientCheck.pose(output, parameters)
    assert failed(check, honest(check, parameters, x)) == set()
    lie = 2 * torch.finfo(dtype).eps ** 0.5
    for name in ("weight", "bias"):
        found = honest(check, parameters, x)
        found[name].output_gradients[0] = (1 + lie) * found[name].output_gradients[0].double()
        found[name].output_gradients[0] = (
            found[name].output_gradients[0].to(found[name].uses[0].dtype)
        )
        assert failed(check, found) == {name}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_use_is_seen_from_ten_times_the_tolerance_on(dtype):
    tolerance = torch.finfo(dtype).eps ** 0.5
    for seed in range(20):
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        parameters, _ = network_and_output(x)
        for share, seen in ((10 * tolerance, True), (0.1 * tolerance, False)):
            hidden = share * HiddenLinear.apply(x, parameters["weight"])
            output = F.linear(x, parameters["weight"], parameters["bias"]) + hidden
            check = GradientCheck.pose(output, parameters)
            assert failed(check, honest(check, parameters, x)) == ({"weight"} if seen else set())


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_large_and_small_gradients_are_compared_in_half_precision(scale):
    """Norms that float16 rounds to zero or to infinity would let everything pass."""
    x = (scale * inputs(n=500)).half()
    weight = torch.zeros(CLASSES, 4, dtype=torch.float16)
    expected = torch.full_like(weight, 600 * scale)
    check = GradientCheck(x[:, :CLASSES], x[:, 0], {"weight": expected})
    lie = along(weight, OuterProduct(weight.shape), torch.zeros_like(x), x[:, :CLASSES])
    assert failed(check, {"weight": lie}) == {"weight"}


def test_a_coarse_operation_somewhere_in_the_model_widens_the_tolerance():
    x = inputs(n=50)
    parameters, output = network_and_output(x)
    for eps, passes in ((0.0, False), (torch.finfo(torch.bfloat16).eps, True)):
        check = GradientCheck.pose(output, parameters, Graph(1, False, eps, None))
        found = honest(check, parameters, x)
        found["weight"].output_gradients[0] = 1.01 * found["weight"].output_gradients[0]
        assert failed(check, found) == (set() if passes else {"weight"})


def test_a_parameter_without_a_rule_fails():
    x = inputs()
    parameters, output = network_and_output(x)
    check = GradientCheck.pose(output, parameters)
    found = honest(check, parameters, x)
    del found["bias"]
    assert failed(check, found) == {"bias"}


def test_a_rule_that_cannot_be_applied_fails():
    x = inputs()
    parameters, output = network_and_output(x)
    check = GradientCheck.pose(output, parameters)
    found = honest(check, parameters, x)
    weight = parameters["weight"]
    found["weight"] = along(weight, OuterProduct(weight.shape), x[:, :3], check.direction)
    assert failed(check, found) == {"weight"}


def test_a_parameter_that_the_output_does_not_depend_on_has_no_answer():
    x = inputs()
    parameters, output = network_and_output(x)
    idle = parameters | {"idle": nn.Parameter(torch.ones(2))}
    check = GradientCheck.pose(output, idle)
    assert set(check.answer) == {"weight", "bias"}
    assert failed(check, honest(check, parameters, x)) == set()
    check.check_vmap("idle", idle["idle"], torch.zeros(2))
    with pytest.raises(ValueError, match="parameter 'idle'"):
        check.check_vmap("idle", idle["idle"], torch.ones(2))
    assert GradientCheck.pose(output.detach(), parameters).answer == {}


def test_questions_repeat_and_leave_the_graph_and_the_random_state():
    x = inputs()
    parameters, output = network_and_output(x)
    state = torch.get_rng_state()
    first, second = (GradientCheck.pose(output, parameters) for _ in range(2))
    assert torch.equal(first.direction, second.direction)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parameters.values())


def test_every_observation_has_a_weight_and_a_direction_of_its_own():
    check = GradientCheck.pose(*reversed(network_and_output(inputs(n=50))))
    assert check.weights.shape == (50,)
    assert check.direction.shape == (50, CLASSES)
    assert len(check.weights.unique()) == 50
    assert len(check.direction.unique()) == 50 * CLASSES


def test_a_gradient_of_zero_answers_nothing_unless_it_cannot_be_another():
    x = inputs()
    parameters, output = network_and_output(x)
    idle = parameters | {"idle": nn.Parameter(torch.ones(2))}
    check = GradientCheck.pose(output, idle)
    check.failures(honest(check, parameters, x))
    assert all(map(check.has_answer, idle))
    parameters, output = network_and_output(torch.zeros_like(x))
    check = GradientCheck.pose(output, parameters)
    check.failures(honest(check, parameters, torch.zeros_like(x)))
    assert [name for name in parameters if not check.has_answer(name)] == ["weight"]


def test_the_generic_answer_may_be_off_by_the_rounding_of_larger_gradients_only():
    x = inputs()
    parameters, output = network_and_output(x)
    parameters["zero"] = nn.Parameter(torch.ones(1))
    check = GradientCheck.pose(output, parameters)
    check.failures(honest(check, parameters, x))
    check.check_vmap("weight", parameters["weight"], check.answer["weight"] * (1 + 1e-9))
    check.check_vmap("zero", parameters["zero"], torch.full((1,), 1e-15, dtype=torch.float64))
    for name, spoiled in (
        ("weight", check.answer["weight"] * (1 + 1e-6)),
        ("zero", torch.full((1,), 1e-10, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match=f"mixes observations: .* parameter '{name}'"):
            check.check_vmap(name, parameters[name], spoiled)


# Terms that cancel


def cancelling(size):
    """Gradients that sum to next to nothing over the positions of each observation."""
    g = size * torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2)).double()
    return torch.cat([g, -g], 1)


@pytest.mark.parametrize("kind", [Broadcast, Scale])
def test_what_cancels_may_be_off_by_the_rounding_of_its_terms_only(kind):
    bias, g = nn.Parameter(torch.zeros(3, dtype=torch.float64)), cancelling(1.0)
    weights = torch.ones(5, dtype=torch.float64)
    found = along(bias, kind(bias.shape), torch.ones_like(g), g)
    for off, passes in ((1e-15, True), (1e-10, False)):
        answer = {"bias": torch.full((3,), off, dtype=torch.float64)}
        failures = failed(GradientCheck(g, weights, answer), {"bias": found})
        assert failures == (set() if passes else {"bias"})


def test_signs_are_not_taken_from_what_was_computed_from_a_parameter():
    """There the terms may cancel on the way back, so their size tells nothing."""
    bias, g = nn.Parameter(torch.zeros(3, dtype=torch.float64)), cancelling(1.0)
    source = 1 * bias
    found = along(bias, Broadcast(bias.shape), torch.ones_like(g), g, source)
    answer = {"bias": torch.full((3,), 1e-15, dtype=torch.float64)}
    check = GradientCheck(g, torch.ones(5, dtype=torch.float64), answer)
    assert failed(check, {"bias": found}) == {"bias"}


# Where the observations lie


LAYOUTS = {
    "first": (BatchAxis(), (5, 3)),
    "flattened, slowest": (BatchAxis(), (10, 3)),
    "flattened, fastest": (BatchAxis(inner=True), (10, 3)),
    "second": (BatchAxis(1), (3, 5)),
    "third": (BatchAxis(2), (2, 3, 5)),
    "second of equal axes": (BatchAxis(1), (5, 5)),
    "last of equal axes": (BatchAxis(2), (5, 5, 5)),
}


def question(n=5):
    weights = torch.randn(n, generator=torch.Generator().manual_seed(3)).double()
    return GradientCheck(torch.zeros(n, 1), weights, {})


def places(input, plain, weighted):
    """Where the observations lie in one use, as a question of five shows it."""
    edge = get_gradient_edge(nn.Parameter(torch.ones(1)))
    use = ParameterUse(torch.zeros(1), Scale(torch.Size([1])), input, edge, plain.shape, "")
    return question().placements([use], {0: plain}, {0: weighted}).found[0]


def arriving(axis, shape, n=5):
    """Random gradients, and the same where each observation has its weight."""
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(4)).double()
    numbers = torch.arange(plain.numel()).reshape(shape)
    parts = axis.split(numbers, n).reshape(n, -1)
    weighted = plain.clone().reshape(-1)
    for part, weight in zip(parts, question(n).weights, strict=True):
        weighted[part] *= weight
    return plain, weighted.reshape(shape)


@pytest.mark.parametrize(("axis", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_axis_of_the_observations_is_found(axis, shape):
    plain, weighted = arriving(axis, shape)
    assert places(plain, plain, weighted) == [axis]


@pytest.mark.parametrize(("axis", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_observations_that_leak_into_each_other_lie_nowhere(axis, shape):
    plain, weighted = arriving(axis, shape)
    assert places(plain, plain, weighted + 1e-6 * weighted.flip(axis.axis)) == []
    assert places(plain, plain, plain) == []
    assert places(plain, plain, 2 * weighted) == []


def test_a_sum_over_observations_lies_nowhere():
    plain, weighted = arriving(BatchAxis(), (5, 3))
    assert places(plain, plain.sum(0), weighted.sum(0)) == []
    assert places(plain, plain.sum(), weighted.sum()) == []


def test_the_input_must_be_cut_the_same_way():
    plain, weighted = arriving(BatchAxis(1), (3, 5))
    assert places(torch.zeros(3, 5, 2), plain, weighted) == [BatchAxis(1)]
    assert places(torch.zeros(5, 3), plain, weighted) == []
    assert places(torch.zeros(3), plain, weighted) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_axes_are_found_in_every_precision(dtype):
    plain, weighted = (t.to(dtype) for t in arriving(BatchAxis(1), (40, 5)))
    assert places(plain, plain, weighted) == [BatchAxis(1)]
    lie = weighted.clone()
    lie[:, 0] *= 1 + 10 * torch.finfo(dtype).eps ** 0.5
    assert places(plain, plain, lie) == []


# Models that mix observations


class Mixing(nn.Module):
    """Two layers, and between them something that observations have in common."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.mix = mix
        self.double()

    def forward(self, x):
        return self.second(self.mix(torch.tanh(self.first(x))))


def batch_norm(h):
    return F.batch_norm(h.unsqueeze(2).expand(-1, -1, 2), None, None, training=True).mean(2)


MIXTURES = {
    "batch mean": lambda h: h - h.mean(0),
    "batch statistics": batch_norm,
    "softmax over the batch": lambda h: h.softmax(0),
    "contrastive term": lambda h: h + 0.1 * (h @ h.mT).logsumexp(1, keepdim=True),
    "attention over the batch": lambda h: (h @ h.mT).softmax(1) @ h,
    "rank in the batch": lambda h: h * h.detach().argsort(0),
    "neighbours": lambda h: h + h.roll(1, 0),
    "largest of the batch": lambda h: h / h.abs().amax(0),
}


@pytest.mark.parametrize("n", [3, N, 20])
@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_a_model_that_mixes_observations_is_refused_by_name(mix, n):
    torch.manual_seed(0)
    model = Mixing(mix)
    x, y = torch.randn(n, 4).double(), torch.arange(n) % CLASSES
    before = trace_of(model)
    with pytest.raises(ValueError, match="the model mixes observations"):
        fisher_information(model, (x, y))
    assert same(trace_of(model), before)


def test_gradients_that_mix_are_refused_though_outputs_do_not():
    """A hook may do to gradients what no output shows."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)
            self.double()

        def forward(self, x):
            h = self.first(x)
            if h.requires_grad:
                h.register_hook(lambda g: g - g.mean(0))
            return self.second(torch.tanh(h))

    case = SCENARIOS["mlp_categorical"]()
    message = "mixes observations: the gradient of parameter 'first.(weight|bias)' is not a sum"
    with pytest.raises(ValueError, match=message):
        estimate(case._replace(model=Hooked()))


def test_a_term_of_each_observation_with_itself_is_no_mixture():
    torch.manual_seed(0)
    model = Mixing(lambda h: h / h.norm(dim=1, keepdim=True) + h.cumsum(1).softmax(1))
    case = SCENARIOS["mlp_categorical"]()._replace(model=model)
    found = estimate(case, structure="dense").to_dense()
    assert relative_error(found, definition(case, "exact")) < 1e-10


# Outputs without the rest of the batch


def refuse_apart(*outputs):
    settle([apart(*outputs)])


def test_an_output_that_stays_the_same_without_the_rest_of_the_batch_passes():
    output = torch.randn(4, 3, dtype=torch.float64)
    masked = output.clone()
    masked[:, 0] = -torch.inf
    refuse_apart(output, output)
    refuse_apart(masked, masked)
    refuse_apart(output * (1 + 1e-12), output)
    refuse_apart(output[:1, 0].squeeze(), output[:1, 0])  # as models that squeeze return it


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
    with pytest.raises(ValueError, match=r"mixes observations: the output of .* is another"):
        refuse_apart(spoil(output), output)


def test_outputs_alone_are_compared_in_the_precision_of_the_model():
    output = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    refuse_apart(1.01 * output, output, torch.finfo(torch.bfloat16).eps)
    with pytest.raises(ValueError, match="mixes observations"):
        refuse_apart(1.01 * output, output)


# Decisions


@pytest.fixture
def posed(monkeypatch):
    """Record the sizes of the batches about which a question is asked."""
    sizes, pose = [], GradientCheck.pose

    def recording(output, *rest):
        sizes.append(len(output))
        return pose(output, *rest)

    monkeypatch.setattr(GradientCheck, "pose", recording)
    return sizes


@pytest.mark.parametrize("name", ["mlp_categorical", "attention", "lstm", "sequence_of_labels"])
def test_a_plan_is_kept_over_ragged_batches(name, posed):
    estimate(SCENARIOS[name](), 3, kind="empirical")
    assert posed == [3, 2]  # the last one is checked in any case


def test_a_single_observation_settles_nothing(posed):
    case = SCENARIOS["mlp_categorical"]()
    fisher_information(case.model, cut(case.x, case.y, 1, 1, 3, 1, 2))
    assert posed == [1, 1, 3, 2]


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


def test_every_batch_is_checked_where_values_decide_the_way_through_the_model(posed):
    case = SCENARIOS["mlp_categorical"]()
    x = case.x.clone()
    x[[4, 6], 0] = 6.0
    fisher_information(Branching(), cut(x, case.y, 3, 2, 1, 2))
    assert posed == [3, 2, 1, 2]


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("bad", [slice(None), slice(0, 1)], ids=["all", "the first"])
def test_a_gradient_that_is_no_number_is_not_taken_for_zero(bad, n):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    x = torch.randn(n, 3).double()
    x[bad, 0] = 7
    model[0].register_forward_hook(lambda m, i, out: (out * (i[0][:, :1] != 7)).abs().sqrt())
    with pytest.raises(ValueError, match=r"is NaN|not finite"):
        fisher_information(model, (x, torch.zeros(n, dtype=torch.long)))
