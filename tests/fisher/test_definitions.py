"""The two definitions of the Fisher information against closed forms and against each other."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from ewc_lib.fisher import every_label, negative_expected_hessian, score_covariance
from ewc_lib.likelihood import maximum_likelihood, network_log_prob
from ewc_lib.likelihood.outputs import Bernoulli, Categorical, Gaussian, Poisson
from tests.scenarios import PROPERTY, SCENARIOS, same, trace_of

D = torch.distributions
DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
DEFINITIONS = [score_covariance, negative_expected_hessian]
either = pytest.mark.parametrize("definition", DEFINITIONS)


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def coin(p, x):
    return D.Bernoulli(p).log_prob(x)


def coin_by_logit(logit, x):
    return D.Bernoulli(logits=logit).log_prob(x)


def gauss(theta, x):
    return D.Normal(theta[0], theta[1].exp()).log_prob(x)


def poisson(rate, x):
    return D.Poisson(rate).log_prob(x)


def poisson_by_log(log_rate, x):
    return D.Poisson(log_rate.exp()).log_prob(x)


# Under the model, by exact weights


def expectation_for_gaussian(mu, sigma, order=8):
    """Nodes and weights of Gauss and Hermite: exact for polynomials up to degree 15."""
    off_diagonal = torch.arange(1, order, dtype=DOUBLE).sqrt()
    z, vectors = torch.linalg.eigh(off_diagonal.diag(1) + off_diagonal.diag(-1))
    return mu + sigma * z, vectors[0].square()


def expectation_for_poisson(rate):
    counts = torch.arange(60, dtype=DOUBLE)
    return counts, D.Poisson(tensor(rate)).log_prob(counts).exp()


@either
@given(p=st.floats(0.01, 0.99))
@PROPERTY
def test_of_a_coin(definition, p):
    outcomes, weights = tensor([0, 1]), tensor([1 - p, p])
    found = definition(coin, tensor(p), outcomes, weights)
    torch.testing.assert_close(found, tensor([[1 / (p * (1 - p))]]), **TIGHT)
    found = definition(coin_by_logit, tensor(p).logit(), outcomes, weights)
    torch.testing.assert_close(found, tensor([[p * (1 - p)]]), **TIGHT)


@either
@given(rate=st.floats(0.05, 8.0))
@PROPERTY
def test_of_a_count(definition, rate):
    expectation = expectation_for_poisson(rate)
    found = definition(poisson, tensor(rate), *expectation)
    torch.testing.assert_close(found, tensor([[1 / rate]]), **TIGHT)
    found = definition(poisson_by_log, tensor(rate).log(), *expectation)
    torch.testing.assert_close(found, tensor([[rate]]), **TIGHT)


@either
@given(mu=st.floats(-3, 3), log_sigma=st.floats(-1, 1))
@PROPERTY
def test_of_a_gaussian_with_both_parameters(definition, mu, log_sigma):
    expectation = expectation_for_gaussian(mu, math.exp(log_sigma))
    found = definition(gauss, tensor([mu, log_sigma]), *expectation)
    torch.testing.assert_close(found, tensor([math.exp(-2 * log_sigma), 2]).diag(), **TIGHT)


def softmax_regression(n=6, d=2, c=3):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(d, c).double()
    return model, torch.randn(n, d, generator=generator, dtype=DOUBLE)


@either
def test_of_softmax_regression(definition):
    model, x = softmax_regression()
    log_prob, theta = network_log_prob(model)
    found = definition(log_prob, theta, *every_label(model, x))
    p = model(x).softmax(1).detach()
    h = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    with_one = torch.cat([x, torch.ones(len(x), 1).to(x)], 1)
    full = torch.einsum("nab,ni,nj->aibj", h, with_one, with_one) / len(x)
    weight, bias = full[:, :2, :, :2].reshape(6, 6), full[:, 2, :, 2]
    cross = full[:, :2, :, 2].reshape(6, 3)
    expected = torch.cat([torch.cat([weight, cross], 1), torch.cat([cross.mT, bias], 1)])
    torch.testing.assert_close(found, expected, **TIGHT)


LINEAR = {
    Bernoulli(): lambda f: f.sigmoid() * (1 - f.sigmoid()),
    Gaussian(sigma=0.5): lambda f: torch.full_like(f, 4.0),
    Poisson(): lambda f: f.exp(),
}


@either
@pytest.mark.parametrize("likelihood", LINEAR, ids=str)
def test_of_generalised_linear_models(definition, likelihood):
    model, x = softmax_regression(c=1)
    log_prob, theta = network_log_prob(model, likelihood)
    found = definition(log_prob, theta, *every_label(model, x, likelihood))
    h = LINEAR[likelihood](model(x).detach())
    with_one = torch.cat([x, torch.ones(len(x), 1).to(x)], 1)
    torch.testing.assert_close(found, with_one.mT @ (h * with_one) / len(x), **TIGHT)


# The two definitions agree under the model, and only there


@pytest.mark.parametrize("name", ["mlp_categorical", "mlp_bernoulli", "tied_weights", "embedding"])
def test_the_expected_hessian_of_a_deep_network_has_a_second_term_that_vanishes(name):
    model, x, likelihood, _ = SCENARIOS[name]()
    log_prob, theta = network_log_prob(model, likelihood)
    one, two = (f(log_prob, theta, *every_label(model, x, likelihood)) for f in DEFINITIONS)
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, two, **TIGHT)


@pytest.mark.claim("eq-fisher-covariance-sample", "eq-fisher-hessian-sample")
def test_they_differ_with_observed_data_from_another_model():
    one, two = (f(coin_by_logit, tensor(0.2).logit(), tensor([1, 1, 1, 0])) for f in DEFINITIONS)
    torch.testing.assert_close(one, tensor([[0.75 * 0.8**2 + 0.25 * 0.2**2]]), **TIGHT)
    torch.testing.assert_close(two, tensor([[0.2 * 0.8]]), **TIGHT)
    one, two = (f(gauss, tensor([0, 0]), tensor([3, 5])) for f in DEFINITIONS)
    torch.testing.assert_close(one, tensor([[17, 72], [72, 320]]), **TIGHT)
    torch.testing.assert_close(two, tensor([[1, 8], [8, 34]]), **TIGHT)


def test_the_observed_information_need_not_be_positive():
    found = negative_expected_hessian(
        lambda mu, x: D.StudentT(tensor(3.0), mu).log_prob(x), tensor(0.0), tensor([4.0, -4.0])
    )
    assert found.item() < 0


def test_the_observed_information_gives_the_standard_errors_of_the_maximum():
    data = torch.randn(30, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    fit = maximum_likelihood(gauss, tensor([0.0, 0.0]), data)
    information = len(data) * negative_expected_hessian(gauss, fit.estimate, data)
    expected = information.inverse().diagonal().sqrt()
    torch.testing.assert_close(fit.standard_errors, expected, **TIGHT)


def test_data_from_the_model_give_the_same_information_on_average():
    n = 4000
    data = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    one, two = (f(gauss, tensor([0.0, 0.0]), data) for f in DEFINITIONS)
    assert (one - two).abs().max() < 10 / math.sqrt(n)
    assert not torch.equal(one, two)


# Weights


@either
def test_equal_weights_are_the_default_and_weights_repeat_observations(definition):
    data, theta = tensor([1.0, 3.0, 0.5]), tensor([0.4, 0.1])
    thirds = definition(gauss, theta, data, tensor([1, 1, 1]) / 3)
    torch.testing.assert_close(definition(gauss, theta, data), thirds, **TIGHT)
    repeated = definition(gauss, theta, data[[0, 0, 1, 2, 2, 2]])
    weighted = definition(gauss, theta, data, tensor([2, 1, 3]) / 6)
    torch.testing.assert_close(repeated, weighted, **TIGHT)


@either
def test_parameters_by_name_are_ordered_as_the_dict(definition):
    data = tensor([1.0, 3.0])

    def by_name(theta, x):
        return gauss(torch.stack([theta["mu"], theta["log_sigma"]]), x)

    expected = definition(gauss, tensor([0.4, 0.1]), data)
    found = definition(by_name, {"mu": tensor(0.4), "log_sigma": tensor(0.1)}, data)
    torch.testing.assert_close(found, expected, **TIGHT)
    flipped = definition(by_name, {"log_sigma": tensor(0.1), "mu": tensor(0.4)}, data)
    torch.testing.assert_close(flipped, expected.flip(0, 1), **TIGHT)


@either
@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), ()])
def test_weights_of_another_shape_are_refused(definition, shape):
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\), got \("):
        definition(coin, tensor(0.5), tensor([0, 1, 1]), torch.ones(shape))


# Every label


@pytest.mark.parametrize("name", ["mlp_categorical", "sequence_of_labels"])
def test_every_input_is_paired_with_every_label_and_its_probability(name):
    model, x, likelihood, y = SCENARIOS[name]()
    (inputs, labels), weights = every_label(model, x, likelihood)
    n, k = len(x), 3 ** y[0].numel()
    assert len(inputs) == len(labels) == len(weights) == n * k
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    log_p = Categorical().log_prob(model(inputs), labels)
    torch.testing.assert_close(weights, log_p.exp().detach() / n, **TIGHT)
    pairs = {
        (tuple(a.flatten().tolist()), tuple(b.flatten().tolist()))
        for a, b in zip(inputs, labels, strict=True)
    }
    assert len(pairs) == n * k


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(sigma=0.5), Poisson()], ids=str)
def test_labels_of_several_outputs_have_the_mean_and_variance_of_the_model(likelihood):
    model, x = softmax_regression(n=4, c=2)
    (inputs, labels), weights = every_label(model, x, likelihood)
    assert len(labels) == 4 * 2**2
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    for n in range(4):
        mine = (inputs == x[n]).all(1)
        w, y = 4 * weights[mine].unsqueeze(1), labels[mine]
        values, probabilities = likelihood.outcomes(model(x[n : n + 1]).detach())
        mean = (probabilities * values).sum(0)[0]
        variance = (probabilities * (values - mean).square()).sum(0)[0]
        torch.testing.assert_close((w * y).sum(0), mean, **TIGHT)
        deviation = y - mean
        covariance = deviation.mT @ (w * deviation)
        torch.testing.assert_close(covariance, variance.diag(), **TIGHT)


def test_several_and_named_inputs_are_repeated_together():
    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    model, x = Sum(2, 2).double(), torch.arange(6.0).double().reshape(3, 2)
    (inputs, labels), _ = every_label(model, {"a": x, "b": 10 * x})
    assert same(inputs["b"], 10 * inputs["a"])
    assert same(inputs["a"], x.repeat(2, 1))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_impossible_labels_have_no_weight_and_do_no_harm():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, True, False]), -math.inf)

    model, x = Masked(2, 3).double(), softmax_regression()[1]
    data, weights = every_label(model, x)
    assert weights[data[1] == 1].sum() == 0
    log_prob, theta = network_log_prob(model)
    one, two = (f(log_prob, theta, data, weights) for f in DEFINITIONS)
    assert one.isfinite().all()
    torch.testing.assert_close(one, two, **TIGHT)


def test_the_model_is_run_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[1].eval()
    x = torch.randn(3, 2)
    before = trace_of(model)
    _, weights = every_label(model, x)
    assert same(trace_of(model), before)
    expected = model.eval()(x).softmax(1).detach().mT.reshape(-1) / 3
    torch.testing.assert_close(weights, expected)
