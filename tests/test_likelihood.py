"""What a model says about data, and the parameters that say it best."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.distributions import Distribution

from ewc_lib.fisher.definitions import negative_expected_hessian, score_covariance
from ewc_lib.likelihood import (
    MLE,
    likelihood,
    log_likelihood,
    maximum_likelihood,
    network_log_prob,
)
from ewc_lib.likelihood.definition import log_probs
from ewc_lib.likelihood.outputs import Gaussian
from ewc_lib.score import score, scores
from tests.scenarios import PROPERTY, same, trace_of

D = torch.distributions
DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def random_normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def coin(p, x):
    return D.Bernoulli(p).log_prob(x)


def coin_by_logit(logit, x):
    return D.Bernoulli(logits=logit).log_prob(x)


def gauss(theta, x):
    return D.Normal(theta[0], theta[1].exp()).log_prob(x)


def gauss_by_sigma(theta, x):
    return D.Normal(theta[0], theta[1]).log_prob(x)


def poisson(log_rate, x):
    return D.Poisson(log_rate.exp()).log_prob(x)


def logistic(theta, observation):
    x, y = observation
    return D.Bernoulli(logits=theta[0] + theta[1:] @ x).log_prob(y)


def softmax_regression(theta, observation):
    """Logits of the first class are zero, so that the parameters are unique."""
    x, y = observation
    logits = torch.cat([x.new_zeros(1), theta["weight"] @ x + theta["bias"]])
    return D.Categorical(logits=logits).log_prob(y)


FLIPS = tensor([1, 0, 1, 1, 0, 1, 1])
COUNTS = tensor([3, 0, 2, 5, 1, 2])
ONES = torch.ones(20, dtype=DOUBLE)
REALS = 2.5 * random_normal(40) + 7


# The likelihood and its logarithm


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), st.floats(0.05, 0.95))
@PROPERTY
@pytest.mark.claim("eq-likelihood")
def test_the_likelihood_is_the_product_over_observations(flips, p):
    heads = int(sum(flips))
    expected = p**heads * (1 - p) ** (len(flips) - heads)
    found = likelihood(coin, tensor(p), tensor(flips))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("log_prob", "theta", "data"),
    [
        (coin, tensor(0.3), FLIPS),
        (gauss, tensor([6.0, 1.0]), REALS),
        (poisson, tensor(0.4), COUNTS),
        (logistic, tensor([0.1, 0.5, -1.0]), (random_normal(7, 2), FLIPS)),
    ],
)
@pytest.mark.claim("eq-log-likelihood")
def test_the_log_likelihood_is_its_logarithm_and_the_sum_of_terms(log_prob, theta, data):
    total = log_likelihood(log_prob, theta, data)
    torch.testing.assert_close(total, likelihood(log_prob, theta, data).log(), **TIGHT)
    rows = zip(*data, strict=True) if isinstance(data, tuple) else data
    one_by_one = [log_prob(theta, row) for row in rows]
    torch.testing.assert_close(total, sum(one_by_one), **TIGHT)
    torch.testing.assert_close(log_probs(log_prob, theta, data), torch.stack(one_by_one), **TIGHT)


@pytest.mark.parametrize(
    ("dtype", "fits", "underflows"), [(torch.float32, 149, 160), (DOUBLE, 1074, 1090)]
)
def test_the_product_underflows_where_the_sum_does_not(dtype, fits, underflows):
    half = torch.tensor(0.5, dtype=dtype)
    assert likelihood(coin, half, torch.ones(fits, dtype=dtype)) > 0
    many = torch.ones(underflows, dtype=dtype)
    assert likelihood(coin, half, many) == 0
    found = log_likelihood(coin, half, many).item()
    assert found == pytest.approx(-underflows * math.log(2), rel=1e-6)


def test_the_log_likelihood_is_differentiable():
    p = tensor(0.3).requires_grad_()
    log_likelihood(coin, p, FLIPS).backward()
    assert p.grad.item() == pytest.approx(5 / 0.3 - 2 / 0.7, rel=1e-12)


# Functions that vmap cannot follow: each counts an observation above 9 twice


def doubled(theta, x):
    return gauss(theta, x) * torch.where(x > 9, 2.0, 1.0)


def by_item(theta, x):
    return gauss(theta, x) * (2 if x.item() > 9 else 1)


def by_branch(theta, x):
    return 2 * gauss(theta, x) if x > 9 else gauss(theta, x)


def by_branch_on_theta(theta, x):
    return 2 * gauss(theta, x) if x > theta[0] + 3 else gauss(theta, x)


def by_shape(theta, x):
    return gauss(theta, x) * (1 + len(x[x > 9]))


def by_validation(theta, x):
    D.Normal(theta[0], 1.0, validate_args=True)
    return doubled(theta, x)


@pytest.mark.parametrize(
    "log_prob", [by_item, by_branch, by_branch_on_theta, by_shape, by_validation]
)
def test_functions_that_vmap_cannot_follow_give_the_same_results(log_prob):
    theta, data = tensor([6.0, 0.5]), REALS[:10]
    assert 0 < (data > 9).sum() < 10
    for function in (likelihood, log_likelihood, scores, score, negative_expected_hessian):
        torch.testing.assert_close(
            function(log_prob, theta, data), function(doubled, theta, data), **TIGHT
        )


def test_functions_that_vmap_can_follow_are_not_called_once_for_each_observation():
    calls = []

    def counted(theta, x):
        calls.append(x)
        return gauss(theta, x)

    scores(counted, tensor([6.0, 0.5]), REALS)
    assert len(calls) <= 2


@pytest.fixture(params=[True, False], ids=["validating", "not_validating"])
def either_switch(request):
    """Leave the validation of torch on, or off, as torch.compile leaves it."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(request.param)
    yield
    Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("either_switch")
