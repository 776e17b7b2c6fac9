"""The front door: right for any model, whatever the batches, and without a trace."""

import copy
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import fisher_information
from ewc_lib.fisher.estimate import STRUCTURES
from ewc_lib.fisher.sums.kronecker import MAX_VECTOR
from ewc_lib.likelihood.outputs import Categorical, Gaussian
from ewc_lib.score import gradcheck
from tests.scenarios import (
    BATCH_SIZES,
    CLASSES,
    LOOPED,
    PROPERTY,
    SCENARIOS,
    Bag,
    N,
    Scenario,
    cut,
    definition,
    estimate,
    oracle,
    relative_error,
    same,
    slow_path_allowed,
    trace_of,
)

DETERMINISTIC = ("exact", "empirical")
RANDOM = ("sketch", "sampled")
LIKELIHOODS = ("mlp_categorical", "mlp_bernoulli", "mlp_gaussian", "mlp_poisson")


def flat(values):
    return torch.cat([value.reshape(-1) for value in values.values()])


# The engine against the definitions, and against closed forms


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("name", SCENARIOS)
def test_agrees_with_the_definition_at_every_batch_size(name, kind):
    case, expected = SCENARIOS[name](), oracle(name, kind)
    sizes = BATCH_SIZES if name not in LOOPED or kind == "empirical" else (N,)
    for size in sizes:
        diagonal = estimate(case, size, kind=kind)
        dense = estimate(case, size, kind=kind, structure="dense")
        assert relative_error(flat(diagonal.diagonal()), expected.diagonal()) < 1e-10
        assert relative_error(dense.to_dense(), expected) < 1e-10
        assert (diagonal.n_samples, diagonal.kind) == (N, kind)


def generic(*patterns):
    return dict.fromkeys(patterns, "generic")


PATHS = {
    "mlp_categorical": {},
    "cnn_with_norms": {},
    "embedding": {},
    "embedding_with_padding": {},
    "embedding_bag": {},
    "tied_weights": {},
    "module_called_twice": {},
    "raw_parameters": {},
    "addmm": {},
    "flattened_positions": {},
    "frozen_parameters": {},
    "positions_in_a_plane": {},
    "sequence_of_labels": {},
    "attention": {},
    "multihead_attention": {},
    "sequence_first": {},
    "position_embedding": {},
    "functional_convolution": {},
    "circular_convolution": {},
    "grouped_convolution": {},
    "linear_and_einsum": {},
    "weight_norm": {},
    "custom_function": generic("unseen", "both"),
    "lstm": {},
    "checked_inputs": {"unseen": "loop"},
}


@pytest.mark.parametrize("name", PATHS)
def test_takes_the_generic_path_where_no_rule_is_right_and_nowhere_else(name):
    paths = estimate(SCENARIOS[name](), kind="empirical").paths
    assert paths == dict.fromkeys(paths, "rule") | PATHS[name]


def regression(likelihood, y, n_outputs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(y), 3, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, n_outputs, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return Scenario(model, x, likelihood, y)


def information_of_linear_outputs(case, h):
    """Sum over observations of ``h ⊗ (x, 1)(x, 1)ᵀ``, weights before biases."""
    x, (n_outputs, n_inputs) = case.x, case.model.weight.shape
    with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
    matrix = torch.einsum("njk,na,nb->jakb", h, with_one, with_one) / len(x)
    size = n_outputs * (n_inputs + 1)
    order = torch.arange(size).reshape(n_outputs, n_inputs + 1)
    order = torch.cat([order[:, :-1].reshape(-1), order[:, -1]])
    return matrix.reshape(size, size)[order][:, order]


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", Gaussian(sigma=0.3), "poisson"])
def test_matches_the_closed_form_of_a_generalised_linear_model(likelihood):
    shape = (9,) if likelihood == "categorical" else (9, 4)
    y = torch.zeros(shape, dtype=torch.long if likelihood == "categorical" else torch.float64)
    case = regression(likelihood, y, 4)
    f = case.model(case.x).detach()
    p = f.softmax(-1)
    variances = {
        "categorical": p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1),
        "bernoulli": (f.sigmoid() * (1 - f.sigmoid())).diag_embed(),
        "poisson": f.exp().diag_embed(),
        Gaussian(sigma=0.3): torch.full_like(f, 1 / 0.09).diag_embed(),
    }
    expected = information_of_linear_outputs(case, variances[likelihood])
    found = estimate(case, structure="dense").to_dense()
    assert relative_error(found, expected) < 1e-10
    assert relative_error(flat(estimate(case).diagonal()), expected.diagonal()) < 1e-10


def test_matches_the_closed_form_of_a_learned_variance():
    def likelihood(f):
        return torch.distributions.Normal(f[:, 0], f[:, 1].exp())

    case = regression(likelihood, torch.zeros(9, dtype=torch.float64), 2)
    f = case.model(case.x).detach()
    h = torch.stack([(-2 * f[:, 1]).exp(), torch.full((9,), 2.0).double()], 1).diag_embed()
    expected = information_of_linear_outputs(case, h)
    for size in (1, 4, 9):
        found = estimate(case, size, structure="dense").to_dense()
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("likelihood", "bias", "kind"), [("poisson", 720.0, "exact"), ("gaussian", 1e200, "empirical")]
)
def test_sums_that_overflow_are_refused_by_name(likelihood, bias, kind, structure):
    model = nn.Linear(3, 2).double()
    nn.init.constant_(model.bias, bias)
    data = torch.ones(4, 3).double(), torch.zeros(4, 2).double()
    with pytest.raises(
        ValueError, match="information of parameter 'weight' is not finite in float64"
    ):
        fisher_information(model, data, likelihood, kind=kind, structure=structure)


