"""Proximal steps with a precision that couples parameters."""

import warnings

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib._coupled import Coupled, above_zero, scales_of
from ewc_lib._metric import Rates

STRUCTURES = ["module", "block", "dense", "lowrank", "kronecker", "eigenkronecker"]


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def consolidated(structure):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    ewc = EWC(model, 5.0, structure=structure)
    ewc.consolidate((draw(12, 3, seed=0), torch.arange(12) % 3))
    return model, ewc


def flat(values):
    return torch.cat([value.detach().reshape(-1) for value in values])


def problem(structure, fixed=()):
    """Return a precision, rates of tensors, displacements, and all that as matrices."""
    model, ewc = consolidated(structure)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    moved = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    numbers = {name: 0.1 * (1 + i) for i, name in enumerate(shapes) if name not in fixed}
    inverse = flat([torch.full(shape, 1 / numbers.get(n, 1.0)) for n, shape in shapes.items()])
    moves = flat([torch.full(shape, float(n in numbers)) for n, shape in shapes.items()]).bool()
    return ewc.precision, numbers, moved, torch.diag(inverse.double()), moves


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fixed", [(), ("0.bias", "2.weight")], ids=["all", "some"])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e3])
def test_what_is_left_solves_the_system_in_every_structure(structure, fixed, strength):
    precision, numbers, moved, inverse, moves = problem(structure, fixed)
    scales, top = scales_of(numbers)
    found = Coupled(precision, scales).at(top).left(strength, moved)
    A, d = precision.to_dense(), flat(moved.values())
    system = (inverse + strength * A)[moves][:, moves]
    right = inverse[moves][:, moves] @ d[moves] - strength * A[moves][:, ~moves] @ d[~moves]
    expected = torch.linalg.solve(system, right)
    torch.testing.assert_close(flat(found.values()), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_solved_is_the_system_without_constants(structure):
    precision, numbers, moved, inverse, _ = problem(structure)
    scales, top = scales_of(numbers)
    found = Coupled(precision, scales).at(top).solved(7.0, moved)
    expected = torch.linalg.solve(inverse + 7.0 * precision.to_dense(), flat(moved.values()))
    torch.testing.assert_close(flat(found.values()), expected, rtol=1e-6, atol=1e-7)


ADAPTIVE = [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad]


def trained(ewc, model, optimizers, steps=60):
    x, y = draw(12, 3, seed=0), torch.arange(12) % 3
    for optimizer in optimizers:
        ewc.attach(optimizer, metric="euclidean")
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), (y + 1) % 3).backward()
        for optimizer in optimizers:
            optimizer.step()
    return flat(model.parameters()), nn.functional.cross_entropy(model(x), (y + 1) % 3)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("strength", [1e8, 1e30])
def test_an_adaptive_optimizer_is_held_at_every_strength(method, structure, strength):
    model, ewc = consolidated(structure)
    at_anchor = flat(model.parameters())
    ewc.strength = strength
    after, _ = trained(ewc, model, [method(model.parameters(), lr=0.01)])
    A, d = ewc.precision.to_dense(), after - at_anchor
    assert d @ A @ d < 1e-6
    assert d.abs().max() < 2


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("structure", [s for s in STRUCTURES if "kronecker" not in s])
def test_a_budget_that_cannot_be_kept_holds_an_adaptive_optimizer(method, structure):
    model, ewc = consolidated(structure)
    ewc.budget = 1e-4
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=i))
    ewc.consolidate((2 * draw(12, 3, seed=5), torch.arange(12) % 3))
    before = flat(model.parameters())
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        after, _ = trained(ewc, model, [method(model.parameters(), lr=0.01)], steps=20)
    assert (after - before).abs().max() < 2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_adaptive_optimizers_keep_one_budget(structure):
    model, ewc = consolidated(structure)
    ewc.budget = 1e-3
    optimizers = [torch.optim.Adam(model[i].parameters(), lr=0.01) for i in (0, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the first may leave nothing to the second
        after, _ = trained(ewc, model, optimizers, steps=150)
    assert after.abs().max() < 10
    assert -1e-9 < ewc.nats().item() < 2e-3


def test_momentum_counts_where_parameters_are_coupled_and_second_moments_do_not():
    model, ewc = consolidated("dense")
    start = [p + 1 for p in model.parameters()]

    def stepped(optimizer):
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
                p.grad = torch.zeros_like(p)
        optimizer.step()
        ewc.proximal_step_(optimizer)
        return flat(model.parameters())

    plain = stepped(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.testing.assert_close(stepped(torch.optim.Adam(model.parameters(), lr=0.1)), plain)
    momentum = stepped(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5))
    torch.testing.assert_close(momentum, plain)


def test_a_rate_of_zero_leaves_a_parameter_out():
    rates = above_zero(Rates({"a": 0.0, "b": 1.0}, {"a": torch.ones(1)}))
    assert rates == Rates({"b": 1.0}, {})


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e39, 1e308])
def test_a_strength_beyond_the_range_is_that_which_stands_for_infinity(structure, dtype, strength):
    model, ewc = consolidated(structure)
    precision = ewc.precision.to(dtype=dtype)
    moved = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    scales, top = scales_of(dict.fromkeys(moved, 100.0))
    held = Coupled(precision, scales).at(top)
    found, solved = held.left(strength, moved), held.solved(strength, moved)
    torch.testing.assert_close(found, held.left(1e28, moved))
    torch.testing.assert_close(solved, held.solved(1e28, moved))
    A, d = precision.to(dtype=torch.float64).to_dense(), flat(found.values()).double()
    rounding = 1e-9 if dtype == torch.float64 else 1e-5
    assert d @ A @ d < rounding * A.diagonal().max()
    assert d.norm() > 0.1  # what has no information is free


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_strength_below_the_range_of_single_precision_does_nothing(structure):
    model, ewc = consolidated(structure)
    precision = ewc.precision.to(dtype=torch.float32)
    moved = {name: p.detach().float() for name, p in model.named_parameters()}
    scales, top = scales_of(dict.fromkeys(moved, 0.1))
    found = Coupled(precision, scales).at(top).left(1e-290, moved)
    torch.testing.assert_close(found, moved)
