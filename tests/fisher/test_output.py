"""Roots of the Fisher information of the output distribution, against their closed forms."""

from itertools import product

import hypothesis.strategies as st
import pytest
import torch
import torch.distributions as D
from hypothesis import given

from ewc_lib.fisher import output as output_module
from ewc_lib.fisher.output import (
    COLUMNS_AT_ONCE,
    KINDS,
    columns,
    information_times,
    output_score,
    root_times,
)
from ewc_lib.likelihood.outputs import (
    Bernoulli,
    Categorical,
    Gaussian,
    OutputDistribution,
    Poisson,
    TorchDistribution,
)
from tests.scenarios import PROPERTY

ELEMENTWISE = [Bernoulli(), Gaussian(sigma=0.5), Poisson()]
DISTRIBUTIONS = [Categorical(), *ELEMENTWISE]


def target_for(distribution, output):
    if isinstance(distribution, Categorical):
        return torch.zeros(output.shape[:-1], dtype=torch.long)
    return torch.zeros_like(output)


def all_columns(kind, distribution, output, target=None, draws=1, seed=0):
    target = target_for(distribution, output) if target is None else target
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(list(columns(kind, distribution, output, target, draws, generator)))


def second_moment(found):
    """Sum over columns of ``s sᵀ`` for each observation."""
    s = found.reshape(*found.shape[:2], -1)
    return torch.einsum("kni,knj->nij", s, s)


def closed_form(distribution, f):
    """The Fisher information at one position, ``[N, C, C]``, with no difference of like numbers."""
    if isinstance(distribution, Categorical):
        p = f.softmax(-1)
        off = -p.unsqueeze(2) * p.unsqueeze(1)
        off = off - off.diagonal(dim1=1, dim2=2).diag_embed()
        return off - off.sum(2).diag_embed()  # p_i (1 - p_i) is the sum of p_i p_j over the others
    values = {
        Bernoulli(): f.sigmoid() * (-f).sigmoid(),
        Gaussian(sigma=0.5): torch.full_like(f, 4.0),
        Poisson(): f.exp(),
    }
    return values[distribution].diag_embed()


def close(found, expected, rtol=1e-12, atol=1e-15):
    """Compare entry by entry: also the small ones must be right."""
    assert torch.allclose(found, expected, rtol=rtol, atol=1e-300)


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@PROPERTY
@given(
    st.sampled_from(DISTRIBUTIONS),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(0, 100),
    st.sampled_from([0.1, 1.0, 10.0]),
)
def test_exact_columns_square_to_the_closed_form(distribution, n, width, seed, scale):
    f = normal(n, width, seed=seed, scale=scale)
    close(second_moment(all_columns("exact", distribution, f)), closed_form(distribution, f))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_columns_of_a_confident_model_keep_every_digit(dtype):
    """Where the other classes have a probability of 1e-30, ``1 - p`` is rounded to zero."""
    f = torch.tensor([[0.0, -69.0, -70.0, -1.0], [80.0, 0.0, 3.0, -5.0]], dtype=dtype)
    found = second_moment(all_columns("exact", Categorical(), f).double())
    expected = closed_form(Categorical(), f.double())
    info = torch.finfo(dtype)
    assert torch.allclose(found, expected, rtol=1e3 * info.eps, atol=info.tiny)
    assert 0 < found[1, 0, 0] < 1e-30


@pytest.mark.parametrize("logit", [-400.0, -50.0, 0.0, 50.0, 400.0])
def test_the_column_of_a_confident_coin_keeps_every_digit(logit):
    f = torch.full((1, 1), logit, dtype=torch.float64)
    expected = torch.exp(-f.abs()) / (1 + torch.exp(-f.abs())) ** 2
    close(second_moment(all_columns("exact", Bernoulli(), f)).squeeze(1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_with_a_logit_of_minus_infinity_have_no_information(kind):
    f = normal(3, 5)
    f[:, [0, 3]] = -torch.inf
    target = torch.full((3,), 1)
    found = all_columns(kind, Categorical(), f, target, draws=2)
    assert found.isfinite().all()
    assert (found[..., [0, 3]] == 0).all()
    if kind == "exact":
        rest = second_moment(found)[:, [1, 2, 4]][:, :, [1, 2, 4]]
        close(rest, closed_form(Categorical(), f[:, [1, 2, 4]]))


@pytest.mark.parametrize("n_classes", [1, 2, 3, 10])
def test_one_column_less_than_classes(n_classes):
    blocks = columns("exact", Categorical(), normal(4, n_classes), torch.zeros(4), 1, None)
    found = [column for block in blocks for column in block]
    assert len(found) == n_classes - 1
    assert all(column.shape == (4, n_classes) for column in found)


@pytest.mark.parametrize("distribution", ELEMENTWISE, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 2, 3)])
def test_one_column_for_each_real_output(distribution, shape):
    f = normal(*shape)
    found = all_columns("exact", distribution, f)
    assert len(found) == f[0].numel()
    diagonal = second_moment(found).diagonal(dim1=1, dim2=2).reshape(shape)
    close(diagonal, closed_form(distribution, f.reshape(4, -1)).sum(2).reshape(shape))
    assert ((found != 0).reshape(len(found), 4, -1).sum(2) == 1).all()