def test_the_search_is_the_same_for_functions_that_vmap_cannot_follow():
    def looped(p, x):
        x.item()
        return coin(p, x)

    start = tensor(0.1)
    found, expected = (maximum_likelihood(f, start, FLIPS) for f in (looped, coin))
    torch.testing.assert_close(found.estimate, expected.estimate, **TIGHT)
    assert found.converged
    with pytest.warns(RuntimeWarning, match="left the domain"):
        assert not maximum_likelihood(looped, start, ONES[:5]).converged


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("log_prob", [coin, lambda p, x: coin(p, x) * x.item()])
def test_the_validation_switch_of_torch_is_left_as_it_was(flag, log_prob):
    before = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(flag)
        log_likelihood(log_prob, tensor(0.5), FLIPS)
        assert Distribution._validate_args == flag
        maximum_likelihood(coin_by_logit, tensor(0.5), FLIPS)
        assert Distribution._validate_args == flag
    finally:
        Distribution.set_default_validate_args(before)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, ZeroDivisionError])
def test_the_validation_switch_is_restored_after_an_error(error):
    calls = []

    def fails_later(p, x):
        calls.append(x)
        if len(calls) > 1:
            raise error("mine")
        return coin(p, x)

    before = Distribution._validate_args
    with pytest.raises(error, match="mine"):
        log_likelihood(fails_later, tensor(0.5), FLIPS)
    assert Distribution._validate_args == before


# Bad input


EVERY_FUNCTION = [
    likelihood,
    log_likelihood,
    scores,
    score,
    maximum_likelihood,
    score_covariance,
    negative_expected_hessian,
]


@pytest.mark.parametrize("function", EVERY_FUNCTION)
@pytest.mark.parametrize(
    ("log_prob", "data", "message"),
    [
        (coin, torch.zeros(0), "data is empty"),
        (logistic, (torch.zeros(3, 2), torch.zeros(2)), r"different lengths: \[3, 2\]"),
        (lambda p, x: p * x, torch.zeros(3, 2), r"must return a scalar .* got \(2,\)"),
        (lambda p, x: (p * x).reshape(1), torch.zeros(3), r"must return a scalar .* got \(1,\)"),
        (lambda p, x: 1.0, torch.zeros(3), "must return a scalar .* got float"),
        (coin, torch.tensor(1.0), "0-d tensor"),
    ],
)
def test_bad_input_is_refused_by_every_function(function, log_prob, data, message):
    with pytest.raises(ValueError, match=message):
        function(log_prob, torch.tensor(0.5), data)


