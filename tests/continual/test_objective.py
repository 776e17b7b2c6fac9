"""What the loss of a task is, and how well a model does by the same measure."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ewc_lib.continual._objective import Objective
from ewc_lib.continual._reading import Piece
from ewc_lib.likelihood import Categorical, Gaussian

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
REAL = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 1, 0, 1, 1])


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def pair(x, y):
    return Piece(x, y, False)


def named(likelihood=None, criterion=None):
    return SimpleNamespace(likelihood=likelihood, criterion=criterion)


LIKELIHOODS = {
    "gaussian": (REAL, lambda f, y: 0.5 * (f - y).square().sum(1) + math.log(2 * math.pi)),
    "bernoulli": (
        (REAL > 0).float(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1),
    ),
    "poisson": (
        REAL.abs().round(),
        lambda f, y: (f.exp() - y * f + torch.lgamma(y + 1)).sum(1),
    ),
    "categorical": (CLASSES, lambda f, y: F.cross_entropy(f, y, reduction="none")),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_loss_is_minus_the_mean_log_likelihood_that_the_regularizer_names(name):
    model, (target, expected) = linear(), LIKELIHOODS[name]
    found = Objective(model, named(name)).loss(pair(X, target))
    torch.testing.assert_close(found, expected(model(X), target).mean())


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "poisson"])
def test_the_score_of_numbers_is_the_mean_log_likelihood(name):
    model, (target, expected) = linear(), LIKELIHOODS[name]
    score = Objective(model, named(name)).score([(X[:4], target[:4]), (X[4:], target[4:])])
    assert score == pytest.approx(-float(expected(model(X), target).mean().detach()), rel=1e-5)


def test_the_score_of_classes_is_the_accuracy():
    model = linear()
    share = (model(X).argmax(1) == CLASSES).double().mean()
    for regularizer in (None, named("categorical"), named(criterion=nn.CrossEntropyLoss())):
        assert Objective(model, regularizer).score((X, CLASSES)) == pytest.approx(float(share))


def test_the_criterion_comes_before_that_of_the_regularizer_and_before_its_likelihood():
    model, piece = linear(), pair(X, REAL)
    own, mine = nn.L1Loss(), nn.MSELoss()
    both = named("gaussian", own)
    assert Objective(model, both, mine).loss(piece) == mine(model(X), REAL)
    assert Objective(model, both).loss(piece) == own(model(X), REAL)
    assert Objective(model, both).score((X, REAL)) == pytest.approx(
        -float(own(model(X), REAL).detach())
    )


@pytest.mark.parametrize("target", [REAL, REAL[:, :1], CLASSES.float(), CLASSES == 1, REAL + 0j])
def test_targets_that_are_no_integers_need_a_criterion_or_a_likelihood(target):
    ways = "MSELoss.*likelihood='gaussian'.*BCEWithLogits.*'poisson'.*CrossEntropyLoss"
    with pytest.raises(ValueError, match=rf"targets of {target.dtype}.*{ways}"):
        Objective(linear()).loss(pair(X, target))
    with pytest.raises(ValueError, match=rf"targets of {target.dtype}.*{ways}"):
        Objective(linear()).score((X, target))


@pytest.mark.parametrize("target", [CLASSES, CLASSES[:, None]])
def test_one_number_for_each_integer_is_no_choice_of_classes(target):
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"no choice between classes\. .*likelihood='bernoulli'"):
        Objective(model).loss(pair(X, target))


def test_probabilities_of_classes_are_said_by_the_criterion():
    model, soft = linear(), REAL.softmax(1)
    found = Objective(model, criterion=nn.CrossEntropyLoss()).loss(pair(X, soft))
    assert found == F.cross_entropy(model(X), soft)


def test_targets_that_no_likelihood_has_are_refused_by_their_number():
    with pytest.raises(ValueError, match=r"shape of the output, got \(6,\) and \(6, 2\)"):
        Objective(linear(), named("gaussian")).loss(pair(X, REAL[:, 0]))
    with pytest.raises(ValueError, match="observation 0 is outside the support of a Poisson"):
        Objective(linear(), named("poisson")).loss(pair(X, REAL - 9.5))


def test_classes_may_be_on_the_last_axis_or_on_the_second():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, -100, 1], [2, 2, 0, 1, -100]])
    expected = F.cross_entropy(logits.mT, labels)
    for output in (logits, logits.mT):
        objective = Objective(nn.Identity())
        assert objective.loss(pair(output, labels)) == expected
        right = (logits.argmax(-1) == labels).sum() / 8
        assert objective.score((output, labels)) == pytest.approx(float(right))


def test_next_tokens_are_judged_one_position_later():
    words = torch.tensor([[0, 1, 2, 0]])
    right = F.one_hot(words, 3).float().roll(-1, 1)  # says what comes next
    causal = Objective(nn.Identity(), named("next-token"))
    assert causal.score((9 * right, words)) == 1
    assert Objective(nn.Identity()).score((9 * right, words)) == 0.25  # the last says the first
    assert float(causal.loss(pair(9 * right, words))) < 0.01


def test_a_likelihood_says_which_axis_has_the_classes_and_which_labels_count():
    output = 9 * torch.eye(2).expand(2, 2, 2) + torch.tensor([[0.0], [20.0]])
    labels = torch.tensor([[1, 7], [0, 1]])
    second = Objective(nn.Identity(), named(Categorical(7, class_dim=1)))
    assert second.score((output, labels)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="axis 1 or on the last axis"):
        Objective(nn.Identity()).loss(pair(output, labels))


@pytest.mark.parametrize("criterion", [nn.MSELoss, "mse", 3])
def test_a_criterion_that_is_no_function_is_refused(criterion):
    with pytest.raises(ValueError, match="criterion must be a function of output and target"):
        Objective(linear(), criterion=criterion)


def test_a_criterion_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"must return one number.*got \(6, 2\)"):
        Objective(linear(), criterion=nn.MSELoss(reduction="none")).loss(pair(X, REAL))


# Models that compute a loss of their own


def labelled(**inputs):
    labels = inputs.pop("labels")
    return Piece(inputs, labels, True)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 13, "n_positions": 6}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


WORDS = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(0))


class AsTuple(nn.Module):
    """A model that returns its loss and its logits one after another."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids, labels=labels).to_tuple()


