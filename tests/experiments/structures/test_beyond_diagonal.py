import math
import statistics

import pytest
import torch

from ewc_lib import EWC, data, fisher_information
from ewc_lib.continual import mlp, train
from ewc_lib.experiments.runs.strengths import left_out
from ewc_lib.experiments.structures.beyond_diagonal import (
    METHODS,
    PROTOCOL,
    HeldPredictions,
    comparison,
    damped,
    divergence,
    flat,
    learned_step,
    table,
)
from ewc_lib.fisher import MatrixFree
from ewc_lib.regularizers import Regularizer

SHORT = {**PROTOCOL, "hidden": [4], "steps": 3, "grid": [1.0, 10.0]}


def classifier():
    model = mlp((5, 4, 3), seed=1).double()
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, (x, torch.arange(20) % 3)


def step(model, size, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }


def moved(model, displacement):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += displacement[name]


def test_a_learned_step_is_the_way_of_sgd_and_the_model_is_put_back():
    model, (x, y) = classifier()
    before = [p.clone() for p in model.parameters()]
    found = learned_step(model, (x, y), rate=0.1, steps=1, seed=0, batch_size=len(x))
    assert all(map(torch.equal, before, model.parameters()))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for step_of, gradient in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(step_of, -0.1 * gradient)


def test_a_learned_step_is_shorter_where_an_earlier_task_is_held():
    model, task = classifier()
    ewc = EWC(model, strength=100.0)
    ewc.consolidate(task)
    other = task[0], task[1].flip(0)
    options = {"rate": 0.1, "steps": 50, "seed": 0}
    free, held = (learned_step(model, other, regularizer=r, **options) for r in (None, ewc))
    assert ewc.precision.quadratic(held) < 0.5 * ewc.precision.quadratic(free)


def test_the_divergence_is_that_of_the_probabilities():
    model, (x, _) = classifier()
    displacement = step(model, 0.5)
    before = [p.clone() for p in model.parameters()]
    found = divergence(model, x, displacement)
    assert all(map(torch.equal, before, model.parameters()))
    old = model(x).softmax(1)
    moved(model, displacement)
    expected = (old * (old / model(x).softmax(1)).log()).sum(1).mean()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)
    assert found > 0.01


def test_the_divergence_begins_as_the_quadratic_form_of_the_fisher_information():
    model, task = classifier()
    F = fisher_information(model, task, structure="dense")

    def gap(size):
        displacement = step(model, size)
        return abs(divergence(model, task[0], displacement) - F.quadratic(displacement) / 2)

    assert 6 < gap(2e-3) / gap(1e-3) < 10  # the third order is left


def test_damping_adds_a_share_of_the_mean_of_the_diagonal_in_every_direction():
    model, task = classifier()
    F = fisher_information(model, task, structure="dense")
    eigenvalues = torch.linalg.eigvalsh(damped(F, 0.5).matrix)
    shift = 0.5 * F.trace() / len(F.matrix)
    torch.testing.assert_close(eigenvalues, torch.linalg.eigvalsh(F.matrix) + shift)


def test_held_predictions_are_a_regularizer_and_cost_the_strength_times_the_divergence():
    model, task = classifier()
    held = HeldPredictions(model, 7.0)
    assert isinstance(held, Regularizer)
    assert held.penalty() == 0
    held.consolidate(task)
    displacement = step(model, 0.5)
    expected = 7.0 * divergence(model, task[0], displacement)
    moved(model, displacement)
    torch.testing.assert_close(held.penalty().detach(), expected)


def test_held_predictions_add_the_gradient_of_their_penalty():
    model, task = classifier()
    held = HeldPredictions(model, 7.0)
    held.add_gradient_()
    assert all(p.grad is None for p in model.parameters())
    held.consolidate(task)
    moved(model, step(model, 0.5))
    expected = torch.autograd.grad(held.penalty(), list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held.add_gradient_()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + gradient)


def test_held_predictions_survive_their_state():
    model, task = classifier()
    held, again = HeldPredictions(model, 7.0), HeldPredictions(model, 7.0)
    held.consolidate(task)
    again.load_state_dict(held.state_dict())
    moved(model, step(model, 0.5))
    assert again.penalty() == held.penalty() > 0


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "short.json"
    return comparison(path, seeds=2, protocol=SHORT, progress=False)


def test_every_method_is_measured_with_every_optimizer_at_every_strength(result):
    runs = flat(result)
    keys = {(r["optimizer"], r["method"], r["seed"], r["strength"]) for r in runs}
    strengths = {"none": [0.0]}
    assert keys == {
        (optimizer, method, seed, strength)
        for optimizer in PROTOCOL["optimizers"]
        for method in METHODS
        for seed in range(2)
        for strength in strengths.get(method, SHORT["grid"])
    }
    assert len(keys) == len(runs)


def test_a_run_has_the_mean_of_both_accuracies_and_what_is_lost_on_the_first(result):
    for run in flat(result):
        assert run["accuracy"] == (run["accuracy_a"] + run["accuracy_b"]) / 2
        assert run["divergence"] > 0
        assert run["parabola"] > 0
        if run["method"] == "dense":
            assert math.isclose(run["expected"], run["parabola"], rel_tol=1e-3)
        if run["method"] == "predictions":
            assert math.isclose(run["expected"], run["divergence"], rel_tol=1e-3)
        if run["method"] == "damped":
            assert run["expected"] > run["parabola"]


def test_a_run_can_be_repeated_by_hand(result):
    images = data.digits(dtype=torch.float64)
    model = mlp((64, 4, 10), seed=1).double()
    options = {"steps": 3, "batch_size": 64, "progress": False}
    train(model, images.train, seed=1, **options)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    ewc = EWC(model, 10.0, structure="kronecker")
    ewc.consolidate(images.train, progress=False)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1001))
    train(
        model,
        (images.x_train[:, order], images.y_train),
        seed=2,
        regularizer=ewc,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        proximal=True,
        **options,
    )
    (run,) = (
        r
        for r in flat(result, optimizer="SGD", method="kronecker", seed=1)
        if r["strength"] == 10.0
    )
    displacement = {name: p.detach() - anchor[name] for name, p in model.named_parameters()}
    model.load_state_dict(anchor)
    whole = MatrixFree(model, images.train, progress=False)
    assert math.isclose(run["parabola"], whole.quadratic(displacement) / 2, rel_tol=1e-4)


def test_the_table_shows_each_row_at_the_strength_that_the_other_seeds_choose(result):
    lines = table(result).splitlines()
    assert len(lines) == 2 * len(METHODS)
    (line,) = (x for x in lines if x.startswith("Adam  kronecker"))
    runs = flat(result, optimizer="Adam", method="kronecker")
    assert f"{100 * left_out(runs, 'accuracy'):.2f} ±" in line
    (plain,) = (x for x in lines if x.startswith("SGD   none"))
    own = statistics.mean(r["accuracy"] for r in flat(result, optimizer="SGD", method="none"))
    assert f"{100 * own:.2f} ±" in plain