@pytest.mark.usefixtures("either_switch")
def test_a_start_outside_the_domain_is_refused():
    with pytest.raises(ValueError, match="not finite at theta0"):
        maximum_likelihood(lambda t, x: t.log() * x, tensor(-1.0), FLIPS)
    with pytest.raises(ValueError, match="probs"):
        maximum_likelihood(coin, tensor(1.5), FLIPS)


# Maximum likelihood: closed forms


def closed_forms():
    n, p = len(FLIPS), FLIPS.mean()
    mean, sigma, m = REALS.mean(), REALS.std(correction=0), len(REALS)
    rate, k = COUNTS.mean(), len(COUNTS)
    error = sigma / math.sqrt(m)
    share = torch.tensor(1 / math.sqrt(2 * m), dtype=DOUBLE)
    return {
        "coin": (coin, tensor(0.4), FLIPS, p, (p * (1 - p) / n).sqrt()),
        "coin by its logit": (
            coin_by_logit,
            tensor(0.0),
            FLIPS,
            p.logit(),
            (n * p * (1 - p)).rsqrt(),
        ),
        "Gaussian by the logarithm of sigma": (
            gauss,
            tensor([0.0, 0.0]),
            REALS,
            torch.stack([mean, sigma.log()]),
            torch.stack([error, share]),
        ),
        "Gaussian by sigma": (
            gauss_by_sigma,
            tensor([0.0, 1.0]),
            REALS,
            torch.stack([mean, sigma]),
            torch.stack([error, sigma * share]),
        ),
        "Poisson by the logarithm of the rate": (
            poisson,
            tensor(0.0),
            COUNTS,
            rate.log(),
            (k * rate).rsqrt(),
        ),
        "Poisson by the rate": (
            lambda rate, x: D.Poisson(rate).log_prob(x),
            tensor(1.0),
            COUNTS,
            rate,
            (rate / k).sqrt(),
        ),
    }


@pytest.mark.parametrize("name", closed_forms())
@pytest.mark.claim("thm-standard-errors")
def test_the_maximum_and_its_standard_errors_match_the_closed_form(name):
    log_prob, start, data, estimate, errors = closed_forms()[name]
    fit = maximum_likelihood(log_prob, start, data)
    assert isinstance(fit, MLE)
    assert fit.converged
    assert fit.message == "found a maximum"
    assert 0 < fit.iterations < 100
    torch.testing.assert_close(fit.estimate, estimate, **TIGHT)
    torch.testing.assert_close(fit.standard_errors, errors, **TIGHT)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("seed", range(5))
def test_a_line_search_that_leaves_the_domain_steps_back(scale, seed):
    data = scale * random_normal(30, seed=seed) + 5 * random_normal(1, seed=seed + 100)
    fit = maximum_likelihood(gauss_by_sigma, tensor([0.0, 1.0]), data)
    expected = torch.stack([data.mean(), data.std(correction=0)])
    assert fit.converged
    torch.testing.assert_close(fit.estimate, expected, rtol=1e-8, atol=1e-8)


def test_single_precision_is_kept_and_good_to_its_last_digits():
    fit = maximum_likelihood(coin_by_logit, torch.tensor(0.0), FLIPS.float())
    assert fit.converged
    assert fit.estimate.dtype == torch.float32
    torch.testing.assert_close(fit.estimate, FLIPS.mean().logit().float())


def test_the_start_is_not_changed_and_needs_no_gradient():
    start = tensor([0.0, 0.0]).requires_grad_()
    fit = maximum_likelihood(gauss, start, REALS)
    assert start.tolist() == [0, 0]
    assert start.grad is None
    assert not fit.estimate.requires_grad
    with torch.no_grad():
        assert same(maximum_likelihood(gauss, start, REALS).estimate, fit.estimate)


# Maximum likelihood: regressions


