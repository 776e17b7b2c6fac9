"""The likelihood that is named is the one that is trained, or the model is refused."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ewc_lib import EWC, fisher_information
from ewc_lib.fisher import MatrixFree
from ewc_lib.likelihood import Categorical, Gaussian, agreement
from ewc_lib.likelihood.agreement import agreed
from ewc_lib.score import per_observation_gradients
from tests.scenarios import same, trace_of

transformers = pytest.importorskip("transformers")

N, T, WORDS, CLASSES = 5, 6, 11, 3

BERT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": WORDS,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
MIXTRAL = {
    **BERT,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "head_dim": 4,
}


def make(kind, config, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return found.double() if config != "MixtralConfig" else found


def draw(*shape, high=WORDS, seed=0):
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masked(labels, *gaps):
    labels = labels.clone()
    for gap in gaps:
        labels[gap] = -100
    return labels


TEXT = draw(N, T)
PROMPT = masked(TEXT, (slice(None), slice(2)), (1, slice(4)))
WORDS_OF_TEXT = masked(draw(N, T, high=CLASSES, seed=2), (slice(None), slice(4, None)), (0, 1))
FEW_WORDS = masked(TEXT, (slice(None), [0, 1, 3, 5]))
BITS = draw(N, CLASSES, high=3).double() - 1

MODELS = {
    "gpt2": (make, "GPT2LMHeadModel", "GPT2Config", GPT2, TEXT, "next-token"),
    "gpt2 after a prompt": (make, "GPT2LMHeadModel", "GPT2Config", GPT2, PROMPT, "next-token"),
    "mixtral": (make, "MixtralForCausalLM", "MixtralConfig", MIXTRAL, TEXT, "next-token"),
    "bert of texts": (
        make,
        "BertForSequenceClassification",
        "BertConfig",
        BERT | {"num_labels": CLASSES},
        draw(N, high=CLASSES),
        "categorical",
    ),
    "bert of one number": (
        make,
        "BertForSequenceClassification",
        "BertConfig",
        BERT | {"num_labels": 1},
        noise(N),
        "gaussian",
    ),
    "bert of three numbers": (
        make,
        "BertForSequenceClassification",
        "BertConfig",
        BERT | {"num_labels": 3, "problem_type": "regression"},
        noise(N, 3),
        "gaussian",
    ),
    "bert of several labels": (
        make,
        "BertForSequenceClassification",
        "BertConfig",
        BERT | {"num_labels": CLASSES},
        BITS,
        "bernoulli",
    ),
    "bert of words": (
        make,
        "BertForTokenClassification",
        "BertConfig",
        BERT | {"num_labels": CLASSES},
        WORDS_OF_TEXT,
        "categorical",
    ),
    "bert of masked words": (make, "BertForMaskedLM", "BertConfig", BERT, FEW_WORDS, "categorical"),
    "t5": (make, "T5ForConditionalGeneration", "T5Config", T5, PROMPT[:, :4], "categorical"),
    "bart": (
        make,
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        PROMPT[:, :4],
        "categorical",
    ),
    "blenderbot": (
        make,
        "BlenderbotForConditionalGeneration",
        "BlenderbotConfig",
        BART,
        PROMPT[:, :4],
        "categorical",
    ),
}


def build(name):
    """Return a model, a batch with labels, and the likelihood that it is trained by."""
    make, kind, config, options, labels, likelihood = MODELS[name]
    model = make(kind, config, **options)
    return model, {"input_ids": TEXT, "labels": labels}, likelihood


def scores_of_the_own_loss(model, batch):
    """Directions of the gradients of the model's own loss, one observation at a time."""
    model = copy.deepcopy(model).eval()
    rows = []
    for n in range(N):
        loss = model(**{key: value[n : n + 1] for key, value in batch.items()}).loss
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(model.parameters(), found, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        )
    return torch.stack(rows)


def sums_over_means(model, batch, likelihood):
    """How many times the sum of an observation's losses is the loss that the model returns."""
    labels = batch["labels"]
    if likelihood == "next-token":
        return (labels[:, 1:] != -100).sum(1).double()
    if likelihood == "gaussian":
        return torch.full((N,), labels[0].numel() / 2).double()  # half of the squared errors
    return (labels.reshape(N, -1) != -100).sum(1).double()


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_loss_of_the_model(name):
    model, batch, likelihood = build(name)
    (found,) = per_observation_gradients(model, [batch])
    found = torch.cat([g.flatten(1) for g in found.values()], 1)
    factor = sums_over_means(model, batch, likelihood).unsqueeze(1)
    expected = -factor * scores_of_the_own_loss(model, batch)
    rough = expected.dtype == torch.float32 or likelihood == "next-token"  # computed in float32
    exact = {"rtol": 1e-4, "atol": 1e-5} if rough else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found, expected.to(found), **exact)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