@pytest.mark.parametrize("positions", [(2,), (3, 2)])
def test_positions_of_an_observation_are_independent(positions):
    f = normal(3, *positions, 4)
    found = second_moment(all_columns("exact", Categorical(), f))
    n_positions = f[0, ..., 0].numel()
    expected = closed_form(Categorical(), f.reshape(-1, 4)).reshape(3, n_positions, 4, 4)
    blocks = torch.stack([torch.block_diag(*one) for one in expected])
    close(found, blocks)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_all_sign_vectors_together_square_to_the_information(distribution):
    f = normal(3, 4, scale=2.0)
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    found = torch.stack([root_times(distribution, f, v.expand(3, 4)) for v in signs])
    moment = second_moment(found) / len(signs)
    assert torch.allclose(moment, closed_form(distribution, f), rtol=1e-12, atol=1e-15)


def test_a_sketch_of_a_confident_model_keeps_every_digit():
    f = torch.tensor([[0.0, -69.0, -70.0, -100.0]], dtype=torch.float64)
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    found = torch.stack([root_times(Categorical(), f, v.expand(1, 4)) for v in signs])
    moment = second_moment(found).diagonal(dim1=1, dim2=2) / len(signs)
    close(moment, closed_form(Categorical(), f).diagonal(dim1=1, dim2=2), rtol=1e-10)


def test_the_variance_of_a_sketch_is_bounded_however_confident_the_model():
    f = torch.tensor([[0.0, -30.0, -31.0, -32.0]], dtype=torch.float64)
    j = normal(4, seed=1)
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    squares = torch.stack([(root_times(Categorical(), f, v) @ j).square() for v in signs])
    assert squares.var(correction=0) <= 2 * squares.mean() ** 2