def test_parameters_of_a_gaussian_mean_have_the_same_information_whatever_the_data():
    case = regression(Gaussian(sigma=2.0), torch.randn(9, 1), 1)
    found = estimate(case, params=["bias"]).diagonal()["bias"]
    assert torch.allclose(found, torch.tensor([0.25], dtype=torch.float64), rtol=1e-12, atol=0)


# Masked positions


def masked_sequence():
    case = SCENARIOS["sequence_of_labels"]()
    x = torch.cat([case.x, case.x.flip(0)], 1)
    y = torch.cat([case.y, case.y.flip(0)], 1)
    keep = torch.rand(y.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[0] = False
    return case._replace(x=x, y=y.masked_fill(~keep, -100)), keep


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_masked_positions_do_not_count(kind):
    case, keep = masked_sequence()
    expected = 0.0
    for x, y, mask in zip(case.x, case.y, keep, strict=True):
        if mask.any():  # an observation without a label has no score
            alone = case._replace(x=x[mask].unsqueeze(0), y=y[mask].unsqueeze(0))
            expected = expected + definition(alone, kind) / N
    for size in BATCH_SIZES:
        found = estimate(case, size, kind=kind, structure="dense").to_dense()
        assert relative_error(found, expected) < 1e-10


def test_another_label_can_mark_the_positions_that_do_not_count():
    case, keep = masked_sequence()
    other = case._replace(likelihood=Categorical(ignore_index=-1), y=case.y.where(keep, -1))
    assert same(estimate(other).diagonal(), estimate(case).diagonal())


@pytest.mark.parametrize("kind", RANDOM)
def test_random_kinds_skip_masked_positions(kind):
    case, _ = masked_sequence()
    z = z_scores(case, kind=kind, draws=4)
    assert z.abs().max() < 4


# Random kinds


def z_scores(case, repeats=200, structure="diagonal", **options):
    """How many standard errors the mean of repeated estimates is off, entry by entry."""
    found = torch.stack(
        [
            estimate(
                case, structure=structure, generator=torch.Generator().manual_seed(seed), **options
            ).to_dense()
            for seed in range(repeats)
        ]
    )
    expected = estimate(case, structure=structure).to_dense()
    error = found.std(0) / repeats**0.5
    random = error > 1e-12 * expected.abs().max()
    assert torch.allclose(found[0][~random], expected[~random], rtol=1e-9, atol=1e-15)
    return ((found.mean(0) - expected) / error)[random]


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_random_kinds_are_unbiased_for_the_exact_diagonal(name, kind):
    z = z_scores(SCENARIOS[name](), kind=kind)
    assert z.numel() >= 25  # all of the first layer
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("kind", RANDOM)
def test_random_kinds_are_unbiased_for_the_exact_matrix(kind):
    z = z_scores(SCENARIOS["mlp_categorical"](), kind=kind, structure="dense", draws=2)
    assert z.abs().max() < 4.5
    assert 0.5 < z.square().mean().sqrt() < 1.5


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", ["cnn_with_norms", "tied_weights"])
def test_random_kinds_are_unbiased_on_the_generic_path_and_for_shared_weights(name, kind):
    z = z_scores(SCENARIOS[name](), repeats=60, kind=kind, draws=4)
    assert z.abs().max() < 4


@pytest.mark.parametrize("kind", RANDOM)
def test_more_draws_divide_the_variance(kind):
    case = SCENARIOS["mlp_categorical"]()
    expected = flat(estimate(case).diagonal())

    def error(draws):
        found = [
            flat(
                estimate(
                    case, kind=kind, draws=draws, generator=torch.Generator().manual_seed(seed)
                ).diagonal()
            )
            for seed in range(60)
        ]
        return (torch.stack(found) - expected).square().sum(1).mean()

    assert 6 < error(1) / error(10) < 16


def test_a_sketch_of_two_classes_is_exact():
    case = regression("categorical", torch.zeros(9, dtype=torch.long), 2)
    sketch, exact = (estimate(case, kind=k, structure="dense") for k in ("sketch", "exact"))
    assert relative_error(sketch.to_dense(), exact.to_dense()) < 1e-12


def test_a_sketch_stays_right_where_the_model_is_confident():
    case = regression("categorical", torch.zeros(9, dtype=torch.long), 4)
    with torch.no_grad():
        case.model.bias[0] += 80
    ratio = estimate(case, kind="sketch", draws=300).trace() / estimate(case).trace()
    assert abs(ratio - 1) < 0.1


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", [*LIKELIHOODS, "sequence_of_labels"])
def test_random_kinds_do_not_depend_on_the_batches(name, kind, structure):
    case = SCENARIOS[name]()

    def seeded(size):
        generator = torch.Generator().manual_seed(5)
        options = {"kind": kind, "structure": structure, "draws": 3, "generator": generator}
        return estimate(case, size, **options).to_dense()

    for size in BATCH_SIZES:
        assert relative_error(seeded(size), seeded(N)) < 1e-12


@pytest.mark.parametrize("kind", RANDOM)
def test_random_kinds_repeat_by_default_and_follow_a_generator(kind):
    case = SCENARIOS["mlp_categorical"]()
    first = estimate(case, kind=kind).diagonal()
    torch.rand(3)
    assert same(estimate(case, kind=kind).diagonal(), first)
    generator = torch.Generator().manual_seed(1)
    again = [estimate(case, kind=kind, generator=generator).diagonal() for _ in range(2)]
    assert not same(again[0], first)
    assert not same(again[0], again[1])


# Batches


@PROPERTY
@given(st.lists(st.integers(1, N), min_size=1, max_size=N), st.permutations(range(N)))
def test_the_result_does_not_depend_on_how_the_data_are_cut_and_ordered(sizes, order):
    case = SCENARIOS["sequence_first"]()
    data = cut(case.x[list(order)], case.y[list(order)], *sizes)
    for kind in DETERMINISTIC:
        found = fisher_information(case.model, data, kind=kind, structure="dense")
        assert relative_error(found.to_dense(), oracle("sequence_first", kind)) < 1e-10


def test_the_same_observations_twice_have_the_same_mean():
    case = SCENARIOS["mlp_categorical"]()
    twice = case._replace(x=torch.cat([case.x, case.x]), y=torch.cat([case.y, case.y]))
    assert relative_error(estimate(twice).to_dense(), estimate(case).to_dense()) < 1e-12
    assert estimate(twice).n_samples == 2 * N


@pytest.mark.parametrize("n_samples", [1, 3, 7, N])
@pytest.mark.parametrize("size", BATCH_SIZES)
def test_n_samples_are_used_exactly(n_samples, size):
    case = SCENARIOS["mlp_categorical"]()
    first = case._replace(x=case.x[:n_samples], y=case.y[:n_samples])
    found = estimate(case, size, n_samples=n_samples)
    assert found.n_samples == n_samples
    assert relative_error(found.to_dense(), estimate(first).to_dense()) < 1e-12


def test_no_batch_is_asked_for_after_n_samples():
    case = SCENARIOS["mlp_categorical"]()

    def data():
        yield from cut(case.x, case.y, 4)[:1]
        raise AssertionError("one batch too many")

    assert fisher_information(case.model, data(), n_samples=4).n_samples == 4


def test_an_empty_batch_among_others_changes_nothing():
    case = SCENARIOS["mlp_categorical"]()
    data = [(case.x[:0], case.y[:0]), (case.x, case.y), (case.x[:0], case.y[:0])]
    assert same(fisher_information(case.model, data).diagonal(), estimate(case).diagonal())


def test_data_come_as_loader_generator_list_tuple_or_dict():
    case = SCENARIOS["mlp_categorical"]()
    dataset = TensorDataset(case.x, case.y)
    forms = {
        "loader": DataLoader(dataset, batch_size=3),
        "shuffled": DataLoader(dataset, batch_size=3, shuffle=True),
        "generator": (batch for batch in cut(case.x, case.y, 3)),
        "list": [list(batch) for batch in cut(case.x, case.y, 3)],
        "tuple": (case.x, case.y),
        "dict": [{"input": x, "labels": y} for x, y in cut(case.x, case.y, 3)],
    }
    for data in forms.values():
        found = fisher_information(case.model, data)
        assert relative_error(found.to_dense().diagonal(), expected_diagonal(case)) < 1e-10


def expected_diagonal(case):
    return definition(case, "exact").diagonal()


class TwoInputs(nn.Module):
    """A model as language-model libraries build them: named inputs, an object as output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, CLASSES)
        self.norm = nn.LayerNorm(3)
        self.double()

    def forward(self, input_ids, attention_mask):
        h = self.norm(self.table(input_ids)) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(h.sum(1)), loss=None)


def test_several_inputs_come_as_dict_or_tuple_and_outputs_may_carry_logits():
    generator = torch.Generator().manual_seed(0)
    model = TwoInputs()
    ids = torch.randint(0, 5, (N, 4), generator=generator)
    mask = torch.randint(0, 2, (N, 4), generator=generator).double()
    y = torch.randint(0, CLASSES, (N,), generator=generator)
    expected = definition(Scenario(model, (ids, mask), "categorical", y), "exact")
    as_tuple = cut((ids, mask), y, 3)
    as_dict = [{"input_ids": x[0], "attention_mask": x[1], "labels": t} for x, t in as_tuple]
    nested = [({"input_ids": x[0], "attention_mask": x[1]}, t) for x, t in as_tuple]
    for data in (as_tuple, as_dict, nested, ((ids, mask), y)):
        found = fisher_information(model, data, structure="dense")
        assert relative_error(found.to_dense(), expected) < 1e-10


# Parameters and precision


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (["2.bias"], ["2.bias"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["2.bias", "*.weight"], ["0.weight", "2.weight", "2.bias"]),
        (lambda name, p: p.dim() == 1, ["0.bias", "2.bias"]),
    ],
)
def test_params_choose_blocks_of_the_whole_matrix(params, names):
    case = SCENARIOS["mlp_categorical"]()
    found = estimate(case, params=params, structure="dense")
    sizes = {name: p.numel() for name, p in case.model.named_parameters()}
    chosen = torch.cat([torch.full((n,), name in names) for name, n in sizes.items()])
    expected = oracle("mlp_categorical", "exact")[chosen][:, chosen]
    assert list(found.diagonal()) == names
    assert relative_error(found.to_dense(), expected) < 1e-10


def test_keys_and_shapes_are_those_of_the_trainable_parameters():
    for make in SCENARIOS.values():
        case = make()
        parameters = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
        diagonal = estimate(case, kind="empirical").diagonal()
        assert {n: d.shape for n, d in diagonal.items()} == {
            n: p.shape for n, p in parameters.items()
        }
        assert list(diagonal) == list(parameters)
        assert all(d.dtype == torch.float64 and not d.requires_grad for d in diagonal.values())


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize(
    ("parameters", "asked", "sums"),
    [
        (torch.float64, None, torch.float64),
        (torch.float32, None, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sums_have_the_precision_asked_for_and_at_least_single(
    parameters, asked, sums, structure, precision
):
    case = SCENARIOS["attention"]()
    case = case._replace(model=case.model.to(parameters), x=case.x.to(parameters))
    found = estimate(case, dtype=asked, structure=structure, precision=precision)
    assert all(d.dtype == sums for d in found.diagonal().values())
    error = relative_error(found.to_dense().double().diagonal(), oracle_of_attention())
    assert error < 20 * torch.finfo(parameters).eps + 1e-10


def oracle_of_attention():
    return oracle("attention", "exact").diagonal()


class Einsum(nn.Module):
    """A linear map on the generic path."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("ni,oi->no", x, self.weight)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "scale"),
    [(nn.Linear(3, 4, bias=False), 1e-5), (Einsum(), 0.1)],
    ids=["rule", "generic path"],
)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_squares_do_not_underflow_in_half_precision(model, scale, half, structure, precision):
    """Gradients so small that float16 holds none of their squares.

    By a rule they are not even formed in half precision.
    """
    x = scale * torch.linspace(0.5, 1.5, 27, dtype=torch.float64).reshape(9, 3)
    case = Scenario(copy.deepcopy(model).double(), x, Gaussian(sigma=1000.0), torch.zeros(9, 4))
    expected = estimate(case, structure=structure).diagonal()["weight"]
    half_case = case._replace(model=copy.deepcopy(model).to(half), x=x.to(half))
    found = estimate(half_case, structure=structure, precision=precision)
    found = found.diagonal()["weight"].double()
    assert torch.allclose(found, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["exact", "sketch"])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_unlikely_classes_count_in_half_precision(kind, half, precision):
    """Probabilities around 1e-9, which float16 rounds to zero, have roots that it holds."""
    case = regression("categorical", torch.zeros(9, dtype=torch.long), 2)
    with torch.no_grad():
        case.model.bias.copy_(torch.tensor([20.0, 0.0]))
        case.model.weight.mul_(0.01)
    expected = estimate(case).diagonal()["bias"]
    case.model.to(half)
    found = estimate(case._replace(x=case.x.to(half)), kind=kind, precision=precision)
    found = found.diagonal()["bias"].double()
    assert torch.allclose(found, expected, rtol=0.1, atol=0)


