"""Riemannian walk, against the formulas of Chaudhry et al. 2018 written out."""

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.regularizers import RWalk
from tests.regularizers.cases import TIGHT, copies, learn, network, sgd, task


def flat(values):
    return torch.cat([value.detach().reshape(-1) for value in values])


def watched(n_tasks, n_steps, alpha, epsilon, interval, strength=2.0):
    """Train, and compute F and the scores with flat vectors beside it."""
    model = network(n_outputs=2)
    regularizer, optimizer = RWalk(model, strength, alpha, epsilon, interval), sgd(model, 0.2)
    running, past = None, None
    for t in range(n_tasks):
        x, y = task(t)
        regularizer.before_task()
        score, gs, thetas = 0.0, [], [flat(model.parameters())]
        for _ in range(n_steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gs.append(flat(p.grad for p in model.parameters()))
            regularizer.before_step(x)
            regularizer.add_gradient_()
            optimizer.step()
            regularizer.after_step()
            thetas.append(flat(model.parameters()))
        for first in range(0, n_steps, interval):
            steps = range(first, min(first + interval, n_steps))
            newest = sum(gs[i] ** 2 for i in steps) / len(steps)
            running = newest if running is None else alpha * newest + (1 - alpha) * running
            fall = -sum(gs[i] * (thetas[i + 1] - thetas[i]) for i in steps)
            distance = 0.5 * running * (thetas[steps[-1] + 1] - thetas[first]) ** 2
            score = score + torch.clamp(fall, min=0) / (distance + epsilon)
        past = score if past is None else (past + score) / 2
        regularizer.consolidate((x, y))
    return regularizer, running / running.max() + past / past.max()


@pytest.mark.parametrize(
    ("n_tasks", "n_steps", "interval"), [(1, 6, 1), (1, 6, 3), (2, 7, 3), (3, 4, 10)]
)
@pytest.mark.parametrize("alpha", [0.9, 0.3, 1.0])
def test_the_importance_is_that_of_the_paper(n_tasks, n_steps, interval, alpha):
    regularizer, expected = watched(n_tasks, n_steps, alpha, 1e-3, interval)
    found = flat(regularizer.precision.diagonal().values())
    torch.testing.assert_close(found, expected, **TIGHT)
    assert 1 < found.max() <= 2


def test_a_parameter_without_entries_changes_nothing():
    def run(empty):
        model = network(n_outputs=2)
        if empty:
            model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 2)))
        regularizer, optimizer = RWalk(model, 1.0, interval=2), sgd(model)
        learn(model, optimizer, regularizer, task())
        return regularizer.precision.to_dense()

    torch.testing.assert_close(run(empty=True), run(empty=False), rtol=0, atol=0)


def test_the_scale_of_the_loss_does_not_matter_where_the_score_is_not_damped():
    def run(scale):
        model = network(n_outputs=2)
        regularizer = RWalk(model, 1.0, epsilon=1e-30, interval=5)
        optimizer = sgd(model, 0.1 / scale)
        x, y = task()
        for _ in range(10):
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(x), y)).backward()
            regularizer.before_step(x)
            optimizer.step()
            regularizer.after_step()
        return regularizer.consolidate().to_dense()

    torch.testing.assert_close(run(1.0), run(100.0), rtol=1e-8, atol=1e-8)


def test_a_state_from_the_middle_of_an_interval_goes_on_identically():
    model, twin = network(n_outputs=2), network(n_outputs=2)
    regularizer, restored = RWalk(model, 1.0), RWalk(twin, 1.0)
    learn(model, sgd(model), regularizer, task(0))
    learn(model, sgd(model), regularizer, task(1), steps=13, finish=False)
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(regularizer.state_dict())
    found, again = (r.consolidate().to_dense() for r in (regularizer, restored))
    assert torch.equal(found, again)
    assert torch.equal(flat(copies(model).values()), flat(restored.anchor.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must lie in"),
        ({"alpha": 1.1}, "alpha must lie in"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"interval": 0}, "interval must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RWalk(network(), 1.0, **options)
