"""Synaptic intelligence, against the formulas of Zenke et al. 2017 written out."""

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.regularizers import SI
from tests.regularizers.cases import TIGHT, copies, learn, network, sgd, task


def task_gradients(model, x, y):
    """The gradient of the loss alone, from a call of its own."""
    loss = F.cross_entropy(model(x), y)
    return dict(zip(copies(model), torch.autograd.grad(loss, [*model.parameters()]), strict=True))


def watched(n_tasks=2, strength=3.0, xi=0.1, proximal=False, optimizer=sgd, penalised=True):
    """Train, and compute omega, Delta and the importance step by step beside it."""
    model = network(n_outputs=2)
    regularizer, opt = SI(model, strength, xi), optimizer(model)
    importance = {name: torch.zeros_like(p) for name, p in copies(model).items()}
    for t in range(n_tasks):
        x, y = task(t)
        regularizer.before_task()
        start = copies(model)
        omega = {name: torch.zeros_like(p) for name, p in start.items()}
        for _ in range(8):
            g, before = task_gradients(model, x, y), copies(model)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            regularizer.before_step(x)
            if penalised and not proximal:
                regularizer.add_gradient_()
            opt.step()
            if proximal:
                regularizer.proximal_step_(opt)
            regularizer.after_step()
            for name, after in copies(model).items():
                omega[name] -= g[name] * (after - before[name])
        for name, end in copies(model).items():
            squared = (end - start[name]) ** 2
            importance[name] += torch.clamp(omega[name], min=0) / (squared + xi)
        regularizer.consolidate((x, y))
    return regularizer, importance


def check(regularizer, importance):
    for name, value in regularizer.precision.diagonal().items():
        assert importance[name].max() > 0
        torch.testing.assert_close(value, importance[name], **TIGHT)


@pytest.mark.parametrize("xi", [0.1, 1e-3])
@pytest.mark.parametrize(
    "optimizer", [sgd, lambda model: torch.optim.Adam(model.parameters(), lr=0.01)]
)
def test_the_importance_is_that_of_the_paper_summed_over_tasks(xi, optimizer):
    check(*watched(3, xi=xi, optimizer=optimizer))


def test_the_path_includes_the_movement_of_a_proximal_step():
    regularizer, importance = watched(proximal=True, strength=50.0)
    check(regularizer, importance)
    _, without = watched(proximal=False, penalised=False)
    assert not torch.allclose(importance["net.0.weight"], without["net.0.weight"])


def test_the_gradient_of_the_penalty_does_not_enter_the_path():
    """At a strength where the penalty rules the movement, and against the gradient of both."""
    regularizer, importance = watched(strength=30.0)
    check(regularizer, importance)
    model = regularizer.model
    x, y = task(2)
    with torch.no_grad():
        model.net[0].weight += 1.0
    regularizer.before_task()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    regularizer.before_step(x)
    alone = task_gradients(model, x, y)
    regularizer.add_gradient_()
    assert (model.net[0].weight.grad - alone["net.0.weight"]).abs().max() > 0.1
    before = copies(model)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1
    regularizer.after_step()
    found = regularizer.consolidate().values
    for name, g in alone.items():
        omega = -g * (copies(model)[name] - before[name])
        torch.testing.assert_close(found[name], omega.clamp(min=0) / (0.1**2 + 0.1), **TIGHT)


def test_the_penalty_is_half_the_strength_times_the_weighted_squared_distance_to_the_last_optimum():
    regularizer, importance = watched(2, strength=3.0)
    last = copies(regularizer.model)
    with torch.no_grad():
        for p in regularizer.model.parameters():
            p += 0.3
    expected = sum((importance[name] * 0.3**2).sum() for name in last)
    torch.testing.assert_close(regularizer.penalty(), 3 / 2 * expected, **TIGHT)


def test_what_made_the_loss_rise_has_no_importance():
    model = network(n_outputs=2)
    regularizer = SI(model, 1.0)
    x, y = task()
    regularizer.before_task()
    F.cross_entropy(model(x), y).backward()
    regularizer.before_step(x)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.grad
    regularizer.after_step()
    with pytest.warns(RuntimeWarning, match="zero everywhere"):
        found = regularizer.consolidate()
    assert not any(value.any() for value in found.values.values())


def test_a_task_that_was_not_announced_begins_with_its_first_step():
    def run(announced):
        model = network(n_outputs=2)
        regularizer = SI(model, 1.0)
        if not announced:
            regularizer.before_task = lambda: None
        for t in range(2):
            learn(model, sgd(model), regularizer, task(t))
        return regularizer.precision.to_dense()

    assert torch.equal(run(True), run(False))


def test_a_state_from_the_middle_of_a_task_goes_on_identically():
    model, twin = network(n_outputs=2), network(n_outputs=2)
    regularizer, restored = SI(model, 1.0), SI(twin, 1.0)
    learn(model, sgd(model), regularizer, task(), finish=False)
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(regularizer.state_dict())
    found, again = (r.consolidate().to_dense() for r in (regularizer, restored))
    assert found.any()
    assert torch.equal(found, again)


@pytest.mark.parametrize("xi", [0.0, -1.0, float("nan")])
def test_a_damping_that_is_not_positive_is_refused(xi):
    with pytest.raises(ValueError, match="xi must be positive"):
        SI(network(), 1.0, xi)