class Upcast(nn.Module):
    """Half-precision parameters with a head in another precision, and outputs in a third."""

    def __init__(self, half, output):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5, dtype=half)
        self.norm = nn.LayerNorm(5, dtype=half)
        self.head = nn.Linear(5, CLASSES)
        self.output = output

    def forward(self, x):
        h = self.norm(self.layer(x)).to(self.head.weight.dtype)
        return self.head(h).to(self.output)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precisions_may_be_mixed_in_one_model(half, output, structure, precision):
    case = SCENARIOS["mlp_categorical"]()
    model = Upcast(half, output)
    x = case.x.to(half)
    found = fisher_information(model, (x, case.y), structure=structure, precision=precision)
    expected = fisher_information(copy.deepcopy(model).float(), (x.float(), case.y))
    assert all(d.dtype == torch.float32 for d in found.diagonal().values())
    assert relative_error(flat(found.diagonal()), flat(expected.diagonal())) < 0.05


def test_autocasting_by_the_caller_changes_nothing():
    case = SCENARIOS["attention"]()
    case = case._replace(model=case.model.float(), x=case.x.float())
    expected = estimate(case).diagonal()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimate(case).diagonal()
        assert case.model(case.x).dtype == torch.bfloat16
    assert same(found, expected)


# No trace