@pytest.mark.parametrize("make", [gpt2, lambda: AsTuple(gpt2())], ids=["object", "tuple"])
def test_a_dict_with_labels_is_trained_by_the_loss_of_the_model(make):
    model = make()
    expected = F.cross_entropy(gpt2()(WORDS).logits[:, :-1].flatten(0, 1), WORDS[:, 1:].flatten())
    piece = labelled(input_ids=WORDS, labels=WORDS)
    torch.testing.assert_close(Objective(model).loss(piece), expected)
    torch.testing.assert_close(Objective(model, named("next-token")).loss(piece), expected)
    score = Objective(model).score([{"input_ids": WORDS, "labels": WORDS}])
    assert score == pytest.approx(-float(expected.detach()))


def test_a_criterion_gets_the_logits_of_a_model_that_has_a_loss():
    model = gpt2()
    loss = Objective(model, criterion=lambda f, y: f[:, :, 0].mean() + 0 * y.sum())
    found = loss.loss(labelled(input_ids=WORDS, labels=WORDS))
    assert found == model(WORDS).logits[:, :, 0].mean()


def test_the_score_of_a_classifier_with_a_loss_of_its_own_is_its_accuracy():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 13}
    config = BertConfig(**sizes, intermediate_size=8, num_labels=3)
    model = BertForSequenceClassification(config).eval()
    labels = torch.tensor([0, 1, 2])
    share = (model(WORDS).logits.argmax(1) == labels).double().mean()
    assert Objective(model).score([{"input_ids": WORDS, "labels": labels}]) == float(share)


def test_a_model_that_takes_a_dict_and_no_labels_is_trained_by_the_cross_entropy():
    class Named(nn.Linear):
        def forward(self, features):
            return SimpleNamespace(logits=super().forward(features))

    model = Named(3, 2)
    found = Objective(model).loss(labelled(features=X, labels=CLASSES.to(torch.int32)))
    assert found == F.cross_entropy(model(X).logits, CLASSES)


def test_the_width_of_a_gaussian_counts():
    model = linear()
    narrow = Objective(model, named(Gaussian(sigma=0.1))).loss(pair(X, REAL))
    wide = Objective(model, named("gaussian")).loss(pair(X, REAL))
    errors = 0.5 * (model(X) - REAL).square().sum(1).mean()
    torch.testing.assert_close(narrow - wide, 99 * errors + 2 * math.log(0.1))
