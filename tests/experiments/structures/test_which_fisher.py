import math

import pytest
import torch
from torch import Tensor, nn

from ewc_lib.continual import mlp
from ewc_lib.experiments.structures.which_fisher import (
    label_scores,
    quality,
    rank_agreement,
    sampling_variance,
    sketch_columns,
    sketch_variance,
)
from ewc_lib.fisher import every_label, score_covariance
from ewc_lib.fisher.output import root_times
from ewc_lib.likelihood import network_log_prob
from ewc_lib.likelihood.outputs import Categorical


def classifier(n_classes: int, sharpness: float = 1.0) -> tuple[nn.Module, Tensor]:
    model = mlp((4, 5, n_classes), seed=n_classes).double()
    model[-1].weight.data *= sharpness
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, x


def pulled_back(model: nn.Module, x: Tensor, column: Tensor) -> Tensor:
    """Return one row ``J_n^T column_n`` for each observation, by plain autograd."""
    return torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(model(x_n) @ c, model.parameters())]
            )
            for x_n, c in zip(x, column, strict=True)
        ]
    )


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_the_table_of_scores_holds_the_fisher_information(n_classes):
    model, x = classifier(n_classes)
    p, g = label_scores(model, x)
    assert torch.allclose(p, model(x).softmax(-1))
    log_prob, theta = network_log_prob(model)
    expected = score_covariance(log_prob, theta, *every_label(model, x)).diagonal()
    assert torch.allclose(torch.einsum("nc,ncp->p", p, g**2) / len(x), expected, rtol=1e-10)
    for y in range(n_classes):
        residual = nn.functional.one_hot(torch.tensor([y] * len(x)), n_classes) - p
        assert torch.allclose(g[:, y], pulled_back(model, x, residual.detach()))


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.claim("eq-sketch-variance")
def test_the_sketch_variance_is_that_over_all_signs(n_classes):
    model, x = classifier(n_classes, sharpness=3.0)
    p, g = label_scores(model, x)
    squares = []
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * n_classes):
        column = root_times(Categorical(), model(x).detach(), signs.expand(len(x), -1))
        squares.append(pulled_back(model, x, column).square())
    every = torch.stack(squares)
    assert torch.allclose(every.mean(0), sketch_columns(p, g).square().sum(1), rtol=1e-10)
    assert torch.allclose(every.var(0, correction=0), sketch_variance(p, g), atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_the_sketch_variance_stays_below_its_bound_however_sure_the_model(n_classes):
    for sharpness in (0.0, 1.0, 10.0, 100.0):
        p, g = label_scores(*classifier(n_classes, sharpness))
        fisher = torch.einsum("nc,ncp->np", p, g**2)
        bound = 2 * (1 - 1 / (n_classes - 1)) * fisher**2
        assert (sketch_variance(p, g) <= bound + 1e-9 * fisher**2).all()


def test_the_sampling_variance_is_that_over_all_labels():
    p, g = label_scores(*classifier(3))
    fisher = sum(p[:, y, None] * g[:, y] ** 2 for y in range(3))
    spread = sum(p[:, y, None] * (g[:, y] ** 2 - fisher) ** 2 for y in range(3))
    assert torch.allclose(sampling_variance(p, g), spread, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.claim("thm-sampling", "eq-sampling-variance")
def test_the_sampling_variance_stays_above_its_bound_and_reaches_it_with_two_labels(n_classes):
    p, g = label_scores(*classifier(n_classes, sharpness=30.0))
    fisher = torch.einsum("nc,ncp->np", p, g**2)
    e = p.sort(1).values[:, :-1].sum(1, keepdim=True)  # without the cancellation of 1 - max
    bound = (1 - 2 * e) ** 2 / (e * (1 - e)) * fisher**2
    sure = e[:, 0] < 0.5
    assert sure.any()
    variance = sampling_variance(p, g)
    assert (variance >= bound * (1 - 1e-9))[sure].all()
    if n_classes == 2:
        assert torch.allclose(variance, bound, rtol=1e-9)


def test_quality_of_noise_alone_has_no_bias():
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    noise = torch.randn(400, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = quality(exact + 0.3 * noise, exact)
    expected = 0.3 * math.sqrt(50) / exact.norm().item()
    assert found.standard_error == pytest.approx(expected, rel=0.05)
    assert found.bias < found.standard_error / math.sqrt(400)
    assert found.error == pytest.approx(expected, rel=0.05)
    assert found.trace == pytest.approx(1, abs=0.01)


def test_quality_of_a_constant_factor_is_bias_alone():
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    found = quality(0.25 * exact.unsqueeze(0), exact)
    assert found.bias == pytest.approx(0.75)
    assert found.standard_error == 0
    assert found.error == pytest.approx(0.75)
    assert found.trace == pytest.approx(0.25)
    assert found.rank == pytest.approx(1)


@pytest.mark.claim("def-relative-error", "eq-relative-error")
def test_bias_and_standard_error_are_lengths_over_that_of_the_exact_diagonal():
    draws = torch.tensor([[3.0, 4.0], [5.0, 4.0], [4.0, 4.0]])  # of mean 4, 4 and variance 1, 0
    found = quality(draws, exact=torch.tensor([3.0, 4.0]))
    assert found.bias == pytest.approx(math.sqrt(1 - 1 / 3) / 5)  # less what three draws add to it
    assert found.standard_error == pytest.approx(1 / 5)
    assert found.error**2 == pytest.approx(found.bias**2 + found.standard_error**2)


def test_rank_agreement_is_spearmans_and_ignores_entries_without_information():
    exact = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    estimate = torch.tensor([9.0, 10.0, 30.0, 20.0, 1e6, 9.0])
    assert rank_agreement(estimate, exact) == pytest.approx(1 - 6 * 2 / (4 * 15))