def busy_model():
    """A model with everything that could be touched."""
    case = SCENARIOS["cnn_with_norms"]()
    model = nn.Sequential(case.model, nn.Dropout(0.5))
    model.train()
    model[0][1].eval()
    model[0][0].weight.requires_grad_(False)
    model[0][3].weight.grad = torch.ones_like(model[0][3].weight)
    model[0][6].register_forward_hook(lambda *_: None)
    return case._replace(model=model)


class Counting(nn.Module):
    """Buffers that the forward pass changes even in eval mode: in place, and by a new one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().sum()
        return x


def busy_case():
    """A model with everything that could be touched, in a mixture of modes."""
    case = SCENARIOS["cnn_with_norms"]()
    model = nn.Sequential(case.model, nn.Dropout(0.5), Counting())
    model.train()
    model[0][1].eval()
    model[0][0].weight.requires_grad_(False)
    model[0][3].weight.grad = torch.ones_like(model[0][3].weight)
    model[0][6].register_forward_hook(lambda *_: None)
    model[0][6].weight.register_hook(lambda g: g)
    return case._replace(model=model)


BAD_LABEL = "label 9 of observation 6 is outside"


@pytest.mark.parametrize("bad", [False, True], ids=["success", "exception in the second batch"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@pytest.mark.parametrize("kind", [*DETERMINISTIC, *RANDOM])
def test_leaves_no_trace(kind, structure, mode, bad):
    case = busy_case()
    y = case.y.clone()
    y[6] = 9 if bad else y[6]
    data = cut(case.x, y, 5)
    with mode():
        before = trace_of(case.model), copy.deepcopy(data)
        if bad:
            with pytest.raises(ValueError, match=BAD_LABEL), slow_path_allowed():
                fisher_information(case.model, data, kind=kind, structure=structure)
        else:
            with slow_path_allowed():
                fisher_information(case.model, data, kind=kind, structure=structure)
        assert same((trace_of(case.model), data), before)


def test_a_shuffling_loader_leaves_the_global_random_state_alone():
    case = SCENARIOS["mlp_categorical"]()
    before = torch.get_rng_state()
    fisher_information(
        case.model, DataLoader(TensorDataset(case.x, case.y), batch_size=3, shuffle=True)
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_works_inside_inference_mode_and_its_result_outside(structure):
    case = SCENARIOS["attention"]()
    with torch.inference_mode():
        found = estimate(case, structure=structure)
    assert same(found.to_dense(), estimate(case, structure=structure).to_dense())
    v = {name: torch.ones_like(d, requires_grad=True) for name, d in found.diagonal().items()}
    found.quadratic(v).backward()
    assert all(t.grad is not None for t in v.values())


def test_dropout_is_off_and_batch_statistics_are_frozen():
    case = SCENARIOS["cnn_with_norms"]()
    expected = estimate(case).diagonal()
    case.model.insert(6, nn.Dropout(0.9))
    case.model.train()
    found = estimate(case).diagonal()
    assert same(list(found.values()), list(expected.values()))


# Nothing is dropped in silence


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.idle = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_an_unused_parameter_has_no_information_and_is_reported(structure):
    case = SCENARIOS["mlp_categorical"]()
    found = estimate(case._replace(model=Unused()), structure=structure)
    assert found.diagonal()["idle"].tolist() == [0, 0]
    rows = {row.parameter: row for row in found.report()}
    assert {name: row.path for name, row in rows.items()} == {
        "idle": "unused",
        "layer.weight": "rule",
        "layer.bias": "rule",
    }
    assert rows["idle"].share == 0


@pytest.mark.parametrize("cut_off", [torch.no_grad, None], ids=["no_grad", "detach"])
def test_a_model_that_cuts_its_graph_has_no_information_and_is_reported(cut_off):
    class Cut(Unused):
        def forward(self, x):
            if cut_off is None:
                return self.layer(x).detach()
            with cut_off():
                return self.layer(x)

    found = estimate(SCENARIOS["mlp_categorical"]()._replace(model=Cut()))
    assert found.trace() == 0
    assert set(found.paths.values()) == {"unused"}
    assert [row.share for row in found.report()] == [0, 0, 0]


@pytest.mark.parametrize("name", ["cnn_with_norms", "lstm", "tied_weights"])
def test_the_report_shares_out_the_whole_trace(name):
    case = SCENARIOS[name]()
    found = estimate(case)
    report = found.report()
    assert [row.parameter for row in report] == list(found.diagonal())
    assert sum(row.share for row in report) == pytest.approx(1)
    for row in report:
        expected = float(found.diagonal()[row.parameter].sum() / found.trace())
        assert row.share == pytest.approx(expected)
        assert row.path == found.paths[row.parameter]


def test_the_report_tells_which_parameters_of_a_structure_have_only_a_diagonal():
    """As the documentation of the structures says it, one kind of parameter after another."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.norm = nn.LayerNorm(4)
            self.grouped = nn.Conv1d(4, 4, 2, groups=2)
            self.back = nn.ConvTranspose1d(4, 4, 2)
            self.cell = nn.LSTM(4, 4, batch_first=True)
            self.product = nn.Parameter(torch.randn(4, 4))
            self.head = nn.Linear(4, CLASSES)
            self.head.long = nn.Parameter(torch.ones(MAX_VECTOR + 1))
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, words):
            x = self.back(self.grouped(self.norm(self.table(words)).mT))
            x, _ = self.cell(torch.einsum("nct,cd->ntd", x, self.product))
            return self.head(x[:, -1]) + self.head.long.mean()

    words, y = torch.arange(12).reshape(4, 3) % 5, torch.zeros(4, dtype=torch.long)
    with slow_path_allowed():
        for structure, factors in (("kronecker", "kronecker"), ("eigenkronecker",) * 2):
            found = fisher_information(Kinds(), (words, y), structure=structure)
            kept = {row.parameter: row.keeps for row in found.report()}
            assert kept == {
                "product": "diagonal",
                "idle": "block",
                "table.weight": "diagonal",
                "norm.weight": "block",
                "norm.bias": "block",
                "grouped.weight": factors,
                "grouped.bias": factors,
                "back.weight": factors,
                "back.bias": "block",
                "cell.weight_ih_l0": factors,
                "cell.weight_hh_l0": factors,
                "cell.bias_ih_l0": factors,
                "cell.bias_hh_l0": factors,
                "head.long": "diagonal",
                "head.weight": factors,
                "head.bias": factors,
            }