def test_the_likelihood_that_is_found_is_the_one_that_can_be_named(name, kind):
    model, batch, likelihood = build(name)
    found = fisher_information(model, [batch], kind=kind).diagonal()
    named = fisher_information(model, [batch], likelihood, kind=kind).diagonal()
    assert all(same(f, named[parameter]) for parameter, f in found.items())


@pytest.mark.parametrize("name", MODELS)
def test_looking_at_the_loss_leaves_no_trace(name):
    model, batch, _ = build(name)
    model.train()
    config, before, random = copy.deepcopy(model.config), trace_of(model), torch.get_rng_state()
    fisher_information(model, [batch], kind="empirical")
    assert model.config.to_dict() == config.to_dict()
    assert same(trace_of(model), before)
    assert same(torch.get_rng_state(), random)


def test_what_kind_of_problem_a_loss_has_seen_is_forgotten():
    model, batch, _ = build("bert of one number")
    fisher_information(model, [batch], kind="empirical")
    assert model.config.problem_type is None
    model(**batch)
    assert model.config.problem_type == "regression"


def test_ewc_and_products_go_by_the_loss_of_the_model():
    model, batch, _ = build("gpt2")
    ewc = EWC(model, strength=1.0, kind="sketch")
    expected = fisher_information(model, [batch], "next-token", kind="sketch").diagonal()
    assert all(same(f, expected[n]) for n, f in ewc.consolidate([batch]).diagonal().items())
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found, named = MatrixFree(model, [batch]) @ v, MatrixFree(model, [batch], "next-token") @ v
    assert all(same(f, named[n]) for n, f in found.items())


def test_data_that_can_be_read_once_lose_nothing():
    model, batch, _ = build("gpt2")
    halves = [
        {key: value[rows] for key, value in batch.items()} for rows in (slice(2), slice(2, N))
    ]
    whole = fisher_information(model, [batch], kind="empirical")
    once = fisher_information(model, iter(halves), kind="empirical")
    assert once.n_samples == N
    for name, f in whole.diagonal().items():
        torch.testing.assert_close(once.diagonal()[name], f)


def test_a_shuffled_loader_is_asked_for_as_many_passes_as_without_looking():
    model, batch, _ = build("gpt2")
    rows = [{key: value[n] for key, value in batch.items()} for n in range(N)]
    passes = []

    class Counted(DataLoader):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    fisher_information(model, Counted(rows, batch_size=2, shuffle=True), kind="empirical")
    fisher_information(
        model, Counted(rows, batch_size=2), structure="eigenkronecker", kind="sketch"
    )
    assert len(passes) == 1 + 2


def test_a_named_likelihood_that_is_not_trained_is_refused_with_the_one_that_is():
    model, batch, _ = build("gpt2")
    with pytest.raises(
        ValueError, match=r"(?s)the loss that the model returns .*'next-token': sum"
    ):
        fisher_information(model, [batch], "categorical")
    with pytest.raises(ValueError, match=r"likelihood='next-token' agrees\. .* as pairs"):
        EWC(model, 1.0, likelihood="categorical").consolidate([batch])
    with pytest.raises(ValueError, match=r"likelihood='next-token' agrees"):
        MatrixFree(model, [batch], "categorical") @ dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"likelihood='next-token' agrees"):
        per_observation_gradients(model, [batch], "categorical")


def test_pairs_insist_on_what_is_named():
    model, batch, _ = build("gpt2")
    F = fisher_information(model, [({"input_ids": TEXT}, TEXT)], "categorical", kind="empirical")
    other = fisher_information(model, [batch], kind="empirical")
    assert not torch.allclose(F.trace(), other.trace(), rtol=1e-3)


def test_tokens_that_are_their_own_targets_are_asked_for_the_likelihood_of_the_next_one():
    model = build("gpt2")[0]
    for pair in (({"input_ids": TEXT}, TEXT), ({"input_ids": TEXT}, TEXT.clone().fill_(-100))):
        pair[1][:, 1:] = TEXT[:, 1:]
        with pytest.warns(RuntimeWarning, match="say likelihood='categorical'"):
            fisher_information(model, [pair], kind="empirical")


