"""Any distribution of PyTorch as the distribution of a target."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.distributions import Normal

from ewc_lib import fisher_information
from ewc_lib.likelihood import Categorical, TorchDistribution
from ewc_lib.likelihood.outputs import output_distribution
from tests.likelihood.families import FAMILIES, WITHOUT_ROOT
from tests.scenarios import PROPERTY, same

D = torch.distributions
ALL = FAMILIES | WITHOUT_ROOT
each = pytest.mark.parametrize("name", ALL)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_output(n=7, seed=0):
    return torch.randn(n, 6, generator=generator(seed), dtype=torch.float64)


@each
def test_log_prob_is_the_sum_over_the_target_of_one_observation(name):
    distribution, output = TorchDistribution(ALL[name]), some_output()
    target = distribution.sample(output, generator())
    distribution.check(output, target)
    expected = [
        ALL[name](f).log_prob(y).sum()
        for f, y in zip(output.split(1), target.split(1), strict=True)
    ]
    torch.testing.assert_close(distribution.log_prob(output, target), torch.stack(expected))


@each
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
@PROPERTY
def test_samples_do_not_depend_on_how_the_batch_is_cut(name, sizes, seed):
    distribution, output = TorchDistribution(ALL[name]), some_output(sum(sizes), seed)
    at_once = distribution.sample(output, generator(seed))
    source = generator(seed)
    pieces = [distribution.sample(part, source) for part in output.split(sizes)]
    assert same(torch.cat(pieces), at_once)


@each
def test_samples_come_from_the_generator_alone(name):
    distribution, output = TorchDistribution(ALL[name]), some_output(30)
    before = torch.get_rng_state()
    first = distribution.sample(output, generator(1))
    assert same(torch.get_rng_state(), before)
    assert same(distribution.sample(output, generator(1)), first)
    assert not same(distribution.sample(output, generator(2)), first)


def test_samples_follow_the_distribution():
    n = 20_000
    output = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(n, 2)
    drawn = TorchDistribution(lambda f: D.Normal(f[:, 0], f[:, 1].exp())).sample(output)
    z = (drawn - 0.3) / torch.tensor(-0.2).exp()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / n) ** 0.5


def test_a_function_is_a_likelihood():
    make = FAMILIES["gamma"]
    assert output_distribution(make) == TorchDistribution(make)


def test_a_class_is_none():
    with pytest.raises(ValueError, match=r"a function from the output .* got the class"):
        output_distribution(Categorical)


def test_outcomes_are_the_support_where_it_is_finite():
    distribution, output = TorchDistribution(FAMILIES["categorical"]), some_output()
    values, p = distribution.outcomes(output)
    expected_values, expected = Categorical().outcomes(output)
    assert same(values, expected_values)
    torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("name", ["normal", "one-hot categorical"])
def test_outcomes_that_cannot_be_listed_are_refused(name):
    with pytest.raises(TypeError, match=r"the values of a .* cannot be listed"):
        TorchDistribution(FAMILIES[name]).outcomes(some_output())


def test_a_target_outside_the_support_is_named_by_its_observation():
    target = torch.ones(7, 6, dtype=torch.float64)
    target[4, 1] = 2
    with pytest.raises(ValueError, match=r"observation 14: .* within the support"):
        TorchDistribution(FAMILIES["bernoulli"]).check(some_output(), target, first=10)


def test_an_output_without_a_distribution_is_named_by_its_observation():
    output = some_output().abs()
    output[3, 5] = -1
    with pytest.raises(ValueError, match=r"(?s)observation 3: .*to satisfy the constraint"):
        TorchDistribution(lambda f: D.Normal(f[:, :3], f[:, 3:])).check(output, output[:, :3])


def test_a_target_without_a_density_is_named_where_nothing_is_validated():
    make = lambda f: D.Exponential(f.exp(), validate_args=False)  # noqa: E731
    target = torch.ones(7, 6, dtype=torch.float64)
    target[2] = torch.nan
    with pytest.raises(ValueError, match=r"observation 2: .* no finite log-probability"):
        TorchDistribution(make).check(some_output(), target)


def test_a_target_that_would_be_broadcast_is_refused():
    make = FAMILIES["normal without a component"]
    with pytest.raises(ValueError, match=r"target of shape \(1, 1\) .* is \(1,\)"):
        TorchDistribution(make).check(some_output(), torch.zeros(7, 1))


def test_a_function_that_needs_the_whole_batch_is_refused():
    make = lambda f: D.Normal(f[:, 0], f[:, 1].exp() - (len(f) > 1) * 100)  # noqa: E731
    with pytest.raises(ValueError, match="mixes observations"):
        TorchDistribution(make).check(some_output(), torch.zeros(7))


def test_a_function_that_returns_no_distribution_is_refused():
    with pytest.raises(TypeError, match=r"must return a distribution .* got Tensor"):
        TorchDistribution(lambda f: f).log_prob(some_output(), some_output())


def test_targets_are_checked_though_validation_is_switched_off():
    """As ``torch.compile`` does for the whole process."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(False)
    try:
        with pytest.raises(ValueError, match="observation 0"):
            TorchDistribution(FAMILIES["bernoulli"]).check(some_output(), some_output())
        assert not D.Distribution._validate_args
    finally:
        D.Distribution.set_default_validate_args(before)


def test_half_precision_is_computed_in_single():
    output = some_output().bfloat16()
    distribution = TorchDistribution(FAMILIES["normal"])
    target = distribution.sample(output, generator())
    assert distribution.log_prob(output, target).dtype == target.dtype == torch.float32


@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
def test_a_function_that_mixes_observations_is_refused(kind):
    torch.manual_seed(0)
    model, x, y = (
        torch.nn.Linear(2, 2).double(),
        torch.randn(6, 2).double(),
        torch.randn(6).double(),
    )

    def centred(f):
        return Normal(f[:, 0] - f[:, 0].mean(0), f[:, 1].exp())

    with pytest.raises(ValueError, match="mixes observations"):
        fisher_information(model, (x, y), centred, kind=kind)