def test_the_key_bias_of_attention_has_no_information():
    """It moves all scores of a query alike, and the softmax does not see that."""
    found = estimate(SCENARIOS["attention"]()).diagonal()
    assert found["key.bias"].abs().max() < 1e-28
    assert found["query.bias"].max() > 1e-6


class Expert(nn.Module):
    """A second expert that only observations with a large first input reach."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.unseen = nn.Parameter(torch.randn(CLASSES, 4))
        self.double()

    def forward(self, x):
        chosen = x[:, :1] > 5
        if not chosen.any():
            return self.layer(x)
        return self.layer(x) + chosen * torch.einsum("ni,oi->no", x, self.unseen)


def test_a_parameter_that_only_a_later_batch_uses_counts():
    case = SCENARIOS["mlp_categorical"]()
    x = case.x.clone()
    x[-1, 0] = 6
    late = case._replace(model=Expert(), x=x)
    early = late._replace(x=x.flip(0), y=case.y.flip(0))
    found, expected = estimate(late, 4), estimate(early, 4)
    assert found.diagonal()["unseen"].max() > 0
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-12


def test_an_unseen_use_that_is_blank_at_first_does_not_go_unnoticed():
    """As long as its second input is zero, the operation without a rule has no gradient."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(CLASSES, 4, dtype=torch.float64))

        def forward(self, x, z):
            return F.linear(x, self.weight) + torch.einsum("ni,oi->no", z, self.weight)

    case = SCENARIOS["mlp_categorical"]()
    z = case.x.flip(1).clone()
    z[:4] = 0
    late = Scenario(Both(), (case.x, z), "categorical", case.y)
    found = estimate(late, 4, structure="dense")
    assert relative_error(found.to_dense(), definition(late, "exact")) < 1e-10


