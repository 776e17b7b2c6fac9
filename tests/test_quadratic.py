"""The proximal step of a quadratic penalty."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from ewc_lib import EWC
from ewc_lib.fisher import Dense, Diagonal
from ewc_lib.quadratic import QuadraticPenalty
from tests.scenarios import PROPERTY, same

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
OPTIMIZERS = {
    "SGD": lambda params, lr=0.1: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr=0.1: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr=0.1: torch.optim.Adam(params, lr=lr),
    "AdamW": lambda params, lr=0.1: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Points(nn.Module):
    """Two vectors of parameters."""

    def __init__(self, a, b, dtype=DOUBLE):
        super().__init__()
        self.a = nn.Parameter(torch.as_tensor(a, dtype=dtype))
        self.b = nn.Parameter(torch.as_tensor(b, dtype=dtype))


def random(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector(values):
    return torch.cat([values[name].detach().reshape(-1) for name in ("a", "b")])


def parameters(model):
    return vector(dict(model.named_parameters()))


def diagonal(model, values):
    a, b = values.split([len(model.a), len(model.b)])
    return Diagonal(1, "exact", {"a": "rule", "b": "rule"}, {"a": a, "b": b})


def dense(model, matrix):
    shapes = {"a": model.a.shape, "b": model.b.shape}
    return Dense(1, "exact", dict.fromkeys(shapes, "rule"), matrix, shapes)


def held(precision_of, strength, dtype=DOUBLE):
    """A model away from where a penalty holds it, and that place."""
    model = Points(random(3, seed=1), random(2, seed=2), dtype)
    anchor = parameters(model).clone()
    penalty = QuadraticPenalty(model, strength)
    penalty._replace(precision_of(model))
    with torch.no_grad():
        model.a += random(3, seed=3).to(dtype)
        model.b += random(2, seed=4).to(dtype)
    return model, penalty, anchor


def spread(dtype=DOUBLE):
    return torch.tensor([0.0, 1e-3, 1.0, 5.0, 1e10], dtype=dtype)


def singular():
    root = random(5, 3, seed=5)
    return root @ root.mT


def rates(optimizer, model, metric="optimizer"):
    """The rates of all entries as one vector, from the state of the optimizer."""
    if metric == "euclidean" or isinstance(optimizer, torch.optim.SGD):
        (group,) = optimizer.param_groups
        momentum = 0 if metric == "euclidean" else group["momentum"]
        return torch.full((5,), group["lr"] / (1 - momentum), dtype=DOUBLE)
    states = [optimizer.state[p] for p in model.parameters()]
    (group,), t = optimizer.param_groups, int(states[0]["step"])
    means = torch.cat([state["exp_avg_sq"] for state in states]) / (1 - group["betas"][1] ** t)
    return group["lr"] / (means.sqrt() + group["eps"])


def set_gradients(model, seed=6):
    model.a.grad, model.b.grad = random(3, seed=seed), random(2, seed=seed + 1)


# What it does


@each_optimizer
@pytest.mark.parametrize("strength", [0.5, 100.0])
@pytest.mark.parametrize("metric", ["optimizer", "euclidean"])
def test_it_moves_to_the_weighted_mean_of_where_the_optimizer_went_and_the_anchor(
    name, strength, metric
):
    model, penalty, anchor = held(lambda m: diagonal(m, spread()), strength)
    twin = Points(model.a.detach().clone(), model.b.detach().clone())
    ours, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    for step in range(4):
        set_gradients(model, step)
        set_gradients(twin, step)
        ours.step()
        plain.step()
        penalty.proximal_step_(ours, metric)
        there, weight = parameters(twin), strength * spread() * rates(ours, model, metric)
        torch.testing.assert_close(
            parameters(model), (there + weight * anchor) / (1 + weight), **TIGHT
        )
        with torch.no_grad():  # the plain optimizer goes on from the same place
            twin.a.copy_(model.a)
            twin.b.copy_(model.b)


def test_each_parameter_group_has_its_own_learning_rate():
    model, penalty, anchor = held(lambda m: diagonal(m, spread()), 3.0)
    groups = [{"params": [model.b], "lr": 0.5}, {"params": [model.a], "lr": 1e-3}]
    start = parameters(model).clone()
    penalty.proximal_step_(torch.optim.SGD(groups, lr=1.0))
    weight = torch.tensor([1e-3] * 3 + [0.5] * 2, dtype=DOUBLE) * 3.0 * spread()
    torch.testing.assert_close(parameters(model), (start + weight * anchor) / (1 + weight), **TIGHT)


def test_it_follows_a_schedule_of_learning_rates_and_one_that_is_a_tensor():
    model, penalty, anchor = held(lambda m: diagonal(m, spread()), 3.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25, dtype=DOUBLE))
    start = parameters(model).clone()
    penalty.proximal_step_(optimizer)
    first = (start + 0.75 * spread() * anchor) / (1 + 0.75 * spread())
    torch.testing.assert_close(parameters(model), first, **TIGHT)
    optimizer.param_groups[0]["lr"] = 0.5
    penalty.proximal_step_(optimizer)
    second = (first + 1.5 * spread() * anchor) / (1 + 1.5 * spread())
    torch.testing.assert_close(parameters(model), second, **TIGHT)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("metric", ["optimizer", "euclidean"])
def test_an_adaptive_optimizer_rescales_it_in_its_own_metric_only(name, metric):
    """After gradients of any size, a step without gradient moves by the penalty alone."""

    def pulled(size):
        model, penalty, anchor = held(lambda m: diagonal(m, spread()), 3.0)
        optimizer = OPTIMIZERS[name](model.parameters())
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        state = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        with torch.no_grad():
            for p, before in zip(model.parameters(), state, strict=True):
                p.copy_(before)
        before = parameters(model) - anchor
        penalty.proximal_step_(optimizer, metric)
        return before / (parameters(model) - anchor) - 1

    small, large = pulled(1e-3), pulled(1e3)
    rescaled = 1e6 if metric == "optimizer" else 1.0
    torch.testing.assert_close(small, rescaled * large, rtol=1e-4, atol=1e-6)


def expected_at_rest(hessian, target, matrix, strength, anchor):
    return torch.linalg.solve(
        hessian + strength * matrix, hessian @ target + strength * matrix @ anchor
    )


@pytest.mark.parametrize(
    ("method", "options", "structure"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}, "diagonal"),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, "dense"),
        ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}, "diagonal"),
        ("Adam", {"lr": 1e-2, "betas": (0.9, 0.9)}, "diagonal"),
        ("Adam", {"lr": 1e-2, "amsgrad": True}, "diagonal"),
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.0}, "diagonal"),
        ("SparseAdam", {"lr": 1e-2}, "diagonal"),
        ("NAdam", {"lr": 1e-2}, "diagonal"),
        ("RAdam", {"lr": 1e-2, "betas": (0.9, 0.9)}, "diagonal"),
        ("Adamax", {"lr": 1e-2, "betas": (0.9, 0.9)}, "diagonal"),
        ("RMSprop", {"lr": 1e-2, "alpha": 0.9}, "diagonal"),
        ("RMSprop", {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9}, "diagonal"),
        ("Adagrad", {"lr": 0.5}, "diagonal"),
    ],
)
def test_in_its_own_metric_it_rests_where_loss_and_penalty_are_smallest(method, options, structure):
    hessian = torch.diag(torch.linspace(0.5, 2.0, 5, dtype=DOUBLE)) + 0.1
    target, strength = 3 * random(5, seed=8), 10.0
    root = random(5, 5, seed=5)
    matrix = (
        root @ root.mT if structure == "dense" else torch.diag(torch.linspace(0.1, 1, 5).double())
    )

    def precision(model):
        return dense(model, matrix) if structure == "dense" else diagonal(model, matrix.diagonal())

    def rest(metric):
        model, penalty, anchor = held(precision, strength)
        optimizer = getattr(torch.optim, method)(list(model.parameters()), **options)
        for _ in range(800):
            gradient = hessian @ (parameters(model) - target)
            sparse = method == "SparseAdam"
            parts = (g.to_sparse() if sparse else g.clone() for g in gradient.split([3, 2]))
            model.a.grad, model.b.grad = parts
            optimizer.step()
            penalty.proximal_step_(optimizer, metric)
        return parameters(model), anchor

    found, anchor = rest("optimizer")
    expected = expected_at_rest(hessian, target, matrix, strength, anchor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (rest("euclidean")[0] - expected).norm() > 0.1


def test_it_is_the_gradient_step_of_sgd_to_first_order():
    def distance(lr, proximal):
        model, penalty, _ = held(lambda m: diagonal(m, spread()[:4].repeat(2)[:5]), 2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        set_gradients(model)
        if not proximal:
            penalty.add_gradient_()
        optimizer.step()
        if proximal:
            penalty.proximal_step_(optimizer)
        return parameters(model)

    errors = [(distance(lr, True) - distance(lr, False)).norm() for lr in (1e-3, 1e-4, 1e-5)]
    assert 90 < errors[0] / errors[1] < 110
    assert 90 < errors[1] / errors[2] < 110


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_with_sgd_it_converges_to_the_minimiser_where_the_gradient_step_diverges(structure):
    hessian = torch.diag(torch.linspace(0.5, 2.0, 5, dtype=DOUBLE)) + 0.1
    target, lr, strength = random(5, seed=8), 0.2, 1e4
    matrix = torch.diag(spread()[:4].repeat(2)[:5]) if structure == "diagonal" else singular()

    def run(proximal, steps):
        make = diagonal if structure == "diagonal" else dense
        values = matrix.diagonal() if structure == "diagonal" else matrix
        model, penalty, anchor = held(lambda m: make(m, values), strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(steps):
            gradient = hessian @ (parameters(model) - target)
            model.a.grad, model.b.grad = (g.clone() for g in gradient.split([3, 2]))
            if not proximal:
                penalty.add_gradient_()
            optimizer.step()
            if proximal:
                penalty.proximal_step_(optimizer)
        return parameters(model), anchor

    found, anchor = run(True, 500)
    minimiser = torch.linalg.solve(
        hessian + strength * matrix, hessian @ target + strength * matrix @ anchor
    )
    torch.testing.assert_close(found, minimiser, rtol=1e-9, atol=1e-9)
    assert run(False, 20)[0].norm() > 1e10


# Whatever the strength


@each_optimizer
@pytest.mark.parametrize("exponent", range(-3, 16))
def test_it_is_finite_and_never_overshoots_for_any_strength(name, exponent):
    single = torch.float32
    model, penalty, anchor = held(lambda m: diagonal(m, spread(single)), 10.0**exponent, single)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1.0)
    for step in range(5):
        model.a.grad, model.b.grad = random(3, seed=step).float(), random(2, seed=9).float()
        optimizer.step()
        before = (parameters(model) - anchor).abs()
        penalty.proximal_step_(optimizer)
        after = (parameters(model) - anchor).abs()
        assert parameters(model).isfinite().all()
        assert (after <= before * (1 + 1e-6)).all()
        assert after[0] == before[0]  # no precision, no pull
        if exponent >= 0:
            torch.testing.assert_close(after[4].item(), 0.0, rtol=0, atol=1e-6)


@each_optimizer
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize(("strength", "lr"), [(1e39, 1.0), (3e38, 100.0), (1e308, 100.0)])
def test_a_strength_beyond_the_range_of_a_dtype_holds_what_has_information_and_nothing_else(
    name, dtype, strength, lr
):
    model, penalty, anchor = held(lambda m: diagonal(m, spread(dtype)), strength, dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=lr)
    model.a.grad, model.b.grad = random(3, dtype=dtype), random(2, seed=1, dtype=dtype)
    optimizer.step()
    before = parameters(model).clone()
    penalty.proximal_step_(optimizer)
    assert parameters(model)[0] == before[0]
    assert torch.equal(parameters(model)[1:], anchor[1:])
    assert penalty.penalty() == 0


@pytest.mark.parametrize("of", [diagonal, lambda m, a: dense(m, torch.diag(a))])
@pytest.mark.parametrize("missing", [False, True])
def test_the_gradient_of_a_strength_beyond_the_range_is_zero_where_nothing_pulls(of, missing):
    single = torch.float32
    model, penalty, _ = held(lambda m: of(m, spread(single)), 1e39, single)
    if not missing:
        model.a.grad, model.b.grad = torch.zeros(3), torch.zeros(2)
    penalty.add_gradient_()
    assert model.a.grad[0] == 0
    assert (model.a.grad[1:].abs() > 1e30).all()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("exponent", [*range(-3, 16, 3), 15])
def test_a_singular_dense_precision_is_stable_for_any_strength(exponent, dtype):
    matrix = singular().to(dtype)
    model, penalty, anchor = held(lambda m: dense(m, matrix), 10.0**exponent, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values, basis = torch.linalg.eigh(singular())
    blind = basis[:, values < 1e-9].to(dtype)
    before = parameters(model) - anchor
    for _ in range(5):
        penalty.proximal_step_(optimizer)
    after = parameters(model) - anchor
    assert after.isfinite().all()
    assert after.norm() <= before.norm() * (1 + 1e-5)
    tolerance = 1e-9 if dtype == DOUBLE else 1e-4
    torch.testing.assert_close(blind.mT @ after, blind.mT @ before, rtol=0, atol=tolerance)
    if exponent >= 12:
        torch.testing.assert_close(after, blind @ (blind.mT @ before), rtol=0, atol=tolerance)


@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=5, max_size=5),
    strength=st.floats(0, 1e15),
    lr=st.floats(0, 10),
)
@PROPERTY
def test_a_parameter_ends_between_where_it_was_and_the_anchor(values, strength, lr):
    single = torch.float32
    precision = torch.tensor(values, dtype=single)
    model, penalty, anchor = held(lambda m: diagonal(m, precision), strength, single)
    before = parameters(model).clone()
    penalty.proximal_step_(torch.optim.SGD(model.parameters(), lr=lr))
    low, high = torch.minimum(before, anchor), torch.maximum(before, anchor)
    slack = 1e-6 * (before.abs() + anchor.abs())
    assert ((low - slack <= parameters(model)) & (parameters(model) <= high + slack)).all()


# Other structures


def test_a_dense_precision_has_the_closed_form():
    matrix, eta, strength = singular(), 0.1, 7.0
    model, penalty, anchor = held(lambda m: dense(m, matrix), strength)
    start = parameters(model).clone()
    penalty.proximal_step_(torch.optim.SGD(model.parameters(), lr=eta))
    pull = eta * strength * matrix
    expected = torch.linalg.solve(torch.eye(5, dtype=DOUBLE) + pull, start + pull @ anchor)
    torch.testing.assert_close(parameters(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", ["block", "module", "dense", "lowrank", "kronecker"])
def test_every_structure_has_the_closed_form(structure):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    ewc = EWC(model, 5.0, structure=structure)
    ewc.consolidate((random(12, 3), torch.arange(12) % 3))
    anchor = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p += random(*p.shape, seed=seed)
    start = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.3))
    found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    pull = 0.3 * 5.0 * ewc.precision.to_dense()
    expected = torch.linalg.solve(torch.eye(len(start), dtype=DOUBLE) + pull, start + pull @ anchor)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert (found - start).norm() > 1e-3


def minimised(matrix, strength, rates, start, anchor):
    """Where the penalty plus the distance from the start is smallest; a rate of 0 holds still."""
    moves = rates > 0
    distance = torch.diag(1 / rates[moves])
    left = distance + strength * matrix[moves][:, moves]
    moved = start - anchor
    right = distance @ moved[moves] - strength * matrix[moves][:, ~moves] @ moved[~moves]
    found = start.clone()
    found[moves] = anchor[moves] + torch.linalg.solve(left, right)
    return found


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def after_a_task(structure, strength=5.0):
    """A network away from where a penalty of a structure holds it, with that place."""
    model = network()
    ewc = EWC(model, strength, structure=structure)
    ewc.consolidate((random(12, 3), torch.arange(12) % 3))
    anchor = flat(model).clone()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p += random(*p.shape, seed=seed)
    return model, ewc, anchor


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def rates_of(model, rates):
    pairs = zip(model.parameters(), rates, strict=True)
    return torch.cat([torch.full((p.numel(),), rate, dtype=DOUBLE) for p, rate in pairs])


EVERY = ["diagonal", "block", "module", "dense", "lowrank", "kronecker", "eigenkronecker"]


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize(
    "rates", [(0.1, 0.2, 0.1, 0.2), (0.3, 0.3, 1e-3, 1e-3), (0.0, 0.1, 0.5, 0.0), (1.0, 0, 0, 0)]
)
def test_each_parameter_group_has_its_own_rate_in_every_structure(structure, rates):
    model, ewc, anchor = after_a_task(structure)
    start, matrix = flat(model), ewc.precision.to_dense()
    groups = [
        {"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=True)
    ]
    ewc.proximal_step_(torch.optim.SGD(groups, lr=1.0))
    expected = minimised(matrix, 5.0, rates_of(model, rates), start, anchor)
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("lacking", ["not held by the optimizer", "frozen"])
def test_what_an_optimizer_lacks_or_is_frozen_is_a_constant(structure, lacking):
    model, ewc, anchor = after_a_task(structure)
    start, matrix, rates = flat(model), ewc.precision.to_dense(), (0.0, 0.2, 0.2, 0.2)
    if lacking == "frozen":
        model[0].weight.requires_grad_(False)
    own = list(model.parameters())[lacking != "frozen" :]
    ewc.proximal_step_(torch.optim.SGD(own, lr=0.2))
    expected = minimised(matrix, 5.0, rates_of(model, rates), start, anchor)
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", ["diagonal", "block", "module"])
def test_steps_of_two_optimizers_are_the_step_of_one_where_nothing_couples_their_parameters(
    structure,
):
    def run(split):
        model, ewc, _ = after_a_task(structure)
        parts = [model[0], model[2]] if split else [model]
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.2) for part in parts]
        for _ in range(3):
            for optimizer in optimizers:
                ewc.proximal_step_(optimizer)
        return flat(model)

    torch.testing.assert_close(run(split=True), run(split=False), **TIGHT)


@pytest.mark.parametrize("make", [lambda m: diagonal(m, spread()), lambda m: dense(m, singular())])
def test_a_learning_rate_of_zero_moves_nothing(make):
    model, penalty, _ = held(make, 1e15)
    before = parameters(model).clone()
    penalty.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.equal(parameters(model), before)


# What it leaves alone


@pytest.mark.parametrize("make", [lambda m: diagonal(m, spread()), lambda m: dense(m, singular())])
def test_an_optimizer_that_holds_nothing_of_the_penalty_is_refused_and_nothing_moves(make):
    model, penalty, _ = held(make, 1.0)
    before, other = parameters(model).clone(), torch.optim.SGD([nn.Parameter(random(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"none of the parameters of the penalty, \['a', 'b'\]"):
        penalty.proximal_step_(other)
    model.requires_grad_(False)  # then there is nothing to move
    penalty.proximal_step_(other)
    penalty.add_gradient_()
    assert penalty.penalty() > 0
    assert torch.equal(parameters(model), before)
    assert model.a.grad is None


@each_optimizer
def test_before_the_first_task_and_at_strength_zero_nothing_changes(name):
    model = Points(random(3), random(2))
    penalty, optimizer = QuadraticPenalty(model, 1e15), OPTIMIZERS[name](model.parameters())
    before = parameters(model).clone()
    penalty.proximal_step_(optimizer)
    assert torch.equal(parameters(model), before)
    penalty._replace(diagonal(model, spread()))
    penalty.strength = 0.0
    with torch.no_grad():
        model.a += 1
    before = parameters(model).clone()
    penalty.proximal_step_(optimizer)
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("make", [lambda m: diagonal(m, spread()), lambda m: dense(m, singular())])
def test_gradients_anchor_and_optimizer_state_stay_as_they_are(make):
    model, penalty, anchor = held(make, 3.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    set_gradients(model)
    optimizer.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state.items()}
    identities = [id(p) for p in model.parameters()]
    penalty.proximal_step_(optimizer)
    assert same(gradients, [p.grad for p in model.parameters()])
    assert same(state, dict(optimizer.state))
    assert torch.equal(vector(penalty.anchor), anchor)
    assert identities == [id(p) for p in model.parameters()]
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_only_the_chosen_parameters_move():
    model = Points(random(3), random(2))
    penalty = QuadraticPenalty(model, 5.0, params="a")
    penalty._replace(Diagonal(1, "exact", {"a": "rule"}, {"a": spread()[:3]}))
    with torch.no_grad():
        model.a += 1
        model.b += 1
    a, b = model.a.detach().clone(), model.b.detach().clone()
    penalty.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.b, b)
    assert not torch.equal(model.a, a)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("strength", [0.5, 30.0, 1e15])
def test_parameters_in_half_precision_move_as_in_double_up_to_rounding(dtype, structure, strength):
    if structure == "diagonal":
        values, basis = spread(), torch.eye(5, dtype=DOUBLE)
        make = lambda m: diagonal(m, spread(torch.float32))  # noqa: E731
    else:
        values, basis = torch.linalg.eigh(singular())
        values = values.where(values > 1e-9, 0.0)
        make = lambda m: dense(m, singular().float())  # noqa: E731
    model, penalty, anchor = held(make, strength, dtype)
    start = parameters(model).double()
    penalty.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.1))
    shrunk = (basis.mT @ (start - anchor.double())) / (1 + 0.1 * strength * values)
    expected = anchor.double() + basis @ shrunk
    rounding = torch.finfo(dtype).eps * (start.abs().max() + anchor.abs().max()).item()
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(parameters(model).double(), expected, rtol=0, atol=2 * rounding)
    assert math.isfinite(penalty.penalty().item())


def test_a_matrix_is_decomposed_once_however_many_steps_are_made(monkeypatch):
    model, penalty, _ = held(lambda model: dense(model, singular()), strength=3.0)
    decompose, calls = torch.linalg.eigh, []

    def counted(matrix):
        calls.append(matrix)
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        penalty.proximal_step_(optimizer)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["strength", "rate", "precision"])
def test_a_proximal_step_follows_what_has_changed_since_the_last(change):
    model, penalty, anchor = held(lambda model: dense(model, singular()), strength=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.proximal_step_(optimizer)
    matrix = singular()
    if change == "strength":
        penalty.strength = 30.0
    elif change == "rate":
        optimizer.param_groups[0]["lr"] = 1.0
    else:
        matrix, anchor = torch.diag(spread()), parameters(model)
        penalty._replace(dense(model, matrix))
        with torch.no_grad():
            model.a += 1.0
    before = parameters(model)
    penalty.proximal_step_(optimizer)
    scaled = optimizer.param_groups[0]["lr"] * penalty.strength * matrix
    expected = anchor + torch.linalg.solve(torch.eye(5, dtype=DOUBLE) + scaled, before - anchor)
    assert torch.allclose(parameters(model), expected, **TIGHT)