@pytest.mark.parametrize("likelihood", ["next-token", "categorical", None])
def test_tokens_with_a_likelihood_or_with_other_targets_are_asked_nothing(likelihood):
    targets = TEXT.roll(-1, 1) if likelihood is None else TEXT
    model = build("gpt2")[0]
    fisher_information(model, [({"input_ids": TEXT}, targets)], likelihood, kind="empirical")
    fisher_information(nn.Linear(4, 3).double(), (X, Y), likelihood="categorical")


def test_pairs_for_an_encoder_and_a_decoder_get_the_inputs_of_the_decoder():
    model, batch, _ = build("bart")
    pairs = [({"input_ids": TEXT}, batch["labels"])]
    found, expected = (fisher_information(model, d, kind="empirical") for d in (pairs, [batch]))
    assert all(same(f, expected.diagonal()[n]) for n, f in found.diagonal().items())


def test_a_decoder_that_takes_other_words_than_its_labels_is_refused():
    """The loss is that of the model as its trainer calls it, without inputs for the decoder."""
    model, batch, _ = build("blenderbot")
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels.clamp_min(0)
    with pytest.raises(ValueError, match=r"(?s)the loss that the model .* decoder_input_ids"):
        agreed(model.eval(), [batch])


def test_an_auxiliary_loss_is_named():
    model = make("MixtralForCausalLM", "MixtralConfig", **MIXTRAL, output_router_logits=True)
    for likelihood in (None, "next-token"):
        with pytest.raises(
            ValueError, match=r"(?s)with an auxiliary loss of 1\.0.*as pairs"
        ) as error:
            fisher_information(model, [{"input_ids": TEXT, "labels": TEXT}], likelihood)
        nearest = "The nearest is 'next-token': give pairs, with likelihood='next-token'."
        assert str(error.value).endswith(nearest) == (likelihood is None)
    with pytest.raises(ValueError, match="The nearest is 'next-token'"):
        fisher_information(model, [{"input_ids": TEXT, "labels": TEXT}], "gaussian")


def test_a_head_of_zeros_does_not_hide_the_shift():
    """All logits are equal, and so are the losses of all readings; their derivatives are not."""
    model, batch, _ = build("gpt2")
    nn.init.zeros_(model.lm_head.weight)
    assert agreed(model.eval(), [batch])[1] == Categorical(next_token=True)


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_a_label_outside_the_classes_is_named_and_no_loss_reads_it(likelihood):
    """On an accelerator, a loss that reads it would end the process."""
    read = []
    model, y = Own(lambda f, y: read.append(y.max()) or F.cross_entropy(f, y)), Y.clone()
    y[3] = 9
    with pytest.raises(ValueError, match="label 9 of observation 3 is outside the 3 classes"):
        fisher_information(model, [{"x": X, "labels": y}], likelihood)
    assert max(read) < CLASSES
    assert (
        fisher_information(model, [{"x": X, "labels": y}], likelihood, n_samples=3).n_samples == 3
    )


def test_a_distribution_may_read_one_output_as_it_is():
    model = nn.Linear(4, 1).double()
    own = Own(lambda f, y: (F.mse_loss(f[:, 0], y) + math.log(2 * math.pi)) / 2)
    own.body = model
    likelihood = lambda f: torch.distributions.Normal(f[:, 0], 1.0)  # noqa: E731
    found = fisher_information(own, [{"x": X, "labels": noise(N)}], likelihood)
    named = fisher_information(own, [(X, noise(N, 1))], "gaussian")
    for name, f in named.diagonal().items():
        torch.testing.assert_close(found.diagonal()[name], f)


def test_rows_that_are_not_asked_for_decide_nothing():
    model, x = Own(F.cross_entropy), X.clone()
    x[1] = torch.nan
    data, found = agreed(model, [{"x": x, "labels": Y}])
    assert found == Categorical()
    assert fisher_information(model, data, n_samples=1).n_samples == 1
    x[:] = torch.nan
    with pytest.raises(ValueError, match="the input of observation 0 holds NaN"):
        fisher_information(model, [{"x": x, "labels": Y}])


def test_large_outputs_are_compared_in_part(monkeypatch):
    monkeypatch.setattr(agreement, "ENTRIES", 2 * CLASSES)
    seen = []
    model = Own(lambda f, y: seen.append(len(f)) or F.cross_entropy(f, y))
    agreed(model, [{"x": X, "labels": Y}])
    assert seen == [2]


