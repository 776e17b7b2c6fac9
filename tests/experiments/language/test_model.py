import math

import pytest
import torch
import torch.nn.functional as F

from ewc_lib import EWC, fisher_information
from ewc_lib.experiments.language.model import (
    adaptable,
    language_model,
    learn,
    log_likelihood,
    texts,
    token_trace,
)
from ewc_lib.regularizers import add_adapters
from tests.experiments.texts import SMALL, cut_short

SHORT = {**SMALL, "rate": 3e-3, "batch": 16}
few = pytest.fixture(autouse=True)(cut_short)


def tokens(model_seed=0):
    model = language_model(SHORT, model_seed)
    english, _ = texts(SHORT["length"])
    return model, english.train


def test_both_texts_have_as_many_sequences():
    english, code = texts(8)
    assert english.train[0].shape == code.train[0].shape
    assert english.test[0].shape == code.test[0].shape
    assert not torch.equal(english.train[0], code.train[0])


def test_a_network_follows_its_seed_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    (one, again, other) = (language_model(SHORT, seed).token.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_log_likelihood_is_the_mean_over_all_bytes():
    model, (x, y) = tokens()
    logs = model(x).log_softmax(-1)
    expected = logs.gather(-1, y[..., None]).mean().item()
    assert len(x) > 64  # more than one batch
    assert math.isclose(log_likelihood(model, (x, y)), expected, rel_tol=1e-5)


def test_learning_raises_the_likelihood_and_follows_the_seed():
    found = []
    for _ in range(2):
        model, data = tokens()
        before = log_likelihood(model, data)
        learn(model, data, SHORT, steps=30, seed=0)
        found.append(log_likelihood(model, data))
    assert found[0] == found[1] > before + 0.5


def test_learning_takes_the_proximal_step_of_a_penalty_that_has_one():
    model, data = tokens()
    held = EWC(model, 1e12, kind="sketch")
    held.consolidate(data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, data, SHORT, steps=5, seed=0, regularizer=held)
    F_ = held.precision.diagonal()
    held_back = 0
    for name, p in model.named_parameters():
        firm = F_[name] > 1e-6
        held_back += firm.sum()
        torch.testing.assert_close(p[firm], before[name][firm], atol=1e-4, rtol=0)
    assert held_back > 100


def test_only_adapters_are_learned_where_there_are_some():
    model, data = tokens()
    add_adapters(model, adaptable(model), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, data, SHORT, steps=3, seed=0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith((".A", ".B"))


def test_the_head_is_not_adaptable():
    assert adaptable(language_model(SHORT, 0)) == [
        "blocks.0.attention.project",
        "blocks.0.attention.out",
        "blocks.0.up",
        "blocks.0.down",
    ]


def some(length):
    model, data = tokens()
    return model.double(), tuple(part[:5, :length] for part in data)


def test_of_sequences_of_one_token_the_trace_is_that_of_the_empirical_fisher():
    model, data = some(1)
    expected = fisher_information(model, data, kind="empirical").trace().item()
    assert math.isclose(token_trace(model, data), expected, rel_tol=1e-10)


def test_each_token_is_squared_by_itself():
    model, (x, y) = some(4)
    expected = 0.0
    for n in range(len(x)):
        for t in range(4):
            loss = F.cross_entropy(model(x[n : n + 1])[0, t], y[n, t])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            expected += sum(g.square().sum().item() for g in gradients) / len(x)
    assert math.isclose(token_trace(model, (x, y)), expected, rel_tol=1e-10)
    of_sequences = fisher_information(model, (x, y), kind="empirical").trace().item()
    assert not math.isclose(expected, of_sequences, rel_tol=0.01)