def test_a_parameter_whose_use_is_thrown_away_has_no_information():
    class Wasteful(Unused):
        def forward(self, x):
            x + self.idle.repeat(2)
            F.linear(x, self.layer.weight, self.layer.bias)
            return F.linear(x, self.layer.weight)

    found = estimate(SCENARIOS["mlp_categorical"]()._replace(model=Wasteful())).diagonal()
    assert found["layer.bias"].tolist() == [0] * CLASSES
    assert found["idle"].tolist() == [0, 0]
    assert found["layer.weight"].max() > 0


def test_a_blank_first_batch_does_not_settle_the_layout():
    """On zeros every reading of the axes gives a gradient of zero for the first weight."""
    case = SCENARIOS["sequence_first"]()
    blank = torch.zeros_like(case.x)
    first, last = (
        fisher_information(case.model, [(x, case.y) for x in order], structure="dense")
        for order in ((blank, case.x), (case.x, blank))
    )
    assert relative_error(first.to_dense(), last.to_dense()) < 1e-10


# Models that mix observations


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, CLASSES)
        self.double()

    def forward(self, x):
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0)))


class InputCentred(Unused):
    def forward(self, x):
        return self.layer(x - x.mean(0))


class Noisy(Unused):
    def forward(self, x):
        return F.dropout(self.layer(x), training=True)


class UnseenNoise(Unused):
    """Random numbers in the way of an operation without a rule."""

    def forward(self, x):
        x = F.dropout(x, training=True)
        return torch.einsum("ni,oi,i->no", x, self.layer.weight, torch.ones_like(x[0]))


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        (Centred, None, "the gradient of parameter 'first.weight' is not a sum"),
        (UnseenNoise, None, "the gradient of parameter 'layer.weight' is not a sum"),
        (Centred, ["second.bias"], "the output of some of them is another"),
        (InputCentred, None, "the output of some of them is another"),
        (Noisy, None, "the output of some of them is another"),
    ],
)
def test_a_model_that_mixes_observations_is_refused(model, params, message):
    case = SCENARIOS["mlp_categorical"]()._replace(model=model())
    before = trace_of(case.model)
    with pytest.raises(ValueError, match=f"the model mixes observations: {message}"):
        estimate(case, params=params)
    assert same(trace_of(case.model), before)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_batch_normalisation_without_running_statistics_is_refused_by_name(layer):
    case = SCENARIOS["mlp_categorical"]()
    case.model.insert(1, layer(5, track_running_stats=False).double())
    with pytest.raises(ValueError, match=rf"{layer.__name__} '1' has no running statistics"):
        estimate(case)


