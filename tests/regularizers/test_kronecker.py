"""Online Laplace with Kronecker factors, against factors computed and averaged by hand."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC, Gaussian
from ewc_lib.regularizers import KroneckerLaplace
from tests.regularizers.cases import DOUBLE, TIGHT, copies, move, network, task


def factors(layer, x):
    """B and A of softmax regression, from their definitions."""
    p = layer(x).softmax(-1)
    B = sum(torch.diag(row) - torch.outer(row, row) for row in p) / len(x)
    a = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return B.detach(), a.mT @ a / len(x)


def test_the_precision_is_the_number_of_tasks_times_the_factors_pooled_over_observations():
    model = nn.Linear(3, 2).double()
    regularizer, found, sizes = KroneckerLaplace(model, strength=3.0), [], (10, 20, 30)
    for t, n in enumerate(sizes):
        move(model, t)
        found.append(factors(model, task(t, n)[0]))
        regularizer.consolidate(task(t, n))
    B, A = (
        sum(n * pair[i] for n, pair in zip(sizes, found, strict=True)) / sum(sizes) for i in (0, 1)
    )
    anchor = copies(model)
    move(model, 7)
    d = {name: p - anchor[name] for name, p in copies(model).items()}
    V = torch.cat([d["weight"], d["bias"][:, None]], 1)
    expected = 3 / 2 * len(sizes) * (V * (B @ V @ A)).sum()
    torch.testing.assert_close(regularizer.penalty(), expected, **TIGHT)
    assert regularizer.n_tasks == 3


def convolutions():
    """A network of grouped, depthwise and transposed convolutions that reads a task."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 1)),
        nn.Conv1d(3, 6, 3, padding=1, groups=3),
        nn.Tanh(),
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()


@pytest.mark.parametrize("make", [network, convolutions])
def test_after_one_task_it_is_ewc_of_kronecker_structure(make):
    model = make()
    ours, ewc = KroneckerLaplace(model, 3.0), EWC(model, 3.0, structure="kronecker")
    for regularizer in (ours, ewc):
        F, anchor = regularizer.consolidate(task()), copies(model)
    move(model)
    d = torch.cat([(p - anchor[name]).flatten() for name, p in copies(model).items()])
    torch.testing.assert_close(ours.penalty(), ewc.penalty(), **TIGHT)
    torch.testing.assert_close(ewc.penalty(), 3 / 2 * d @ F.to_dense() @ d, **TIGHT)


def test_several_tasks_keep_the_factors_of_each_group():
    model = convolutions()
    regularizer = KroneckerLaplace(model, 1.0)
    for t in range(3):
        regularizer.consolidate(task(t))
        move(model, t)
    sizes = [tuple(block.size) for block in regularizer.precision.blocks[:3]]
    assert sizes == [(3, 2, 4), (2, 6, 3), (2, 13)]
    assert regularizer.penalty() > 0


def test_the_fisher_information_of_each_task_is_returned():
    model = network()
    regularizer = KroneckerLaplace(model, 1.0)
    regularizer.consolidate(task(0))
    alone = EWC(model, 1.0, structure="kronecker").consolidate(task(1))
    torch.testing.assert_close(regularizer.consolidate(task(1)).to_dense(), alone.to_dense())


def test_it_holds_combinations_that_a_diagonal_does_not_know():
    """Two inputs that are always equal: only the sum of their weights matters."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).expand(30, 2)
    data = x, torch.zeros(30, 1, dtype=DOUBLE)
    kronecker = KroneckerLaplace(model, 1.0, likelihood=Gaussian())
    diagonal = EWC(model, 1.0, likelihood="gaussian")
    for regularizer in (kronecker, diagonal):
        regularizer.consolidate(data)
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, -1.0]], dtype=DOUBLE)
    assert kronecker.penalty().item() == pytest.approx(0, abs=1e-12)
    assert diagonal.penalty().item() > 0.5


@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
def test_any_kind_of_fisher_information_can_be_taken(kind):
    model = network()
    regularizer = KroneckerLaplace(model, 1.0, kind=kind)
    for t in range(2):
        assert regularizer.consolidate(task(t)).kind == kind
    assert regularizer.precision.kind == kind
