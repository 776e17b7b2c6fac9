"""Proximal steps with a precision that couples parameters, each entry with its own rate."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib._coupled import OfEntries, OfTensors, above_zero, scales_of
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
    """Return a precision, rates of entries, displacements, and all that as matrices."""
    model, ewc = consolidated(structure)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    moved = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    below = {n: draw(*s, seed=9 + i).exp() for i, (n, s) in enumerate(shapes.items())}
    moving = [name for name in shapes if name not in fixed]
    rates = Rates({n: 0.3 for n in moving}, {n: below[n] for n in moving[:-1]})  # one has none
    inverse = flat(
        [below[n] / 0.3 if n in rates.divisors else below[n] * 0 + 1 / 0.3 for n in shapes]
    )
    moves = flat([torch.full(shapes[n], float(n in moving)) for n in shapes]).bool()
    return ewc.precision, rates, moved, torch.diag(inverse), moves


@pytest.mark.claim("eq-metric-step")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fixed", [(), ("0.bias", "2.weight")], ids=["all", "some"])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e3])
def test_what_is_left_solves_the_system_in_every_structure(structure, fixed, strength):
    precision, rates, moved, inverse, moves = problem(structure, fixed)
    found = OfEntries(precision, rates).left(strength, moved)
    A, d = precision.to_dense(), flat(moved.values())
    system = (inverse + strength * A)[moves][:, moves]
    right = inverse[moves][:, moves] @ d[moves] - strength * A[moves][:, ~moves] @ d[~moves]
    torch.testing.assert_close(flat(found.values()), torch.linalg.solve(system, right))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rates_of_tensors_and_the_same_rates_of_entries_give_the_same(structure):
    precision, rates, moved, _, _ = problem(structure)
    numbers = {name: 0.1 * (1 + i) for i, name in enumerate(rates.numbers)}
    scales, top = scales_of(numbers)
    by_tensor = OfTensors(precision, scales).at(top)
    by_entry = OfEntries(precision, Rates(numbers, {}))
    for found, expected in [
        (by_entry.left(7.0, moved), by_tensor.left(7.0, moved)),
        (by_entry.solved(7.0, moved), by_tensor.solved(7.0, moved)),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.claim("thm-metric")
@pytest.mark.parametrize("exponent", [0, 3, 6, 9])
def test_however_early_conjugate_gradients_end_the_penalty_does_not_grow(exponent, monkeypatch):
    monkeypatch.setattr("ewc_lib._coupled.MOST_OF_A_STEP", 3)
    model, ewc = consolidated("dense")
    ewc.strength = 10.0**exponent
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(20):
        for i, p in enumerate(model.parameters()):
            p.grad = (5 * draw(*p.shape, seed=step)).exp() * draw(*p.shape, seed=50 + i)
        optimizer.step()
        before = ewc.penalty()
        ewc.proximal_step_(optimizer)
        assert ewc.penalty() <= before * (1 + 1e-12)


def test_a_rate_of_zero_leaves_a_parameter_out():
    rates = above_zero(Rates({"a": 0.0, "b": 1.0}, {"a": torch.ones(1)}))
    assert rates == Rates({"b": 1.0}, {})
