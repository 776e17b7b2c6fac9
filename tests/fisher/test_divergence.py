"""The Fisher information of any distribution, from the curvature of its divergence."""

from functools import singledispatch

import pytest
import torch

from ewc_lib.fisher import divergence
from ewc_lib.fisher.divergence import Curvature, information
from ewc_lib.fisher.output import columns, information_times, output_score
from ewc_lib.likelihood import Bernoulli, Categorical, Poisson, TorchDistribution
from tests.likelihood.families import FAMILIES, WITHOUT_ROOT

D = torch.distributions
each = pytest.mark.parametrize("name", FAMILIES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_output(n=3, seed=0):
    return torch.randn(n, 6, generator=generator(seed), dtype=torch.float64)


def all_columns(kind, make, output, target=None, draws=1):
    distribution = TorchDistribution(make)
    found = columns(kind, distribution, output, target, draws, generator())
    return torch.cat(list(found))


def second_moment(found):
    s = found.reshape(*found.shape[:2], -1)
    return torch.einsum("kni,knj->nij", s, s)


@each
def test_exact_columns_square_to_the_covariance_of_the_score(name):
    """The definition, by drawing: the mean over samples of the outer product of their scores."""
    n, output = 20_000, some_output(1, seed=1) / 2
    many = output.expand(n, 6)
    distribution = TorchDistribution(FAMILIES[name])
    with torch.no_grad():
        torch.manual_seed(0)
        target = distribution.of(many).sample()
    scores = output_score(distribution, many, target)
    products = torch.einsum("ni,nj->nij", scores, scores)
    error = products.std(0) / n**0.5
    found = second_moment(all_columns("exact", FAMILIES[name], output))[0]
    assert (products.mean(0) - found).abs().le(5 * error + 1e-9).all()
    assert found.diagonal().max() > 0.01


KNOWN = {"categorical": Categorical(), "bernoulli": Bernoulli(), "poisson": Poisson()}


@pytest.mark.parametrize("name", KNOWN)
def test_families_with_a_closed_form_have_that_one(name):
    output = some_output()
    target = torch.zeros(3, dtype=torch.long) if name == "categorical" else output
    expected = columns("exact", KNOWN[name], output, target, 1, None)
    expected = second_moment(torch.cat(list(expected)))
    found = second_moment(all_columns("exact", FAMILIES[name], output))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_normal_with_a_learned_variance_has_its_closed_form():
    output = some_output()
    mean, log_scale = (2 * output[:, 3:]).neg().exp(), torch.full((3, 3), 2.0).double()
    expected = torch.cat([mean, log_scale], 1).diag_embed()
    found = second_moment(all_columns("exact", FAMILIES["independent normal"], output))
    torch.testing.assert_close(found, expected)


@each
def test_a_product_is_that_of_the_matrix(name):
    output, v = some_output(), some_output(seed=5)
    found = information_times(TorchDistribution(FAMILIES[name]), output, None, v)
    matrix = second_moment(all_columns("exact", FAMILIES[name], output))
    torch.testing.assert_close(found, (matrix @ v.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("name", ["normal", "student", "categorical", "normal at each position"])
def test_a_sketch_squares_to_the_matrix_on_average(name):
    n, output = 10_000, some_output(1)
    found = all_columns("sketch", FAMILIES[name], output.expand(n, 6)).squeeze(0)
    products = torch.einsum("ni,nj->nij", found, found)
    error = products.std(0) / n**0.5 + 1e-9
    expected = second_moment(all_columns("exact", FAMILIES[name], output))[0]
    assert ((products.mean(0) - expected) / error).abs().max() < 4.5


def test_separate_positions_are_found_and_others_stay_whole():
    output = torch.randn(2, 5, 2, dtype=torch.float64)
    separate = lambda f: D.Normal(f[..., 0], f[..., 1].exp())  # noqa: E731
    mixed = lambda f: D.Normal(f[..., 0] + f[:, :1, 0], f[..., 1].exp())  # noqa: E731
    assert Curvature(TorchDistribution(separate), output).root().shape == (2, 5, 2, 2)
    assert Curvature(TorchDistribution(mixed), output).root().shape == (2, 10, 10)
    for make in (separate, mixed):
        whole = lambda f, make=make: D.Independent(make(f), 1)  # noqa: E731
        found, expected = (second_moment(all_columns("exact", m, output)) for m in (make, whole))
        torch.testing.assert_close(found, expected)


def test_a_sketch_of_many_separate_positions_needs_no_whole_matrix():
    output = torch.zeros(1, 2000, 2)
    found = all_columns("sketch", lambda f: D.Normal(f[..., 0], f[..., 1].exp()), output)
    torch.testing.assert_close(found.square()[0, 0], torch.tensor([1.0, 2.0]).expand(2000, 2))


@pytest.mark.parametrize(("kind", "message"), [("exact", "backward passes"), ("sketch", "large")])
def test_too_many_outputs_that_are_not_separate_are_refused(kind, message):
    output = torch.zeros(1, 2000)
    with pytest.raises(ValueError, match=message):
        all_columns(kind, lambda f: D.Normal(f[:, :1000], f[:, 1000:].exp()), output)


@pytest.mark.parametrize("kind", ["exact", "sketch"])
@pytest.mark.parametrize("name", WITHOUT_ROOT)
def test_a_family_without_a_known_information_is_refused_with_what_works(kind, name):
    with pytest.raises(TypeError, match=r"no root .* kind='sampled' or 'empirical', or register"):
        all_columns(kind, WITHOUT_ROOT[name], some_output())


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
@pytest.mark.parametrize("name", WITHOUT_ROOT)
def test_a_family_without_a_known_information_still_has_scores(kind, name):
    output, distribution = some_output(), TorchDistribution(WITHOUT_ROOT[name])
    target = distribution.sample(output, generator(3))
    (found,) = all_columns(kind, WITHOUT_ROOT[name], output, target)
    drawn = distribution.sample(output, generator()) if kind == "sampled" else target
    torch.testing.assert_close(found, output_score(distribution, output, drawn))


WRONG = {
    "a moving support": lambda f: D.Uniform(f[:, 0], f[:, 0] + 1),
    "a moving transform": lambda f: D.TransformedDistribution(
        D.Normal(torch.zeros_like(f[:, 0]), 1.0), D.AffineTransform(f[:, 0], 1.0)
    ),
    "mixed observations": lambda f: D.Normal(f - f.mean(0), 1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_divergence_that_autograd_gets_wrong_is_refused(name):
    with pytest.raises(ValueError, match=r"not the one that autograd finds .* observation 0"):
        Curvature(TorchDistribution(WRONG[name]), some_output())


def test_a_kink_is_refused(monkeypatch):
    """The divergence of two Laplace distributions has one, where autograd returns zero."""
    monkeypatch.setattr(divergence, "information", singledispatch(lambda distribution: None))
    with pytest.raises(ValueError, match="not the one that autograd finds"):
        Curvature(TorchDistribution(FAMILIES["laplace"]), some_output())


def test_a_distribution_of_another_number_of_observations_is_refused():
    with pytest.raises(ValueError, match="must begin with the number of observations, 3"):
        Curvature(TorchDistribution(lambda f: D.Normal(f.mT, 1.0)), some_output())


def test_a_part_of_the_support_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="too large a part beyond"):
        Curvature(
            TorchDistribution(lambda f: D.NegativeBinomial(f.exp(), logits=40 + 0 * f)),
            some_output(),
        )


def test_an_output_that_the_distribution_ignores_has_no_information():
    found = all_columns("exact", lambda f: D.Normal(torch.zeros(len(f)), 1.0), some_output())
    assert not found.any()


class Logistic(D.Distribution):
    """A family that PyTorch does not have."""

    arg_constraints = {}  # noqa: RUF012
    support = D.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape)

    def log_prob(self, value):
        z = value - self.loc
        return -z - 2 * torch.nn.functional.softplus(-z)


def test_a_density_of_ones_own_does_not_inherit_the_information_of_its_family():
    class Tempered(D.Normal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    class Flipped(D.Bernoulli):
        def log_prob(self, value):
            return super().log_prob(1 - value)

    with pytest.raises(TypeError, match="no root"):
        all_columns("exact", lambda f: Tempered(f, 1.0), some_output())
    found = all_columns("exact", lambda f: Flipped(logits=f), some_output())
    torch.testing.assert_close(
        found.abs(), all_columns("exact", FAMILIES["bernoulli"], some_output()).abs()
    )


def test_the_information_of_a_family_can_be_registered():
    with pytest.raises(TypeError, match="no root"):
        all_columns("exact", Logistic, some_output())

    @information.register
    def _(distribution: Logistic):
        return ("loc",), torch.full_like(distribution.loc, 1 / 3)[..., None, None]

    found = second_moment(all_columns("exact", Logistic, some_output()))
    torch.testing.assert_close(found, (torch.eye(6) / 3).double().expand(3, 6, 6))
