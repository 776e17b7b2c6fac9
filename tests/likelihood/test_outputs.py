"""What an output says about a target: probabilities, samples, and what is refused."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from ewc_lib.likelihood import categorical
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    OutputDistribution,
    Poisson,
    output_distribution,
)
from tests.scenarios import PROPERTY, same

D = torch.distributions
DOUBLE = torch.float64
INF = math.inf

REFERENCE = {
    Categorical(): lambda f: D.Categorical(logits=f),
    Bernoulli(): lambda f: D.Bernoulli(logits=f),
    Gaussian(): lambda f: D.Normal(f, 1.0),
    Gaussian(sigma=0.3): lambda f: D.Normal(f, torch.tensor(0.3, dtype=f.dtype)),
    Poisson(): lambda f: D.Poisson(f.exp()),
}
ELEMENTWISE = [d for d in REFERENCE if not isinstance(d, Categorical)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_output(*shape, seed=0, dtype=DOUBLE):
    return 2 * torch.randn(shape, generator=generator(seed), dtype=dtype)


def each(distributions):
    return pytest.mark.parametrize("distribution", distributions, ids=str)


@each(REFERENCE)
@pytest.mark.parametrize("shape", [(50, 4), (10, 5, 3), (6, 2, 3, 2)])
def test_log_prob_is_that_of_torch_summed_over_positions(distribution, shape):
    output = some_output(*shape)
    target = distribution.sample(output, generator(1))
    expected = REFERENCE[distribution](output).log_prob(target)
    expected = expected.reshape(shape[0], -1).sum(1)
    found = distribution.log_prob(output, target)
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each(REFERENCE)
def test_a_complex_output_is_refused(distribution):
    output = torch.zeros(2, 3, dtype=torch.complex64)
    name = type(distribution).__name__
    with pytest.raises(ValueError, match=f"is torch.complex64, and a {name} is about real numbers"):
        distribution.check(output, torch.zeros(2, 3))


@each(ELEMENTWISE)
def test_log_prob_of_outputs_without_an_axis_of_their_own(distribution):
    output = some_output(7)
    target = distribution.sample(output, generator(1))
    expected = REFERENCE[distribution](output).log_prob(target)
    torch.testing.assert_close(
        distribution.log_prob(output, target), expected, rtol=1e-12, atol=1e-12
    )


def test_log_prob_of_a_category_is_minus_the_cross_entropy():
    output, target = some_output(20, 5, 3), torch.randint(3, (20, 5), generator=generator())
    target[0, :2] = -100
    target[1] = -100
    losses = F.cross_entropy(output.mT, target, reduction="none").sum(1)
    torch.testing.assert_close(Categorical().log_prob(output, target), -losses)


@pytest.mark.parametrize("far", [30.0, 1000.0])
def test_log_prob_stays_accurate_where_probabilities_round_to_zero_and_one(far):
    zero, one = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    output = torch.full((1,), far, dtype=DOUBLE)
    assert Bernoulli().log_prob(output, zero).item() == pytest.approx(-far, rel=1e-12)
    assert Bernoulli().log_prob(output, one).item() == pytest.approx(-math.exp(-far), rel=1e-12)
    logits = torch.tensor([[far, 0.0]], dtype=DOUBLE)
    assert Categorical().log_prob(logits, torch.tensor([1])).item() == pytest.approx(-far)


@each(REFERENCE)
def test_outcomes_have_the_mean_and_variance_of_the_distribution(distribution):
    output = some_output(9, 2, 3)
    values, probabilities = distribution.outcomes(output)
    reference = REFERENCE[distribution](output)
    assert values.shape == probabilities.shape
    torch.testing.assert_close(probabilities.sum(0), torch.ones_like(probabilities[0]))
    if isinstance(distribution, Categorical):
        torch.testing.assert_close(probabilities.movedim(0, -1), reference.probs)
        assert values[:, 0, 0].tolist() == [0, 1, 2]
        return
    mean = (probabilities * values).sum(0)
    variance = (probabilities * (values - mean).square()).sum(0)
    torch.testing.assert_close(mean, reference.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, reference.variance.expand_as(variance), rtol=1e-12, atol=0)


def chi_square_p_value(counts, probabilities):
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2).item()


def cells(distribution, output, samples, k):
    """Count samples in ``k`` cells, and give the probabilities of the cells."""
    reference = REFERENCE[distribution](output)
    if isinstance(distribution, Gaussian):  # cells of equal probability
        inner_edges = torch.linspace(0, 1, k + 1, dtype=DOUBLE)[1:-1]
        cell = torch.bucketize(reference.cdf(samples), inner_edges)
        return torch.bincount(cell, minlength=k), torch.full((k,), 1 / k)
    p = reference.log_prob(torch.arange(k).to(samples.dtype)).exp()
    if isinstance(distribution, Poisson):
        p[-1] = 1 - p[:-1].sum()
    return torch.bincount(samples.long().clamp_max(k - 1), minlength=k), p


SAMPLED = [
    (Categorical(), [0.3, -1.0, 2.0, 0.0], 4),
    (Categorical(), [0.0, -INF, 1.0, -INF], 4),
    (Bernoulli(), [-1.2], 2),
    (Bernoulli(), [3.0], 2),
    (Gaussian(sigma=0.3), [0.7], 20),
    (Poisson(), [0.8], 8),
    (Poisson(), [-1.0], 5),
    (Poisson(), [3.0], 35),
]


@pytest.mark.parametrize(("distribution", "output", "k"), SAMPLED, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_follow_the_distribution(distribution, output, k, seed):
    n = 20_000
    output = torch.tensor(output, dtype=DOUBLE)
    samples = distribution.sample(output.expand(n, -1), generator(seed)).reshape(n)
    counts, p = cells(distribution, output, samples, k)
    likely = n * p > 5
    assert counts[p == 0].sum() == 0
    assert n * p[~likely].sum() < 5
    assert chi_square_p_value(counts[likely], p[likely]) > 1e-3


@each(REFERENCE)
def test_samples_of_different_positions_are_independent(distribution):
    n = 20_000
    output = torch.zeros(n, 2, 2, dtype=DOUBLE)
    samples = distribution.sample(output, generator()).double().reshape(n, -1)
    z = math.sqrt(n) * torch.corrcoef(samples.mT).fill_diagonal_(0)
    assert z.abs().max() < 4
    z = math.sqrt(n - 1) * torch.corrcoef(torch.stack([samples[1:, 0], samples[:-1, 0]]))[0, 1]
    assert abs(z) < 4


@each(REFERENCE)
@pytest.mark.parametrize("transposed", [False, True])
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
@PROPERTY
def test_samples_do_not_depend_on_how_the_batch_is_cut(distribution, transposed, sizes, seed):
    output = some_output(3, sum(sizes), 4, seed=seed).transpose(0, 1)
    output = output if transposed else output.contiguous()
    at_once = distribution.sample(output, generator(seed))
    source = generator(seed)
    pieces = [distribution.sample(part, source) for part in output.split(sizes)]
    assert same(torch.cat(pieces), at_once)


@each(REFERENCE)
def test_samples_come_from_the_generator_alone(distribution):
    output = some_output(30, 4)
    before = torch.get_rng_state()
    first = distribution.sample(output, generator(1))
    assert same(torch.get_rng_state(), before)
    assert same(distribution.sample(output, generator(1)), first)
    assert not same(distribution.sample(output, generator(2)), first)


@each(REFERENCE)
def test_samples_pass_the_check_of_their_own_distribution(distribution):
    output = some_output(30, 4, 2)
    samples = distribution.sample(output, generator())
    distribution.check(output, samples)
    assert distribution.log_prob(output, samples).isfinite().all()


def test_impossible_classes_are_neither_sampled_nor_counted():
    output = torch.tensor([[0.0, -INF, 1.0, -INF]]).repeat(500, 1)
    labels = Categorical().sample(output, generator())
    assert set(labels.tolist()) == {0, 2}
    assert not Categorical().invalid(output).any()
    assert Categorical().log_prob(output, labels).isfinite().all()
    assert Categorical().log_prob(output[:1], torch.tensor([1])).item() == -INF
    assert Categorical().outcomes(output)[1][[1, 3]].sum() == 0


@pytest.mark.parametrize(("u", "label"), [(0.0, 1), (1 - 2.0**-53, 2)])
def test_impossible_classes_are_not_sampled_even_at_the_ends_of_the_unit_interval(
    monkeypatch, u, label
):
    ends = torch.tensor([u], dtype=DOUBLE)
    monkeypatch.setattr(categorical, "uniform", lambda *_: ends)
    output = torch.tensor([[-INF, 0.0, 1.0, -INF]])
    assert Categorical().sample(output).item() == label


@each(REFERENCE)
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_outputs_that_are_nan_or_infinite_are_invalid(distribution, bad):
    output = torch.zeros(3, 2, 2)
    assert not distribution.invalid(output).any()
    output[1, 0, 1] = bad
    marked = distribution.invalid(output)
    assert marked[1].any()
    assert not marked[[0, 2]].any()


def test_minus_infinity_is_invalid_unless_another_class_is_possible():
    assert Gaussian().invalid(torch.tensor([[-INF]])).item()
    assert Poisson().invalid(torch.tensor([[-INF]])).item()
    assert Bernoulli().invalid(torch.tensor([[-INF]])).item()
    assert Categorical().invalid(torch.full((1, 2), -INF)).any()
    assert not Categorical().invalid(torch.tensor([[-INF, 0.0]])).any()


def test_ignored_labels_do_not_count():
    output = some_output(2, 3, 4)
    target = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    Categorical().check(output, target)
    log_p = output[0].log_softmax(-1)
    expected = torch.stack([log_p[0, 1] + log_p[2, 2], torch.zeros((), dtype=DOUBLE)])
    torch.testing.assert_close(Categorical().log_prob(output, target), expected)
    assert same(Categorical().mask(target), target != -100)
    assert Gaussian().mask(output) is None


def test_which_label_is_ignored_is_a_choice():
    output, target = some_output(3, 4), torch.tensor([0, 3, 1])
    found = Categorical(ignore_index=3).log_prob(output, target)
    assert found[1] == 0
    assert same(found[[0, 2]], Categorical().log_prob(output, target)[[0, 2]])
    with pytest.raises(ValueError, match="label -100 of observation 0"):
        Categorical(ignore_index=3).check(output, torch.tensor([-100, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_narrow_integers(dtype):
    output, target = some_output(4, 200), torch.tensor([0, 3, 100, 1])
    narrow = target.to(dtype)
    Categorical().check(output, narrow)
    assert same(Categorical().log_prob(output, narrow), Categorical().log_prob(output, target))


def test_no_class_is_taken_for_the_ignored_label_in_eight_bits():
    output, label = torch.zeros(1, 200), torch.tensor([156])  # -100 modulo 256
    narrow = label.to(torch.uint8)
    assert Categorical().mask(narrow).all()
    assert same(Categorical().log_prob(output, narrow), Categorical().log_prob(output, label))
    with pytest.raises(ValueError, match="label 156"):
        Categorical().check(output[:, :100], narrow)


@pytest.mark.parametrize(
    ("distribution", "target", "message"),
    [
        (Categorical(), [0, 1, 3, 9], "label 3 of observation 12 is outside the 3 classes"),
        (Categorical(), [0, -1, 2, 1], "label -1 of observation 11 is outside the 3 classes"),
        (Bernoulli(), [0.0, 1.0, 0.5, 1.0], "target 0.5 of observation 12 .* Bernoulli: 0 or 1"),
        (Bernoulli(), [0, 1, 1, 2], "target 2 of observation 13"),
        (Bernoulli(), [0.0, 1.0, 1.0, math.nan], "target nan of observation 13"),
        (Gaussian(), [0.0, math.nan, 1.0, INF], "target nan of observation 11 .* finite"),
        (Gaussian(), [0.0, 1.0, -INF, 0.0], "target -inf of observation 12"),
        (Poisson(), [0.0, 1.0, -1.0, 0.0], "target -1 of observation 12 .* 0, 1, 2"),
        (Poisson(), [0.0, 1.5, 2.0, 0.0], "target 1.5 of observation 11"),
        (Poisson(), [INF, 1.0, 2.0, 0.0], "target inf of observation 10"),
        (Poisson(), [0.0, 1.0, 2.0, math.nan], "target nan of observation 13"),
    ],
    ids=str,
)
def test_a_target_outside_the_support_is_named(distribution, target, message):
    target = torch.tensor(target)
    output = torch.zeros(4, 3) if isinstance(distribution, Categorical) else torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        distribution.check(output, target, first=10)


def test_a_bad_token_is_named_by_its_observation():
    target = torch.zeros(4, 5, dtype=torch.long)
    target[2, 3] = 7
    with pytest.raises(ValueError, match="label 7 of observation 2 "):
        Categorical().check(torch.zeros(4, 5, 3), target)


@pytest.mark.parametrize(
    ("distribution", "output", "target"),
    [
        (Categorical(), (4,), (4,)),
        (Categorical(), (4, 3), (4, 1)),
        (Categorical(), (4, 3), (3,)),
        (Categorical(), (4, 5, 3), (4, 3)),
        (Bernoulli(), (4, 1), (4,)),
        (Gaussian(), (4, 2), (4, 1)),
        (Poisson(), (4,), (5,)),
    ],
    ids=str,
)
def test_a_target_of_another_shape_is_refused(distribution, output, target):
    with pytest.raises(ValueError, match="target") as error:
        distribution.check(torch.zeros(output), torch.zeros(target, dtype=torch.long))
    assert str(output) in str(error.value)
    assert str(target) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_class_labels_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"class labels must be integers, got {dtype}"):
        Categorical().check(torch.zeros(2, 3), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("sigma", [0.0, -1.0, INF, math.nan])
def test_a_standard_deviation_that_is_not_positive_and_finite_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, got {sigma}"):
        Gaussian(sigma=sigma)


@each(REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(distribution, dtype):
    output = some_output(8, 4, dtype=torch.float32).to(dtype)
    target = distribution.sample(output, generator())
    found = distribution.log_prob(output, target)
    assert found.dtype == torch.float32
    expected = distribution.log_prob(
        output.double(), target.double() if target.dtype == dtype else target
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_likelihoods_are_found_by_name_or_passed_on():
    assert output_distribution("categorical") == Categorical()
    assert output_distribution("bernoulli") == Bernoulli()
    assert output_distribution("gaussian") == Gaussian(sigma=1.0)
    assert output_distribution("poisson") == Poisson()
    mine = Gaussian(sigma=0.5)
    assert output_distribution(mine) is mine
    assert isinstance(mine, OutputDistribution)


@pytest.mark.parametrize("name", ["softmax", "Categorical", "", None])
def test_an_unknown_likelihood_is_refused_with_a_list(name):
    with pytest.raises(ValueError, match=f"'categorical', 'bernoulli', .* got {name!r}"):
        output_distribution(name)