def test_rows_without_a_label_are_not_the_ones_that_are_compared():
    model, _, _ = build("gpt2")
    nothing = torch.full((20, T), -100)
    labels = torch.cat([nothing, TEXT])
    batches = [
        {"input_ids": TEXT[:2], "labels": nothing[:2]},
        {"input_ids": draw(20 + N, T), "labels": labels},
    ]
    data, found = agreed(model.eval(), batches)
    assert found == Categorical(next_token=True)
    assert [len(target) for _, target in data] == [2, 20 + N]


class Own(nn.Module):
    """A model with a loss that is somebody's own."""

    def __init__(self, loss, key="loss"):
        super().__init__()
        self.body, self.loss, self.key = nn.Linear(4, 3).double(), loss, key

    def forward(self, x, labels=None):
        output = self.body(x)
        if labels is None:
            return output
        if self.key is None:
            return self.loss(output, labels), output
        return {self.key: self.loss(output, labels), "logits": output}


X, Y = noise(N, 4), draw(N, high=CLASSES)


@pytest.mark.parametrize(
    ("reduction", "key"),
    [("mean", "loss"), ("sum", "loss"), ("none", "loss"), ("mean", None), ("sum", None)],
)
def test_losses_of_other_libraries_are_seen(key, reduction):
    model = Own(partial(F.cross_entropy, reduction=reduction), key)
    assert agreed(model, [{"x": X, "labels": Y}])[1] == Categorical()
    with pytest.raises(ValueError, match="the loss that the model returns"):
        agreed(model, [{"x": X, "labels": Y}], "poisson")


@pytest.mark.parametrize(
    "loss",
    [
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0]).double()),
        lambda f, y: 1.001 * F.cross_entropy(f, y),
        lambda f, y: F.cross_entropy(f, y) + 0.001 * f.square().mean(),
        lambda f, y: F.multi_margin_loss(f, y),
    ],
    ids=["smoothing", "weights", "a factor", "a penalty", "a margin"],
)
def test_a_loss_that_is_no_likelihood_is_refused(loss):
    with pytest.raises(ValueError, match=r"(?s)'categorical': sum .* likelihood=.* as pairs"):
        agreed(Own(loss), [{"x": X, "labels": Y}])


def test_a_loss_without_logits_goes_by_its_value():
    model = Own(lambda f, y: F.cross_entropy(f, y).detach())
    assert agreed(model, [{"x": X, "labels": Y}])[1] == Categorical()


def test_two_readings_that_agree_are_refused():
    """Without derivatives, equal logits tell nothing about the shift."""
    model = Own(lambda f, y: F.cross_entropy(f.mT, y).detach())
    nn.init.zeros_(model.body.weight)
    nn.init.zeros_(model.body.bias)
    batch = {"x": noise(N, T, 4), "labels": draw(N, T, high=CLASSES)}
    with pytest.raises(ValueError, match="agrees with each of 'categorical', 'next-token'"):
        agreed(model, [batch])
    assert agreed(model, [batch], "next-token")[1] == Categorical(next_token=True)


def test_a_loss_that_cannot_be_computed_is_told():
    with pytest.raises(ValueError, match=r"cannot compute a loss .* Expected .* pairs"):
        agreed(Own(lambda f, y: F.cross_entropy(f, y.float()[:2])), [{"x": X, "labels": Y}])


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_models_without_a_loss_are_categorical_as_ever(likelihood):
    model = nn.Sequential(nn.Linear(4, 3)).double()
    data, found = agreed(model, [(X, Y)], likelihood)
    assert found == Categorical()
    assert [len(target) for _, target in data] == [N]


def test_a_wrapper_hands_labels_on():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, batch, _ = build("gpt2")
    assert agreed(Wrapper(model.eval()), [batch])[1] == Categorical(next_token=True)
    assert agreed(nn.DataParallel(model), [batch])[1] == Categorical(next_token=True)


CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), Y, "categorical"),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), Y, "categorical"),
    "an ignored label": (nn.CrossEntropyLoss(ignore_index=1), Y, Categorical(ignore_index=1)),
    "squared errors": (nn.MSELoss(), noise(N, 3), "gaussian"),
    "coins": (nn.BCEWithLogitsLoss(), BITS, "bernoulli"),
    "counts": (nn.PoissonNLLLoss(), BITS, "poisson"),
    "counts in full": (
        lambda f, y: (f.exp() - y * f + torch.lgamma(y + 1)).mean(),
        BITS,
        "poisson",
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_criterion_says_the_likelihood(name):
    criterion, target, likelihood = CRITERIA[name]
    model = nn.Linear(4, 3).double()
    found = fisher_information(model, (X, target), criterion=criterion)
    named = fisher_information(model, (X, target), likelihood)
    assert all(same(f, named.diagonal()[n]) for n, f in found.diagonal().items())
    fisher_information(model, (X, target), likelihood, criterion=criterion)


@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_squared_errors_know_no_sigma(sigma):
    model, y = nn.Linear(4, 3).double(), noise(N, 3)
    distribution = Gaussian(sigma)
    assert agreed(model, (X, y), distribution, nn.MSELoss())[1] == distribution


def test_a_criterion_of_any_distribution_is_compared_up_to_its_constant():
    model, y = nn.Linear(4, 6).double(), noise(N, 3)
    gaussian = lambda f: torch.distributions.Normal(f[:, :3], f[:, 3:].exp())  # noqa: E731
    laplace = lambda f: torch.distributions.Laplace(f[:, :3], f[:, 3:].exp())  # noqa: E731
    criterion = lambda f, y: F.gaussian_nll_loss(f[:, :3], y, (2 * f[:, 3:]).exp())  # noqa: E731
    agreed(model, (X, y), gaussian, criterion)
    with pytest.raises(ValueError, match="the criterion is"):
        agreed(model, (X, y), laplace, criterion)


def test_a_criterion_on_images_finds_the_axis_of_the_classes():
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(4, 2, 3, 3), draw(4, 3, 3, high=CLASSES)
    assert agreed(model, (x, y), criterion=nn.CrossEntropyLoss())[1] == Categorical(class_dim=1)


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "weight"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "pos_weight"),
        (partial(F.cross_entropy, label_smoothing=0.1), "label_smoothing"),
    ],
)
def test_options_that_make_a_criterion_no_likelihood_are_named(criterion, name):
    with pytest.raises(ValueError, match=f"a criterion with {name} is not a log-likelihood"):
        fisher_information(nn.Linear(4, 3).double(), (X, Y), criterion=criterion)


def test_a_criterion_that_is_not_the_named_likelihood_is_refused():
    with pytest.raises(
        ValueError, match=r"(?s)the criterion is .*\nlikelihood='gaussian' agrees\. .*without a"
    ):
        EWC(
            nn.Linear(4, 3).double(), 1.0, likelihood="bernoulli", criterion=nn.MSELoss()
        ).consolidate((X, BITS))


def test_a_criterion_that_smooths_labels_is_told_to_be_left_out():
    def smooth(output, target):
        return F.cross_entropy(output, target, label_smoothing=0.1)

    with pytest.raises(ValueError, match=r"(?s)label smoothing, .*without a criterion") as error:
        fisher_information(nn.Linear(4, 3).double(), (X, Y), criterion=smooth)
    assert "nearest" not in str(error.value)


def test_a_criterion_that_cannot_be_computed_is_told():
    with pytest.raises(ValueError, match=r"output of shape \(5, 3\) and a target of shape \(5,\)"):
        agreed(nn.Linear(4, 3).double(), (X, Y), criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match="the criterion must return a tensor, got float"):
        agreed(nn.Linear(4, 3).double(), (X, Y), criterion=lambda f, y: 1.0)


def test_empty_data_are_refused_as_ever():
    with pytest.raises(ValueError, match="data is empty"):
        fisher_information(nn.Linear(4, 3), [])


def test_a_parameter_that_is_not_finite_is_named_before_anything_is_compared():
    model, batch, _ = build("gpt2")
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"parameter 'transformer\.wte\.weight' holds NaN"):
        fisher_information(model, [batch])


@pytest.mark.parametrize("option", [{"weight": torch.tensor([1.0, 9.0, 9.0])}, {"ignore_index": 2}])
def test_a_criterion_is_compared_on_every_class_though_the_data_are_sorted(option):
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 3), torch.randn(30, 4), torch.arange(3).repeat_interleave(10)

    def criterion(output, target):
        return torch.nn.functional.cross_entropy(output, target, **option)

    with pytest.raises(ValueError, match="criterion"):
        fisher_information(model, (x, y), criterion=criterion)


@pytest.mark.parametrize("criterion", ["mse", torch.nn.CrossEntropyLoss])
def test_what_is_no_criterion_is_refused(criterion):
    data = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="criterion must be a function"):
        fisher_information(torch.nn.Linear(4, 3), data, criterion=criterion)
