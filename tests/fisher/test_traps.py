"""What is easy to get wrong without noticing: here it is right, or refused by a clear error.

Most tests compare with one observation at a time, by plain autograd, and show that the usual
mistake would have been seen: its result is far from the truth.
"""

import copy
import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from ewc_lib import Gaussian
from tests.scenarios import (
    BATCH_SIZES,
    CLASSES,
    HiddenLinear,
    N,
    Scenario,
    definition,
    relative_error,
    same,
    trace_of,
)
from tests.zoo import (
    ZOO,
    Attend,
    Experts,
    Functional,
    Saving,
    Tied,
    error,
    measure,
    read,
    stir,
    truth,
    zoo_truth,
)

KINDS = ("exact", "sketch", "sampled", "empirical")
DETERMINISTIC = ("exact", "empirical")


def seeded(make):
    """Build a model with data that are the same every time, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = make()
        doubled = tree_map(lambda t: t.double() if t.is_floating_point() else t, (case.x, case.y))
        return Scenario(case.model.double(), doubled[0], case.likelihood, doubled[1])


def reading(make, *shape):
    """Put a layer between random inputs and three classes."""
    return seeded(lambda: read(stir(make()), torch.randn(N, *shape)))


def assert_right(case, kinds=DETERMINISTIC):
    """Compare with one observation at a time, however the data are cut."""
    slow = truth(case)
    for kind in kinds:
        for size in BATCH_SIZES:
            assert error(measure(case, size, kind=kind).diagonal(), slow.diagonal(kind)) < 1e-10


def far(wrong, right):
    """Tell whether two diagonals, or two tensors, differ so much that a test would see it."""
    if isinstance(wrong, dict):
        return any(far(wrong[name], right[name]) for name in wrong)
    return relative_error(wrong, right) > 0.05


def total(diagonal):
    return float(sum(values.sum() for values in diagonal.values()))


# Which gradients are squared, and with which labels


@cache
def confident():
    """A classifier after many steps: it is almost sure of almost every label."""
    return seeded(train)


def train():
    centres = 2 * torch.randn(CLASSES, 4)
    y = torch.arange(24) % CLASSES
    x = centres[y] + 0.5 * torch.randn(24, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Scenario(model, x, "categorical", y)


def test_the_mean_is_taken_of_squares_and_not_squared():
    case = ZOO["mlp"]()
    loss = F.cross_entropy(case.model.eval()(case.x), case.y)
    wrong = {
        name: g.square()
        for (name, _), g in zip(
            case.model.named_parameters(),
            torch.autograd.grad(loss, list(case.model.parameters())),
            strict=True,
        )
    }
    right = zoo_truth("mlp").diagonal("empirical")
    assert total(wrong) < 0.7 * total(right)
    assert_right(case, ["empirical"])


def test_labels_come_from_the_model_unless_the_observed_ones_are_asked_for():
    """Where the model is confident, the empirical Fisher is a fraction of the true one."""
    case = confident()
    slow = truth(case)
    found = {kind: measure(case, kind=kind).diagonal() for kind in DETERMINISTIC}
    for kind in DETERMINISTIC:
        assert error(found[kind], slow.diagonal(kind)) < 1e-10
    assert relative_error(slow.dense("exact"), definition(case, "exact")) < 1e-10
    assert same(measure(case).diagonal(), found["exact"])
    assert total(found["empirical"]) < 0.2 * total(found["exact"])


def test_random_signs_stay_precise_where_random_labels_do_not():
    """The variance of a sketch is at most twice the square of what each observation gives."""
    case = confident()
    slow = truth(case)
    each = (slow.jacobian * (slow.information @ slow.jacobian)).sum(1)
    expected = each.mean(0)
    bound = 2 * each.square().sum(0) / len(each) ** 2

    def errors(kind):
        found = [
            measure(case, kind=kind, generator=torch.Generator().manual_seed(seed)).diagonal()
            for seed in range(150)
        ]
        flat = torch.stack([torch.cat([v.reshape(-1) for v in f.values()]) for f in found])
        return (flat - expected).square().mean(0)

    sketch, sampled = errors("sketch"), errors("sampled")
    assert sketch.sum() < 1.3 * bound.sum()
    assert sampled.sum() > 3 * sketch.sum()


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_more_draws_share_one_sum(kind):
    case = ZOO["mlp"]()
    expected = total(zoo_truth("mlp").diagonal("exact"))
    for draws in (50, 200):
        assert abs(total(measure(case, kind=kind, draws=draws).diagonal()) / expected - 1) < 0.15


# Regression: what the noise and the reductions of a squared error mean


SIGMAS = [0.5, math.sqrt(0.5), 1.0, 2.0]


def regression(sigma, n=N, n_outputs=3):
    def make():
        x, y = torch.randn(n, 4), torch.randn(n, 3)
        model = nn.Linear(4, 3)
        model.weight.data, model.bias.data = model.weight[:n_outputs], model.bias[:n_outputs]
        return Scenario(model, x, Gaussian(sigma=sigma), y[:, :n_outputs])

    return seeded(make)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_information_about_a_mean_is_one_over_the_variance_of_the_noise(sigma):
    case = regression(sigma)
    found = measure(case).diagonal()
    rows = case.x.square().mean(0) / sigma**2
    assert torch.allclose(found["weight"], rows.expand(3, 4), rtol=1e-12, atol=0)
    assert torch.allclose(found["bias"], torch.full_like(found["bias"], sigma**-2), rtol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_empirical_information_of_a_regression_has_the_fourth_power_of_the_noise(sigma):
    case = regression(sigma)
    residual = (case.y - case.model(case.x)).detach()
    expected = torch.einsum("no,ni->oi", residual.square(), case.x.square()) / N / sigma**4
    found = measure(case, kind="empirical").diagonal()
    assert torch.allclose(found["weight"], expected, rtol=1e-12, atol=0)
    assert torch.allclose(found["bias"], residual.square().mean(0) / sigma**4, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("sigma", "loss"),
    [
        (1.0, lambda f, y: (f - y).square().sum() / 2),
        (math.sqrt(0.5), nn.MSELoss(reduction="sum")),
        (math.sqrt(3 / 2), nn.MSELoss(reduction="mean")),
    ],
    ids=["half the sum", "sum", "mean over three outputs"],
)
def test_a_squared_error_is_the_likelihood_of_its_own_noise(sigma, loss):
    """A summed squared error means a variance of one half; a mean, one half times the outputs."""
    case = regression(sigma)
    expected = 0
    for x, y in zip(case.x, case.y, strict=True):
        (gradient,) = torch.autograd.grad(loss(case.model(x), y), [case.model.weight])
        expected = expected + gradient.square() / N
    found = measure(case, kind="empirical").diagonal()["weight"]
    assert torch.allclose(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_neither_more_observations_nor_more_outputs_dilute_the_information(kind):
    one, three = regression(0.5, n_outputs=1), regression(0.5)
    few, many = (measure(case, kind=kind).diagonal() for case in (one, three))
    assert torch.allclose(many["weight"][:1], few["weight"], rtol=1e-12, atol=0)
    repeated = three._replace(x=three.x.repeat(25, 1), y=three.y.repeat(25, 1))
    assert error(measure(repeated, 32, kind=kind).diagonal(), many) < 1e-12


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_random_kinds_have_the_noise_of_the_likelihood(kind, sigma):
    case = regression(sigma)
    found, expected = (
        measure(case, **options).diagonal() for options in ({"kind": kind, "draws": 2000}, {})
    )
    assert torch.allclose(found["weight"], expected["weight"], rtol=0.15)
    assert abs(total(found) / total(expected) - 1) < 0.05


# Sequences


def test_the_positions_of_a_sequence_are_added_before_squaring():
    case = seeded(lambda: read(nn.Linear(4, 5), torch.randn(N, 7, 4)))
    h = case.model.body(case.x)
    log_p = (torch.tanh(h).flatten(1) @ case.model.head).log_softmax(-1)
    (g,) = torch.autograd.grad(log_p[range(N), case.y].sum(), h)
    right = torch.einsum("nto,nti->noi", g, case.x).square().mean(0)
    wrong = torch.einsum("nto,nti->oi", g.square(), case.x.square()) / N
    found = measure(case, kind="empirical").diagonal()["body.weight"]
    assert relative_error(found, right) < 1e-10
    assert far(wrong, right)
    assert_right(case)


def texts():
    """A language model without context, so that its tokens are independent."""

    def make():
        words = torch.randint(0, 5, (N, 4))
        return Scenario(Tied(), words, "categorical", words.roll(-1, 1))

    return seeded(make)


def test_the_tokens_of_a_text_make_one_observation():
    case = texts()
    tokens = case._replace(x=case.x.reshape(-1, 1), y=case.y.reshape(-1, 1))
    assert_right(case)
    for kind in DETERMINISTIC:
        by_text, by_token = (measure(c, kind=kind).diagonal() for c in (case, tokens))
        by_token = {name: 4 * values for name, values in by_token.items()}
        # labels that the model draws are independent; those of a text are not
        assert far(by_token, by_text) == (kind == "empirical")


class Pointwise(nn.Module):
    """A linear map of every position, as a convolution of width one."""

    def __init__(self, linear):
        super().__init__()
        self.layer = nn.Conv1d(linear.in_features, linear.out_features, 1, dtype=torch.float64)
        self.layer.weight.data = linear.weight.detach().unsqueeze(-1)
        self.layer.bias.data = linear.bias.detach()

    def forward(self, x):
        return self.layer(x.mT).mT


@pytest.mark.parametrize("positions", [1, 2, N])
def test_kronecker_factors_of_a_sequence_are_those_of_the_same_convolution(positions):
    linear = seeded(lambda: read(nn.Linear(3, 4), torch.randn(N, positions, 3)))
    convolution = linear._replace(model=copy.deepcopy(linear.model))
    convolution.model.body = Pointwise(linear.model.body)
    assert same(convolution.model(linear.x), linear.model(linear.x))
    found, expected = (measure(c, structure="kronecker") for c in (linear, convolution))
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-10


@pytest.mark.parametrize("positions", [1, 2, N])
def test_kronecker_factors_of_a_sequence_are_exact_where_they_can_be(positions):
    """A linear map with noise of its own at each position."""

    def make():
        x, y = torch.randn(N, positions, 3), torch.randn(N, positions, 4)
        return Scenario(nn.Linear(3, 4, bias=False), x, Gaussian(sigma=0.5), y)

    case = seeded(make)
    found = measure(case, structure="kronecker").to_dense()
    assert relative_error(found, truth(case).dense("exact")) < 1e-10


# Layers


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 4), (3, 5), (16, 16)])
@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}], ids=["plain", "strided"])
def test_the_size_of_a_map_does_not_matter(shape, options):
    """Small maps and large ones invite different algorithms."""
    kernel = (1, 1) if not options and 1 in shape else (2, 2)
    kernel = (1, 1) if shape == (1, 1) and not options else kernel
    assert_right(reading(lambda: nn.Conv2d(2, 3, kernel, **options), 2, *shape))


class Shared(nn.Module):
    """A linear map that is used twice: by two modules, or by one that is called twice."""

    def __init__(self, how):
        super().__init__()
        self.first = nn.Linear(4, 4)
        second = copy.deepcopy(self.first)
        if how == "two modules, one parameter":
            second.weight = self.first.weight
        self.second = self.first if how == "one module, called twice" else second

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["two modules, one parameter", "one module, called twice"])
def test_the_gradients_of_all_uses_of_a_parameter_are_added_before_squaring(how):
    shared, separate = (seeded(lambda h=h: read(Shared(h), torch.randn(N, 4))) for h in (how, ""))
    assert same(shared.model(shared.x), separate.model(shared.x))
    assert_right(shared)
    names = [name for name, _ in shared.model.named_parameters()]
    assert list(measure(shared).diagonal()) == names
    by_use = truth(separate).diagonal("exact")
    wrong = by_use["body.first.weight"] + by_use["body.second.weight"]
    assert far(wrong, measure(shared).diagonal()["body.first.weight"])


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_padding_is_with_what_the_layer_pads(kind, mode):
    shape = (2, 5) if kind is nn.Conv1d else (2, 4, 3)
    case, zeros = (
        reading(lambda m=m: kind(2, 3, 3, padding=1, padding_mode=m), *shape)
        for m in (mode, "zeros")
    )
    assert_right(case)
    assert far(truth(zeros).diagonal("exact"), truth(case).diagonal("exact"))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_padding_may_be_same(width, options):
    assert_right(reading(lambda: nn.Conv1d(2, 4, width, padding="same", **options), 2, 6))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_groups_see_their_own_channels(kind, groups):
    shape = (4, 5) if "1d" in kind.__name__ else (4, 3, 3)
    assert_right(reading(lambda: kind(4, 8, 2, groups=groups), *shape))


def test_raw_parameters_are_not_left_out():
    body = partial(
        Functional,
        lambda p, x: torch.cat([p.token.expand(len(x), 1, 4), (x + p.at) * p.scale], 1) @ p.w,
        token=(4,),
        at=(3, 1),
        scale=(4,),
        w=(4, 4),
    )
    case = reading(body, 3, 4)
    assert_right(case)
    found = measure(case).diagonal()
    assert list(found) == [f"body.{name}" for name in ("token", "at", "scale", "w")]
    assert all(values.min() > 0 for values in found.values())


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.LayerNorm(4), (4,)),
        (lambda: nn.LayerNorm(4), (3, 4)),
        (lambda: nn.RMSNorm(4), (3, 4)),
        (lambda: nn.GroupNorm(2, 4), (4, 3)),
        (lambda: nn.BatchNorm1d(4), (4,)),
        (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    ],
    ids=["layer", "layer, sequences", "root mean square", "group", "batch", "instance"],
)
def test_a_normalisation_whose_scale_is_zero_still_learns(norm, shape):
    """Many blocks start with a scale of zero: what it multiplies cannot be had by division."""

    def make():
        layer = stir(norm())
        layer.weight.data[1:] = 0
        return read(layer, torch.randn(N, *shape))

    case = seeded(make)
    assert_right(case)
    assert measure(case).diagonal()["body.weight"].min() > 0


# Precision and modes


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear_on_sequences", "conv2d_grouped", "attention", "lstm"])
def test_double_precision_is_kept_throughout(name, kind, structure):
    found = measure(ZOO[name](), kind=kind, structure=structure)
    assert all(values.dtype == torch.float64 for values in found.diagonal().values())
    assert found.to_dense().dtype == torch.float64
    if kind in DETERMINISTIC:
        assert error(found.diagonal(), zoo_truth(name).diagonal(kind)) < 1e-13


def in_both_modes(case, **options):
    """Measure in training and in evaluation mode; each must be given back."""
    found = []
    for training in (True, False):
        case.model.train(training)
        before = trace_of(case.model)
        found.append(measure(case, 3, **options).diagonal())
        assert same(trace_of(case.model), before)
    return found


@pytest.mark.parametrize(
    "dropout",
    [
        lambda: nn.Dropout(0.9),
        lambda: nn.AlphaDropout(0.9),
        lambda: Functional(lambda p, x: F.dropout(x, 0.9, training=p.training)),
    ],
    ids=["module", "alpha", "functional"],
)
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_dropout_is_off_whatever_the_mode(kind, dropout):
    body = partial(nn.Sequential, nn.Linear(4, 6), dropout(), nn.Linear(6, 4))
    case = reading(body, 4)
    training, evaluation = in_both_modes(case, kind=kind)
    assert same(training, evaluation)
    assert error(training, truth(case).diagonal(kind)) < 1e-10


def test_batch_normalisation_uses_running_statistics_and_leaves_them_alone():
    def body():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))

    case = reading(body, 4)
    statistics = case.model.body[1].running_mean.clone(), case.model.body[1].running_var.clone()
    training, evaluation = in_both_modes(case)
    assert same(training, evaluation)
    assert same((case.model.body[1].running_mean, case.model.body[1].running_var), statistics)
    assert case.model.body[1].num_batches_tracked == 0
    assert error(training, truth(case).diagonal("exact")) < 1e-10


def test_a_model_in_evaluation_mode_has_information_too():
    case = ZOO["encoder_layer"]()
    training, evaluation = in_both_modes(case)
    assert same(training, evaluation)
    assert total(evaluation) > 0


# Recurrent networks and attention


@pytest.mark.parametrize("params", ["*weight_hh*", "*bias*", ["body.inner.weight_ih_l0"]])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_a_part_of_the_parameters_of_a_recurrent_network_can_be_asked_for(name, params):
    found = measure(ZOO[name](), params=params).diagonal()
    expected = zoo_truth(name).diagonal("exact")
    assert 0 < len(found) < len(expected)
    assert error(found, {key: expected[key] for key in found}) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_biases_of_an_lstm_have_the_same_information_but_not_the_same_memory(kind):
    """Their gradients may be one tensor, so that squaring in place would square it twice."""
    case = ZOO["lstm"]()
    found = measure(case, kind=kind).diagonal()
    first, second = found["body.inner.bias_ih_l0"], found["body.inner.bias_hh_l0"]
    assert torch.allclose(first, second, rtol=1e-12, atol=0)
    if kind in DETERMINISTIC:
        assert relative_error(first, zoo_truth("lstm").diagonal(kind)["body.inner.bias_ih_l0"]) < (
            1e-10
        )
    kept = second.clone()
    first.zero_()
    assert same(second, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attention", "attention_with_positions_first"])
def test_the_bias_of_attention_keys_has_no_information(name, kind):
    """It adds the same number to all scores of a query, which the softmax takes away again."""
    for size in BATCH_SIZES:
        F_ = measure(ZOO[name](), size, kind=kind)
        query, key, value = F_.diagonal()["body.attention.in_proj_bias"].chunk(3)
        assert key.max() < 1e-25 * F_.trace()
        assert min(query.min(), value.min()) > 1e-9 * F_.trace()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_attention_works_on_a_single_observation(kind, batch_first):
    case = reading(lambda: Attend(batch_first=batch_first), 3, 4)
    alone = case._replace(x=case.x[:1], y=case.y[:1])
    assert error(measure(alone, kind=kind).diagonal(), truth(alone).diagonal(kind)) < 1e-10


# What cannot be read off an operation


def shuffled(p, x):
    """Put the tokens of all observations into one random order, and back."""
    tokens = x.reshape(-1, x.shape[-1])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(len(tokens)))
    mapped = F.linear(tokens[order], p.w, p.b)
    return mapped[order.argsort()].reshape(*x.shape[:-1], -1)


FLATTENED = {
    "observations first": lambda p, x: F.linear(x.reshape(-1, 2), p.w, p.b).reshape(len(x), -1, 3),
    "positions first": lambda p, x: (
        F.linear(x.mT.movedim(-1, 0).reshape(-1, 2), p.w, p.b)
        .reshape(x.shape[1], -1, 3)
        .transpose(0, 1)
    ),
    "shuffled": shuffled,
}


@pytest.mark.parametrize("positions", [1, 3, N])
@pytest.mark.parametrize("order", FLATTENED)
def test_flattened_tokens_may_stand_in_any_order(order, positions):
    case = reading(partial(Functional, FLATTENED[order], w=(3, 2), b=(3,)), positions, 2)
    assert_right(case)


@pytest.mark.parametrize("by_index", [True, False])
def test_tokens_may_be_routed_to_experts(by_index):
    """As many tokens may reach an expert as there are observations, but not one of each."""
    case = reading(lambda: Experts(by_index), 3, 4)
    tokens = case.x.reshape(-1, 4)
    chosen = case.model.body.router(tokens).argmax(-1)
    assert len(set(chosen.bincount().tolist())) > 1
    assert_right(case)


class Opaque(torch.autograd.Function):
    """A linear map that neither a watcher of operations nor vmap can see into."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.mT @ x


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor):
    return torch.matmul(x, weight.t())


