"""Whether a number and its derivative are those of a negative log-likelihood."""

import math

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.likelihood import Categorical, Gaussian, Poisson
from ewc_lib.likelihood.losses import Loss, candidates, compare


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loss_of(criterion, output, target, slope=True, **options):
    output = output.clone().requires_grad_()
    value = criterion(output, target)
    gradient = torch.autograd.grad(value, output)[0] if slope else None
    return Loss(value.detach(), gradient, "a loss", "", **options)


def agrees(criterion, distribution, output, target, slope=True, **options):
    loss = loss_of(criterion, output, target, slope, **options)
    return compare(loss, distribution, output, target).agrees


MEANS = {
    "sum": lambda values: values.sum(),
    "mean over observations": lambda values: values.sum() / len(values),
    "mean over entries": lambda values: values.mean(),
}
FAMILIES = {
    "squared error": (Gaussian(2.0), lambda f, y: (f - y).square()),
    "half of it": (Gaussian(2.0), lambda f, y: (f - y).square() / 2),
    "density without its constant": (Gaussian(2.0), lambda f, y: (f - y).square() / 8),
    "density": (
        Gaussian(2.0),
        lambda f, y: (f - y).square() / 8 + math.log(2 * math.sqrt(2 * math.pi)),
    ),
    "counts": (Poisson(), lambda f, y: f.exp() - y * f),
    "counts with their constant": (Poisson(), lambda f, y: f.exp() - y * f + torch.lgamma(y + 1)),
}


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_and_means_of_a_density_agree(family, mean, slope):
    distribution, values = FAMILIES[family]
    f, y = noise(4, 3), noise(4, 3, seed=1).abs().round()
    assert agrees(lambda f, y: MEANS[mean](values(f, y)), distribution, f, y, slope)


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.001, 3.0, -1.0])
def test_no_factor_and_no_constant_is_fitted(factor, slope):
    f, y = noise(4, 3), torch.tensor([0, 2, 1, 1])
    assert not agrees(lambda f, y: factor * F.cross_entropy(f, y), Categorical(), f, y, slope)
    assert not agrees(lambda f, y: 0.01 + F.cross_entropy(f, y), Categorical(), f, y, slope)
    assert agrees(F.cross_entropy, Categorical(), f, y, slope)


def test_a_constant_does_not_matter_where_it_is_said_not_to():
    f, y = noise(4, 3), torch.tensor([0, 2, 1, 1])
    criterion = lambda f, y: 0.01 + F.cross_entropy(f, y)  # noqa: E731
    assert agrees(criterion, Categorical(), f, y, any_constant=True)
    assert not agrees(criterion, Categorical(), f, y, slope=False, any_constant=True)


def test_means_are_over_the_labels_that_count():
    f, y = noise(4, 5, 3), torch.ones(4, 5, dtype=torch.long)
    y[0, 1:] = y[2, 2] = -100
    assert agrees(lambda f, y: F.cross_entropy(f.mT, y), Categorical(), f, y)
    assert not agrees(
        lambda f, y: F.cross_entropy(f.mT, y, reduction="sum") / 20, Categorical(), f, y
    )


def test_the_same_value_with_another_derivative_does_not_agree():
    f, y = noise(4, 3), torch.tensor([0, 2, 1, 1])
    assert not agrees(
        lambda f, y: F.cross_entropy(f, y) + (f - f.detach()).sum(), Categorical(), f, y
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loss_is_compared_in_its_own_precision(dtype):
    f, y = noise(4, 3).to(dtype), torch.tensor([0, 2, 1, 1])
    assert agrees(F.cross_entropy, Categorical(), f, y)
    assert not agrees(lambda f, y: 1.1 * F.cross_entropy(f, y), Categorical(), f, y)


def test_confident_outputs_do_not_make_rounding_count():
    f, y = 300 * noise(40, 3).float(), torch.zeros(40, dtype=torch.long)
    f[:, 0] += 1000
    assert agrees(F.cross_entropy, Categorical(), f, y)


def test_what_does_not_fit_is_told():
    f, y = noise(4, 3), torch.tensor([0, 2, 1, 7])
    found = compare(loss_of(lambda f, y: f.sum(), f, y), Categorical(), f, y)
    assert not found.agrees
    assert not found.possible
    assert "label 7 of observation 3" in found.told


def test_numbers_of_every_mean_are_told():
    f, y = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    told = compare(loss_of(lambda f, y: f.sum(), f, y), Categorical(), f, y).told
    assert told == "sum 10.9861, mean over observations 5.49306, mean over labels 1.09861"


def test_an_axis_of_classes_is_asked_for_where_there_are_two():
    assert "Categorical(class_dim=1)" in candidates(torch.zeros(2, 3, 4))
    assert "Categorical(class_dim=1)" not in candidates(torch.zeros(2, 3))
