from functools import partial

import pytest
import torch

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import mlp, train
from ewc_lib.experiments.structures.displacements import divergence
from ewc_lib.experiments.structures.stacks import (
    HeldPredictions,
    Quadratic,
    kl,
    outputs,
    train_stack,
)
from ewc_lib.fisher import Diagonal

STRENGTHS = [0.1, 3.0]


def classifier(seed=1):
    model = mlp((5, 4, 3), seed=seed).double()
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, (x, torch.arange(20) % 3)


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def matrix(fisher):
    if isinstance(fisher, Diagonal):
        return torch.cat([part.flatten() for part in fisher.diagonal().values()])
    return fisher.to_dense()


def stack(model, n=3):
    generator = torch.Generator().manual_seed(2)
    start = vector(model)
    return start + 0.3 * torch.randn(n, len(start), dtype=start.dtype, generator=generator)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "lowrank", "dense"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize(
    ("optimizer", "form"),
    [(torch.optim.SGD, "gradient"), (torch.optim.SGD, "proximal"), (torch.optim.Adam, "gradient")],
)
def test_each_row_ends_where_the_penalty_of_its_strength_leads(structure, rate, optimizer, form):
    model, task = classifier()
    other = task[0], task[1].flip(0)
    fisher = fisher_information(model, task, structure=structure, rank=5)
    options = {"steps": 6, "batch_size": 8, "seed": 3}
    found = train_stack(
        model,
        other,
        Quadratic(matrix(fisher), vector(model)),
        STRENGTHS,
        optimizer=partial(optimizer, lr=rate),
        form=form,
        **options,
    )
    for strength, row in zip(STRENGTHS, found, strict=True):
        alone, _ = classifier()
        ewc = EWC(alone, strength, structure=structure, rank=5)
        ewc.remember(fisher)
        train(
            alone,
            other,
            regularizer=ewc,
            optimizer=optimizer(alone.parameters(), lr=rate),
            proximal=form == "proximal",
            progress=False,
            **options,
        )
        torch.testing.assert_close(row, vector(alone), rtol=1e-7, atol=1e-9)


def test_training_leaves_the_model_where_it_was():
    model, task = classifier()
    before = vector(model)
    penalty = Quadratic(torch.ones_like(before), before)
    train_stack(
        model,
        task,
        penalty,
        [1.0],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        form="gradient",
        steps=2,
        batch_size=8,
        seed=0,
    )
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_the_proximal_step_in_a_metric_solves_its_equation(strength):
    model, task = classifier()
    F = fisher_information(model, task, structure="dense").to_dense()
    anchor, rows = vector(model), stack(model)
    metric = torch.rand(rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(5))
    metric = 1e-4 + metric
    factors = torch.full((3, 1), strength, dtype=rows.dtype)
    found = Quadratic(F, anchor).proximal(rows, factors, metric) - anchor
    for row, weights, solved in zip(rows, metric, found, strict=True):
        b = weights * (row - anchor)
        expected = torch.linalg.solve(weights.diag() + strength * F, b)
        size = (row - anchor).norm()
        assert (solved - expected).norm() < 1e-2 * size


def test_a_matrix_of_low_rank_is_solved_for_exactly():
    model, _ = classifier()
    anchor, rows = vector(model), stack(model)
    root = torch.randn(len(anchor), 2, dtype=rows.dtype, generator=torch.Generator().manual_seed(4))
    metric = torch.rand(rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(5))
    factors = torch.tensor([[1e-3], [1.0], [1e3]], dtype=rows.dtype)
    found = Quadratic(root @ root.mT, anchor).proximal(rows, factors, metric) - anchor
    for row, factor, weights, solved in zip(rows, factors, metric, found, strict=True):
        system = weights.diag() + factor * root @ root.mT
        torch.testing.assert_close(system @ solved, weights * (row - anchor))


def test_conjugate_gradients_begin_at_the_solution_before():
    model, task = classifier()
    F = fisher_information(model, task, structure="dense").to_dense()
    penalty, rows = Quadratic(F, vector(model)), stack(model)
    metric, factors = torch.ones_like(rows), torch.ones(3, 1, dtype=rows.dtype)
    first = penalty.proximal(rows, factors, metric)
    products = []
    penalty._product = lambda moved: products.append(1) or moved @ F
    torch.testing.assert_close(penalty.proximal(rows, factors, metric), first)
    assert len(products) == 1  # it only sees that nothing is left


def test_a_metric_of_ones_is_none_and_a_diagonal_needs_no_solution():
    model, task = classifier()
    anchor, rows = vector(model), stack(model)
    values = matrix(fisher_information(model, task))
    factors = torch.tensor([[0.5], [1.0], [2.0]], dtype=rows.dtype)
    one = Quadratic(values, anchor).proximal(rows, factors)
    assert torch.equal(
        one, Quadratic(values, anchor).proximal(rows, factors, torch.ones_like(rows))
    )
    torch.testing.assert_close(one, Quadratic(values.diag(), anchor).proximal(rows, factors))


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    model, task = classifier()
    F = fisher_information(model, task, structure="dense").to_dense()
    rows = stack(model)
    bad = rows.clone()
    bad[0] = torch.nan
    metric, factors = torch.ones_like(rows), torch.ones(3, 1, dtype=rows.dtype)
    alone = Quadratic(F, vector(model)).proximal(rows[1:], factors[1:], metric[1:])
    found = Quadratic(F, vector(model)).proximal(bad, factors, metric)
    torch.testing.assert_close(found[1:], alone, rtol=1e-3, atol=1e-6)


def test_outputs_are_those_of_the_model_with_the_parameters_of_each_row():
    model, (x, _) = classifier()
    rows = stack(model)
    found = outputs(model, rows, x)
    for row, logits in zip(rows, found, strict=True):
        other, _ = classifier(seed=9)
        torch.nn.utils.vector_to_parameters(row, other.parameters())
        torch.testing.assert_close(logits, other(x).detach())


def test_the_divergence_of_a_row_is_that_of_its_displacement():
    model, (x, _) = classifier()
    rows = stack(model)
    found = kl(model(x).detach(), outputs(model, rows, x))
    for row, lost in zip(rows, found, strict=True):
        shapes = [p.numel() for p in model.parameters()]
        parts = (row - vector(model)).split(shapes)
        step = {
            name: part.reshape(p.shape)
            for (name, p), part in zip(model.named_parameters(), parts, strict=True)
        }
        torch.testing.assert_close(lost, divergence(model, x, step))


def test_held_predictions_pull_down_the_divergence():
    model, (x, _) = classifier()
    held, rows = HeldPredictions(model, x), stack(model)
    leaf = rows.clone().requires_grad_()
    expected = [kl(model(x).detach(), outputs(model, leaf[i : i + 1], x)[0]) for i in range(3)]
    (wanted,) = torch.autograd.grad(sum(expected), leaf)
    torch.testing.assert_close(held.gradient(rows), wanted)
    assert not held.gradient(vector(model)[None]).abs().max() > 1e-12