@pytest.mark.parametrize("distribution", [Categorical(), Bernoulli()], ids=["classes", "coins"])
def test_scores_of_all_labels_square_to_the_information(distribution):
    f = normal(3, 4)
    values, p = distribution.outcomes(f)
    if isinstance(distribution, Categorical):
        scores = torch.stack([output_score(distribution, f, label) for label in values])
        moment = torch.einsum("kn,kni,knj->nij", p, scores, scores)
    else:
        scores = torch.stack([output_score(distribution, f, label) for label in values])
        moment = (p * scores.square()).sum(0).diag_embed()
    assert torch.allclose(moment, closed_form(distribution, f), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_random_columns_square_to_the_information_on_average(distribution, kind):
    n, draws = 10_000, 2
    f = normal(1, 3)
    found = all_columns(kind, distribution, f.expand(n, 3), draws=draws).flatten(0, 1)
    products = draws * torch.einsum("ni,nj->nij", found, found)
    error = products.std(0) / (n * draws) ** 0.5 + 1e-12
    z = (products.mean(0) - closed_form(distribution, f)[0]) / error
    assert z.abs().max() < 4.5


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_draws_are_different_for_every_draw_observation_and_position(kind):
    found = all_columns(kind, Gaussian(), torch.zeros(50, 4, dtype=torch.float64), draws=3)
    flat = found.reshape(3 * 50, 4)
    assert len(flat.unique(dim=0)) > (3 * 50 if kind == "sampled" else 16) - 1
    for axis in (0, 1, 2):
        assert found.std(axis).max() > 0


def test_the_empirical_column_is_the_score_of_the_observed_target():
    f, y = normal(4, 3), torch.tensor([0, 2, 1, 1])
    expected = torch.nn.functional.one_hot(y, 3) - f.softmax(-1)
    (found,) = all_columns("empirical", Categorical(), f, y).unbind(0)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)
    y = normal(4, 3, seed=1)
    (found,) = all_columns("empirical", Gaussian(sigma=0.5), f, y).unbind(0)
    assert torch.allclose(found, (y - f) / 0.25, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_have_no_column_and_change_no_other(kind):
    f, y = normal(3, 4, 5), torch.ones(3, 4, dtype=torch.long)
    masked = y.clone()
    masked[0] = masked[1, 2] = -100
    found, whole = (all_columns(kind, Categorical(), f, t, draws=2) for t in (masked, y))
    keep = (masked != -100).unsqueeze(-1)
    assert (whole != 0).any(0).all()
    assert torch.equal(found, whole * keep)


def test_columns_need_no_gradient_and_keep_the_output():
    f = normal(3, 4).requires_grad_()
    before = f.detach().clone()
    for kind in KINDS:
        assert not any(c.requires_grad for c in all_columns(kind, Categorical(), f.detach()))
    assert torch.equal(f, before)
    assert f.grad is None


def test_exact_columns_are_built_a_few_at_a_time():
    """A thousand classes would otherwise fill gigabytes."""
    found = columns("exact", Categorical(), normal(8, 1000), torch.zeros(8), 1, None)
    blocks = list(found)
    assert [len(block) for block in blocks] == [*[COLUMNS_AT_ONCE] * 62, 7]
    assert blocks[0].untyped_storage().nbytes() == COLUMNS_AT_ONCE * 8 * 1000 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_has_the_shape_of_the_output(kind):
    f = normal(3, 2, 5)
    for distribution in (Categorical(), Gaussian(), TorchDistribution(lambda f: D.Normal(f, 1.0))):
        target = torch.zeros(3, 2).long() if isinstance(distribution, Categorical) else f
        generator = torch.Generator().manual_seed(0)
        for block in columns(kind, distribution, f, target, 3, generator):
            assert block.shape[1:] == f.shape


def test_the_limit_counts_columns_and_not_classes(monkeypatch):
    monkeypatch.setattr(output_module, "MAX_EXACT_COLUMNS", 6)
    assert len(all_columns("exact", Categorical(), normal(2, 3, 3))) == 6
    with pytest.raises(ValueError, match=r"outputs of shape \(3, 4\) takes 9 backward passes"):
        all_columns("exact", Categorical(), normal(2, 3, 4))
    with pytest.raises(ValueError, match="takes 7 backward passes, more than 6; kind='sketch'"):
        all_columns("exact", Poisson(), normal(2, 7))


class Laplace(OutputDistribution):
    """A distribution of somebody else's."""

    def log_prob(self, output, target):
        return -(target - output).abs().sum(1)

    def sample(self, output, generator=None):
        return output + 1

    def outcomes(self, output):
        raise NotImplementedError

    def check(self, output, target, first=0):
        pass


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_a_distribution_without_a_root_is_named(kind):
    with pytest.raises(TypeError, match=r"no root .* is known for .*Laplace"):
        all_columns(kind, Laplace(), normal(2, 3), normal(2, 3))


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_a_distribution_without_a_root_still_has_scores(kind):
    found = all_columns(kind, Laplace(), normal(2, 3), normal(2, 3) + 1)
    assert torch.equal(found, torch.ones(1, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_dim", [1, -2])
def test_columns_of_classes_on_another_axis_are_those_of_the_last_one_moved(kind, class_dim):
    f, y = normal(3, 2, 4, 5), torch.ones(3, 2, 4, dtype=torch.long)
    y[1, 0, 2] = -100
    found = all_columns(
        kind, Categorical(class_dim=class_dim), f.movedim(-1, class_dim), y, draws=2
    )
    there = class_dim + 1 if class_dim > 0 else class_dim
    assert torch.equal(found.movedim(there, -1), all_columns(kind, Categorical(), f, y, draws=2))


def test_a_product_with_classes_on_another_axis_is_that_of_the_last_one_moved():
    f, v, y = normal(3, 4, 5), normal(3, 4, 5, seed=1), torch.ones(3, 4, dtype=torch.long)
    found = information_times(Categorical(class_dim=1), f.mT, y, v.mT)
    assert torch.equal(found.mT, information_times(Categorical(), f, y, v))


@pytest.mark.parametrize("kind", ["exact", "sketch", "empirical"])
def test_columns_of_next_tokens_are_those_of_labels_shifted_by_hand(kind):
    f, text = normal(3, 4, 5), torch.tensor([[1, 2, 3, 4], [0, -100, 1, 1], [2, 2, 0, -100]])
    shifted = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
    found = all_columns(kind, Categorical(next_token=True), f, text, draws=2)
    assert torch.equal(found, all_columns(kind, Categorical(), f, shifted, draws=2))


def test_sampled_next_tokens_are_those_of_labels_shifted_by_hand():
    """The draws are the same numbers, one position later."""
    f, text = normal(3, 4, 5), torch.ones(3, 4, dtype=torch.long)
    shifted = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
    found = all_columns("sampled", Categorical(next_token=True), f, text, draws=2)
    expected = all_columns("sampled", Categorical(), f, shifted, draws=2)
    assert torch.allclose(found, expected, rtol=1e-15, atol=0)
    assert found.abs().sum((0, 1, 3)).tolist()[:3] != [0, 0, 0]
    assert not found[:, :, -1].any()


def test_a_draw_that_has_the_ignored_label_counts():
    f = torch.tensor([[0.0, 50.0]], dtype=torch.float64)
    (found,) = all_columns("sampled", Categorical(ignore_index=1), f, torch.tensor([0])).unbind(0)
    (expected,) = all_columns("sampled", Categorical(), f, torch.tensor([0])).unbind(0)
    assert torch.equal(found, expected)
    assert found.any()