@pytest.mark.parametrize(
    "unseen", [HiddenLinear.apply, Opaque.apply, scripted], ids=["with vmap", "opaque", "scripted"]
)
def test_operations_of_ones_own_are_seen(unseen):
    """One weight is used unseen only, the other one also seen."""
    body = partial(
        Functional,
        lambda p, x: F.linear(torch.tanh(unseen(x, p.w)), p.both) + unseen(x, p.both),
        w=(4, 4),
        both=(3, 4),
    )
    case = reading(body, 4)
    assert_right(case)
    assert measure(case).diagonal()["body.w"].min() > 0


def test_a_compiled_model_is_no_different():
    """Compiled by the caller, it is still computed operation by operation here."""
    case = reading(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), 3, 4)
    expected = measure(case).diagonal()
    model = torch.compile(case.model, backend="eager")
    model(case.x)
    found = measure(case._replace(model=model)).diagonal()
    assert same({name.removeprefix("_orig_mod."): v for name, v in found.items()}, expected)


def test_reentrant_checkpoints_are_refused_by_name():
    case = reading(lambda: Saving(reentrant=True), 3, 4)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        measure(case)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "poisson", Gaussian(sigma=0.3)])
def test_every_likelihood_has_an_exact_information(likelihood, structure):
    case = ZOO["conv2d"]()._replace(likelihood=likelihood, y=torch.ones(N, CLASSES).double())
    found = measure(case, 7, structure=structure)
    slow = truth(case)
    assert error(found.diagonal(), slow.diagonal("exact")) < 1e-10
    if structure == "dense":
        assert relative_error(found.to_dense(), slow.dense("exact")) < 1e-10


def test_a_parameter_may_be_table_weight_and_data_at_once():
    """Looked up, multiplied by from both sides, and penalised."""
    body = partial(
        Functional,
        lambda p, x: (
            F.linear(torch.tanh(F.embedding(x, p.w)), p.w)
            + torch.tanh(F.embedding(x, p.w) @ p.w.T)
            + p.w.square().mean()
        ),
        w=(5, 3),
    )
    case = seeded(lambda: read(body(), torch.randint(0, 5, (N, 4))))
    assert_right(case)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.5}, "Embedding 'body' has max_norm=0.5: it changes its own parameter"),
        ({"scale_grad_by_freq": True}, "Embedding 'body' has scale_grad_by_freq=True"),
    ],
)
def test_an_embedding_without_scores_is_refused_and_left_alone(options, message):
    def make():
        case = read(nn.Embedding(5, 3, **options), torch.randint(0, 5, (N, 4)))
        case.model.body.weight.data.mul_(3)
        return case

    case = seeded(make)
    before = trace_of(case.model)
    with pytest.raises(ValueError, match=message):
        measure(case)
    assert same(trace_of(case.model), before)