def test_an_instance_normalisation_is_no_batch_normalisation():
    case = SCENARIOS["functional_convolution"]()
    model = nn.Sequential(nn.InstanceNorm1d(2, affine=True), case.model).double()
    case = case._replace(model=model)
    found = estimate(case, structure="dense")
    assert relative_error(found.to_dense(), definition(case, "exact")) < 1e-10


# One observation at a time


def test_a_model_that_vmap_cannot_follow_warns_once_where_it_was_called():
    case = SCENARIOS["checked_inputs"]()
    with pytest.warns(
        RuntimeWarning, match="vmap cannot follow Checked.*one observation"
    ) as caught:
        fisher_information(case.model, cut(case.x, case.y, 3))
    (warning,) = (w for w in caught if w.category is RuntimeWarning)
    assert warning.filename == __file__


# Bad input


def bad_parameter(case, value=torch.nan):
    with torch.no_grad():
        case.model[2].bias[1] = value
    return case


def bad_input(case):
    case.x[5, 2] = torch.nan
    return case


class NotFinite(nn.Module):
    """Its output for one observation is NaN."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        return self.layer(x) / (x[:, :1] != 7)


def bad_output(case):
    case.x[6, 0] = 7
    return case._replace(model=NotFinite())


def bad_label(case, value):
    case.y[6] = value
    return case


def frozen(case):
    return case._replace(model=case.model.requires_grad_(False))


def empty(case):
    return case._replace(x=case.x[:0], y=case.y[:0])


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        return self.layer(x).mean(0, keepdim=True)


class Several(Unused):
    def forward(self, x):
        return [self.layer(x), x]


BAD = {
    "empty": (empty, {}, "data is empty"),
    "label too large": (lambda c: bad_label(c, 3), {}, "label 3 of observation 6 .* 3 classes"),
    "label negative": (lambda c: bad_label(c, -1), {}, "label -1 of observation 6"),
    "real labels": (
        lambda c: c._replace(y=c.y.double()),
        {},
        "must be integers, got torch.float64",
    ),
    "shape of labels": (lambda c: c._replace(y=c.y.unsqueeze(1)), {}, r"\(5, 3\) and \(5, 1\)"),
    "NaN in inputs": (bad_input, {}, "input of observation 5 holds NaN"),
    "NaN in outputs": (bad_output, {}, "output of observation 6 is not finite"),
    "NaN in parameters": (bad_parameter, {}, "parameter '2.bias' holds NaN"),
    "infinite parameter": (lambda c: bad_parameter(c, torch.inf), {}, "parameter '2.bias' holds"),
    "nothing trainable": (frozen, {}, "Sequential has no trainable parameter"),
    "unknown name": (None, {"params": ["2.biass"]}, "named '2.biass'; did you mean '2.bias'"),
    "unknown pattern": (None, {"params": "head.*"}, r"named 'head.\*'; the model has 0.weight"),
    "nothing chosen": (None, {"params": lambda name, p: False}, "chooses no parameter"),
    "n_samples zero": (None, {"n_samples": 0}, "n_samples must be at least 1, got 0"),
    "n_samples too many": (None, {"n_samples": 9}, "n_samples=9, but data holds only 8"),
    "unknown kind": (None, {"kind": "true"}, "kind must be one of 'exact', .*, got 'true'"),
    "unknown structure": (None, {"structure": "full"}, "structure must be one of .*, got 'full'"),
    "no draws": (None, {"draws": 0}, "draws must be at least 1, got 0"),
    "outputs pooled": (
        lambda c: c._replace(model=Pooled()),
        {},
        r"one row per .* got \(1, 3\)",
    ),
    "unknown likelihood": (lambda c: c._replace(likelihood="normal"), {}, "got 'normal'"),
    "several outputs": (lambda c: c._replace(model=Several()), {}, "must return a tensor"),
}


@pytest.mark.parametrize(("spoil", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_and_leaves_no_trace(spoil, options, message):
    case = SCENARIOS["mlp_categorical"]()
    case = spoil(case) if spoil else case
    case.model.train()
    before = trace_of(case.model)
    with pytest.raises((ValueError, TypeError), match=message):
        estimate(case, 5, **options)
    assert same(trace_of(case.model), before)


@pytest.mark.parametrize(
    ("likelihood", "target", "message"),
    [
        ("bernoulli", 2.0, "target 2 of observation 6 is outside the support of a Bernoulli"),
        ("poisson", -1.0, "target -1 of observation 6"),
        ("poisson", 0.5, "target 0.5 of observation 6"),
        ("gaussian", torch.inf, "target inf of observation 6"),
        ("gaussian", torch.nan, "target nan of observation 6"),
    ],
)
def test_a_target_outside_the_support_is_named(likelihood, target, message):
    case = SCENARIOS["mlp_bernoulli"]()._replace(likelihood=likelihood)
    case.y[6, 1] = target
    with pytest.raises(ValueError, match=message):
        estimate(case, 5)


def test_a_target_of_another_shape_is_refused_rather_than_broadcast():
    case = SCENARIOS["one_number_each"]()
    for y in (case.y.unsqueeze(1), case.y.expand(N, N)):
        with pytest.raises(ValueError, match=r"shape of the output, got .* and \(8,\)"):
            fisher_information(case.model, (case.x, y), case.likelihood)
    column = nn.Sequential(case.model, nn.Unflatten(0, (-1, 1)))
    with pytest.raises(ValueError, match=r"got \(8,\) and \(8, 1\)"):
        fisher_information(column, (case.x, case.y), case.likelihood)


def test_logits_of_minus_infinity_mask_classes_out_and_others_are_refused():
    case = SCENARIOS["mlp_categorical"]()
    forbidden = torch.zeros(CLASSES + 1, dtype=torch.float64)
    forbidden[-1] = -torch.inf

    class Masking(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.inner, self.value = case.model, value

        def forward(self, x):
            return torch.cat([self.inner(x), self.value.expand(len(x), 1)], 1)

    minus_infinity = torch.tensor(-torch.inf, dtype=torch.float64)
    masked = estimate(case._replace(model=Masking(minus_infinity))).diagonal()
    assert relative_error(flat(masked), flat(estimate(case).diagonal())) < 1e-12
    with pytest.raises(ValueError, match="output of observation 0 is not finite"):
        estimate(case._replace(model=Masking(-minus_infinity)))


BAD_DATA = {
    "empty list": ([], "data is empty"),
    "used-up iterator": (iter([]), "used up"),
    "dataset": (TensorDataset(torch.zeros(2, 4)), "got TensorDataset"),
    "one tensor": (torch.zeros(2, 4), "got Tensor"),
    "no labels": ([{"x": torch.zeros(2, 4)}], "batch 0 is a dict without 'labels'; it has .'x'"),
    "triple": ([(torch.zeros(2, 4),) * 3], "batch 0 must be a pair .* got 3 items"),
    "single observation": ([(torch.zeros(4), torch.tensor(0))], "batch 0 .* holds a 0-d tensor"),
    "numbers": ([(torch.zeros(2, 4), [0, 1])], "batch 0 must hold tensors"),
    "different lengths": ([(torch.zeros(2, 4), torch.zeros(3))], r"different lengths: \[2, 3\]"),
    "no targets": ([(torch.zeros(2, 4), torch.zeros(0))], "different lengths: .2, 0."),
    "tuple of different lengths": ((torch.zeros(2, 4), torch.zeros(3)), "different lengths"),
    "empty tuple of tensors": ((torch.zeros(0, 4), torch.zeros(0)), "data is empty"),
}


@pytest.mark.parametrize(("data", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_data_of_another_form_are_refused(data, message):
    model = nn.Linear(4, CLASSES)
    before = trace_of(model)
    with pytest.raises(ValueError, match=message):
        fisher_information(model, data)
    assert same(trace_of(model), before)


@pytest.mark.parametrize(
    ("shape", "n_columns"), [((1026,), 1025), ((2, 600), 1198), ((60_000,), 59_999)]
)
def test_too_many_exact_columns_are_refused_before_any_is_built(shape, n_columns):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.expand(len(x), *shape)

    x = torch.zeros(2, *[1] * len(shape))
    y = torch.zeros(2, *shape[:-1], dtype=torch.long)
    message = f"takes {n_columns} backward passes, more than 1024; kind='sketch'"
    with pytest.raises(ValueError, match=message):
        fisher_information(Wide(), (x, y))
    assert fisher_information(Wide(), (x, y), kind="sketch").n_samples == 2


def test_as_many_exact_columns_as_allowed_are_taken():
    x, y = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    model = nn.Linear(1, 1025, bias=False)
    p = model(x)[0].softmax(0)
    found = fisher_information(model, (x, y)).diagonal()["weight"].squeeze(1)
    assert torch.allclose(found, p * (1 - p), rtol=1e-4, atol=0)


# Further models


def test_sparse_gradients_of_an_embedding_are_no_different():
    case = SCENARIOS["embedding"]()
    sparse = Bag(sparse=True).double()
    sparse.load_state_dict(case.model.state_dict())
    found = estimate(case._replace(model=sparse), structure="dense")
    assert same(found.to_dense(), estimate(case, structure="dense").to_dense())


def test_checkpointed_layers_are_no_different():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    case = SCENARIOS["module_called_twice"]()
    found = estimate(case._replace(model=Checkpointed(case.model)))
    assert same(list(found.diagonal().values()), list(estimate(case).diagonal().values()))


def test_the_plan_for_one_batch_is_kept_for_the_others(monkeypatch):
    posed = []
    pose = gradcheck.GradientCheck.pose
    monkeypatch.setattr(
        gradcheck.GradientCheck, "pose", lambda *args: posed.append(len(args[0])) or pose(*args)
    )
    case = SCENARIOS["attention"]()
    estimate(case, 3)
    assert posed == [3, 2]  # the last one is checked in any case
    posed.clear()
    estimate(case, 1)  # a single observation settles nothing
    assert posed == [1] * N


class AutocastInside(nn.Module):
    """A model that computes its first part in bfloat16, as many recipes do."""

    def __init__(self, low_precision):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)
        self.low_precision = low_precision

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low_precision):
            features = self.body(x)
        return self.head(features.float())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_model_with_autocast_inside_is_close_to_full_precision(kind):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(2))
    low, full = (
        fisher_information(AutocastInside(low), (x, y), kind=kind).diagonal()
        for low in (True, False)
    )
    for name, values in full.items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name].sum(), values.sum(), rtol=0.05, atol=0.0)