def classes(n=60, seed=0):
    x = random_normal(n, 2, seed=seed)
    noise = random_normal(n, 3, seed=seed + 1)
    logits = torch.stack([0 * x[:, 0], x[:, 0], x[:, 1] - 0.5], 1)
    return x, (logits + 2 * noise).argmax(1)


def newton_for_softmax_regression(x, y, steps=30):
    """Parameters of all but the first class, by the textbook gradient and Hessian."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    k = int(y.max())
    beta = torch.zeros(k, x.shape[1], dtype=x.dtype)
    onehot = F.one_hot(y)[:, 1:].to(x)
    for _ in range(steps):
        p = torch.cat([torch.zeros(len(x), 1).to(x), x @ beta.mT], 1).softmax(1)[:, 1:]
        gradient = ((onehot - p).mT @ x).reshape(-1)
        h = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        hessian = torch.einsum("nab,ni,nj->aibj", h, x, x).reshape(len(gradient), -1)
        beta = beta + torch.linalg.solve(hessian, gradient).reshape(beta.shape)
    return beta, hessian


def test_softmax_regression_agrees_with_an_independent_newton_iteration():
    data = classes()
    start = {"weight": torch.zeros(2, 2, dtype=DOUBLE), "bias": torch.zeros(2, dtype=DOUBLE)}
    fit = maximum_likelihood(softmax_regression, start, data)
    beta, hessian = newton_for_softmax_regression(*data)
    errors = hessian.inverse().diagonal().sqrt().reshape(beta.shape)
    assert fit.converged
    torch.testing.assert_close(fit.estimate["weight"], beta[:, :2], **TIGHT)
    torch.testing.assert_close(fit.estimate["bias"], beta[:, 2], **TIGHT)
    torch.testing.assert_close(fit.standard_errors["weight"], errors[:, :2], **TIGHT)
    torch.testing.assert_close(fit.standard_errors["bias"], errors[:, 2], **TIGHT)
    assert score(softmax_regression, fit.estimate, data).abs().max() < 1e-10


def test_one_class_too_many_is_reported_and_leaves_the_probabilities_right():
    x, y = classes()
    model = nn.Linear(2, 3).double()
    log_prob, theta = network_log_prob(model)
    with pytest.warns(RuntimeWarning, match="not unique"):
        fit = maximum_likelihood(log_prob, theta, (x, y))
    assert fit.converged
    assert "not unique" in fit.message
    assert all(error.isinf().all() for error in fit.standard_errors.values())
    beta, _ = newton_for_softmax_regression(x, y)
    weight = fit.estimate["weight"] - fit.estimate["weight"][0]
    bias = fit.estimate["bias"] - fit.estimate["bias"][0]
    torch.testing.assert_close(weight[1:], beta[:, :2], **TIGHT)
    torch.testing.assert_close(bias[1:], beta[:, 2], **TIGHT)


def test_only_the_parameters_that_the_data_say_nothing_about_have_infinite_errors():
    def wasteful(theta, x):
        return D.Normal(theta[0] + theta[1], theta[2].exp()).log_prob(x)

    with pytest.warns(RuntimeWarning, match="not unique"):
        fit = maximum_likelihood(wasteful, tensor([0.0, 0.0, 0.0]), REALS)
    assert fit.converged
    assert fit.standard_errors[:2].isinf().all()
    assert fit.standard_errors[2].item() == pytest.approx(1 / math.sqrt(2 * len(REALS)))
    assert fit.estimate[:2].sum().item() == pytest.approx(REALS.mean().item(), rel=1e-10)


def test_a_curved_set_of_maxima_is_a_maximum_that_is_not_unique():
    def product(theta, x):
        return D.Normal(theta[0] * theta[1], 1.0).log_prob(x)

    with pytest.warns(RuntimeWarning, match="not unique"):
        fit = maximum_likelihood(product, tensor([1.0, 3.0]), REALS)
    assert fit.converged
    assert fit.estimate.prod().item() == pytest.approx(REALS.mean().item(), rel=1e-10)


# Maximum likelihood: where there is none


def separable(scale=1.0):
    x = scale * torch.linspace(-1, 1, 20, dtype=DOUBLE).unsqueeze(1)
    return x, (x[:, 0] > 0).double()


def separable_in_one_direction(scale=1.0):
    """Both classes occur at 0, only one at ``scale``: only the intercept has a maximum."""
    x = scale * tensor([0, 0, 0, 0, 1, 1, 1]).unsqueeze(1)
    return x, tensor([0, 1, 1, 0, 1, 1, 1])


WITHOUT_MAXIMUM = {
    "coin that always shows heads": (coin, tensor(0.5), ONES),
    "the same by its logit": (coin_by_logit, tensor(0.0), ONES),
    "the same from the wrong side": (coin_by_logit, tensor(-800.0), ONES),
    "counts that are all zero": (poisson, tensor(0.0), torch.zeros(5, dtype=DOUBLE)),
    "one repeated value": (gauss, tensor([0.0, 0.0]), 3 * ONES),
    "a single value": (gauss, tensor([0.0, 0.0]), 3 * ONES[:1]),
    "a straight line in one parameter": (
        lambda t, x: t[1] - (t[0] - x).square(),
        tensor([0.0, 0.0]),
        REALS,
    ),
    "one repeated value by sigma": (gauss_by_sigma, tensor([1.0, 1.0]), 3 * ONES),
    **{
        f"separable data, inputs times {scale:g}": (logistic, tensor([0.0, 0.0]), separable(scale))
        for scale in (1.0, 1e2, 1e3, 1e5)
    },
    **{
        f"partly separable data, inputs times {scale:g}": (
            logistic,
            tensor([0.0, 0.0]),
            separable_in_one_direction(scale),
        )
        for scale in (1.0, 1e2, 1e4)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", WITHOUT_MAXIMUM)
def test_data_without_a_maximum_give_a_warning_and_no_number(name, dtype):
    log_prob, start, data = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype), WITHOUT_MAXIMUM[name]
    )
    with pytest.warns(RuntimeWarning, match="no maximum|not finite") as caught:
        fit = maximum_likelihood(log_prob, start, data, max_iter=100)
    assert len(caught) == 1
    assert str(caught[0].message) == fit.message
    assert caught[0].filename == __file__
    assert not fit.converged
    assert fit.estimate.isnan().all()
    assert fit.standard_errors.isnan().all()


def test_a_likelihood_that_rises_in_a_straight_line_is_not_mistaken_for_a_flat_one():
    with pytest.warns(RuntimeWarning, match="keeps rising"):
        fit = maximum_likelihood(
            lambda t, x: t[1] - (t[0] - x).square(), tensor([0.0, 0.0]), REALS, max_iter=500
        )
    assert not fit.converged


def test_separable_data_are_recognised_as_such():
    with pytest.warns(RuntimeWarning, match="keeps rising while theta grows .* separable"):
        maximum_likelihood(logistic, tensor([0.0, 0.0]), separable())


def test_a_model_that_does_not_use_its_parameters_has_no_unique_maximum():
    with pytest.warns(RuntimeWarning, match="not unique"):
        fit = maximum_likelihood(lambda t, x: -x.square() + 0 * t, tensor(0.5), REALS)
    assert fit.standard_errors.isinf()


@pytest.mark.parametrize("max_iter", [1, 3])
def test_a_search_cut_short_says_so_and_returns_where_it_was(max_iter):
    with pytest.warns(RuntimeWarning, match=f"the limit of {max_iter} iterations"):
        fit = maximum_likelihood(gauss, tensor([0.0, 0.0]), REALS, max_iter=max_iter)
    assert not fit.converged
    assert fit.iterations == max_iter
    assert fit.estimate.isfinite().all()
    assert fit.standard_errors.isnan().all()
    before, after = (log_likelihood(gauss, t, REALS) for t in (tensor([0.0, 0.0]), fit.estimate))
    assert after > before


# Networks


def labels(output, likelihood, n=6):
    generator = torch.Generator().manual_seed(1)
    if likelihood == "categorical":
        return torch.randint(output.shape[-1], (n,), generator=generator)
    if isinstance(likelihood, Gaussian):
        return torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.randint(2, output.shape, generator=generator).to(output)


LOSSES = {
    "categorical": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "bernoulli": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    Gaussian(sigma=0.5): lambda f, y: (
        F.mse_loss(f, y, reduction="sum") / (2 * 0.25)
        + y.numel() * math.log(0.5 * math.sqrt(2 * math.pi))
    ),
    "poisson": lambda f, y: F.poisson_nll_loss(f, y, reduction="sum") + torch.lgamma(y + 1).sum(),
}


@pytest.mark.parametrize("likelihood", LOSSES, ids=str)
def test_the_log_likelihood_of_a_network_is_minus_its_training_loss(likelihood):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = random_normal(6, 2)
    y = labels(model(x), likelihood)
    log_prob, theta = network_log_prob(model, likelihood)
    loss = LOSSES[likelihood](model(x), y)
    torch.testing.assert_close(log_likelihood(log_prob, theta, (x, y)), -loss, **TIGHT)
    expected = torch.autograd.grad(-loss, list(model.parameters()))
    found = score(log_prob, theta, (x, y))
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]), **TIGHT)


def test_the_parameters_of_a_network_are_a_copy_of_the_trainable_ones():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    _, theta = network_log_prob(model)
    assert list(theta) == ["1.weight", "1.bias"]
    assert same(theta["1.weight"], model[1].weight.detach())
    theta["1.weight"].zero_()
    assert model[1].weight.any()


def test_frozen_parameters_keep_the_values_of_the_network():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    model[0].requires_grad_(False)
    x, y = random_normal(4, 2), torch.tensor([0, 1, 1, 0])
    log_prob, theta = network_log_prob(model)
    other = {name: value + 1 for name, value in theta.items()}
    h = model[0](x)
    expected = -F.cross_entropy(F.linear(h, other["1.weight"], other["1.bias"]), y, reduction="sum")
    torch.testing.assert_close(log_likelihood(log_prob, other, (x, y)), expected, **TIGHT)


def test_a_network_is_run_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model.train()
    model[1].eval()
    x, y = torch.randn(5, 2), torch.randint(2, (5,))
    log_prob, theta = network_log_prob(model)
    before = trace_of(model)
    found = log_likelihood(log_prob, theta, (x, y))
    scores(log_prob, theta, (x, y))
    assert same(trace_of(model), before)
    expected = -F.cross_entropy(model.eval()(x), y, reduction="sum")
    torch.testing.assert_close(found, expected)


def test_tied_weights_are_one_parameter_with_the_gradient_of_both_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    model = Tied().double()
    x, y = torch.tensor([0, 3, 4]), torch.tensor([1, 3, 0])
    log_prob, theta = network_log_prob(model)
    assert list(theta) == ["table.weight"]
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (expected,) = torch.autograd.grad(-loss, [model.table.weight])
    found = score(log_prob, theta, (x, y))
    torch.testing.assert_close(found.reshape(5, 3), expected, **TIGHT)


def test_several_and_named_inputs_and_sequences_of_labels():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    model = Sum().double()
    a, b = random_normal(4, 5, 2), random_normal(4, 5, 2, seed=1)
    y = torch.randint(3, (4, 5))
    y[0, 2:] = -100
    log_prob, theta = network_log_prob(model)
    expected = -F.cross_entropy(model(a, b).mT, y, reduction="sum")
    for inputs in ((a, b), {"b": b, "a": a}):
        torch.testing.assert_close(log_likelihood(log_prob, theta, (inputs, y)), expected, **TIGHT)


def test_a_network_without_trainable_parameters_or_with_an_unknown_likelihood_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        network_log_prob(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="likelihood must be one of"):
        network_log_prob(nn.Linear(2, 2), "softmax")


def test_a_label_out_of_range_is_an_error_for_a_network():
    log_prob, theta = network_log_prob(nn.Linear(2, 3))
    with pytest.raises((RuntimeError, IndexError), match="index 3 is out of bounds"):
        log_likelihood(log_prob, theta, (torch.zeros(4, 2), torch.tensor([0, 1, 3, 0])))
