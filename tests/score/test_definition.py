"""The score: the gradient of the log-likelihood, observation by observation."""

import math

import pytest
import torch
from torch import nn

from ewc_lib.likelihood import log_likelihood, maximum_likelihood, network_log_prob
from ewc_lib.score import score, scores

D = torch.distributions
DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gauss(theta, x):
    return D.Normal(theta[0], theta[1].exp()).log_prob(x)


def gauss_by_name(theta, x):
    return D.Normal(theta["mu"], theta["log_sigma"].exp()).log_prob(x).sum()


def logistic(theta, observation):
    x, y = observation
    return D.Bernoulli(logits=theta @ x).log_prob(y)


def cases():
    reals = torch.randn(8, 2, generator=generator(), dtype=DOUBLE)
    names = {
        "mu": torch.tensor([0.3, 1.0], dtype=DOUBLE),
        "log_sigma": torch.tensor(-0.2, dtype=DOUBLE),
    }
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    log_prob, theta = network_log_prob(model)
    return {
        "vector": (gauss, torch.tensor([0.3, -0.2], dtype=DOUBLE), reals[:, 0]),
        "names": (gauss_by_name, names, reals),
        "tuple": (
            logistic,
            torch.tensor([0.3, -0.2], dtype=DOUBLE),
            (reals, (reals[:, 0] > 0).double()),
        ),
        "network": (log_prob, theta, (reals, torch.arange(8) % 3)),
    }


def pick(data, n):
    return tuple(t[n] for t in data) if isinstance(data, tuple) else data[n]


def autograd(function, theta):
    """Gradient of ``function`` by plain autograd, as one vector."""
    theta = torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), theta)
    leaves = torch.utils._pytree.tree_leaves(theta)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(function(theta), leaves)])


@pytest.mark.parametrize("name", cases())
@pytest.mark.claim("eq-score-observation")
def test_each_row_is_the_gradient_of_one_observation(name):
    log_prob, theta, data = cases()[name]
    expected = [autograd(lambda t, n=n: log_prob(t, pick(data, n)), theta) for n in range(8)]
    torch.testing.assert_close(scores(log_prob, theta, data), torch.stack(expected), **TIGHT)


@pytest.mark.parametrize("name", cases())
@pytest.mark.claim("eq-score")
def test_the_score_is_the_sum_of_rows_and_the_gradient_of_the_log_likelihood(name):
    log_prob, theta, data = cases()[name]
    found = score(log_prob, theta, data)
    torch.testing.assert_close(found, scores(log_prob, theta, data).sum(0), **TIGHT)
    expected = autograd(lambda t: log_likelihood(log_prob, t, data), theta)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_the_score_of_a_gaussian_has_its_closed_form():
    mu, log_sigma = 0.3, -0.2
    x = torch.randn(5, generator=generator(), dtype=DOUBLE)
    z = (x - mu) / math.exp(log_sigma)
    expected = torch.stack([z / math.exp(log_sigma), z.square() - 1], 1)
    found = scores(gauss, torch.tensor([mu, log_sigma], dtype=DOUBLE), x)
    torch.testing.assert_close(found, expected, **TIGHT)


def truths(n_sets, n):
    """Parameters and many data sets that follow the model, ``[S, n]``."""
    g, shape = generator(3), (n_sets, n)
    half = torch.full(shape, 0.3, dtype=DOUBLE)
    return {
        "Bernoulli": (
            lambda p, x: D.Bernoulli(p).log_prob(x),
            torch.tensor(0.3, dtype=DOUBLE),
            torch.bernoulli(half, generator=g),
        ),
        "Gaussian": (
            gauss,
            torch.tensor([2.0, 0.4], dtype=DOUBLE),
            2 + math.exp(0.4) * torch.randn(shape, generator=g, dtype=DOUBLE),
        ),
        "Poisson": (
            lambda rate, x: D.Poisson(rate).log_prob(x),
            torch.tensor(0.3, dtype=DOUBLE),
            torch.poisson(half, generator=g),
        ),
    }


@pytest.mark.parametrize("name", truths(1, 1))
def test_the_score_at_the_truth_is_zero_on_average_but_not_for_most_data_sets(name):
    n_sets, n = 2000, 10
    log_prob, theta, data = truths(n_sets, n)[name]
    per_set = scores(log_prob, theta, data.reshape(-1)).reshape(n_sets, n, -1).sum(1)
    z = per_set.mean(0) / per_set.std(0) * math.sqrt(n_sets)
    assert z.abs().max() < 4
    assert (per_set.abs() > 1e-3).any(1).double().mean() > 0.6
    shifted = scores(log_prob, theta + 0.1, data.reshape(-1)).reshape(n_sets, n, -1).sum(1)
    assert (shifted.mean(0) / shifted.std(0) * math.sqrt(n_sets)).abs().max() > 8


@pytest.mark.parametrize("name", truths(1, 1))
def test_the_score_at_the_maximum_is_zero(name):
    log_prob, theta, data = truths(1, 50)[name]
    fit = maximum_likelihood(log_prob, theta, data[0])
    assert score(log_prob, fit.estimate, data[0]).abs().max() < 1e-9
    assert score(log_prob, theta, data[0]).abs().max() > 1e-3
