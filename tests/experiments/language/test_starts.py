import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ewc_lib import EWC
from ewc_lib.experiments.language.starts import begin, measured, tuned
from ewc_lib.likelihood import Categorical
from tests.experiments.texts import FINE, cut_short

few = pytest.fixture(autouse=True)(cut_short)


def start_of(name, seed=0):
    return begin(json.dumps(FINE), name, seed)


def test_fine_tuning_leaves_the_start_as_it_was_and_can_be_repeated():
    start = start_of("digits")
    before = {name: p.clone() for name, p in start.model.state_dict().items()}
    options = {"rate": 1e-2, "seed": 3}
    first, again = (tuned(start, FINE["digits"], None, [2], **options) for _ in range(2))
    assert set(first) == {2, 4}
    for name, value in start.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(first[4][name], again[4][name])
    assert any(not torch.equal(first[2][name], first[4][name]) for name in before)


def test_losses_are_those_of_the_weights_on_validation_and_test_data():
    start = start_of("digits")
    x, y = start.b.test
    expected = cross_entropy(start.model(x), y).item()
    found = measured(start, start.model.state_dict())
    assert math.isclose(found["losses"][3], expected, abs_tol=1e-5)
    assert found["kl"] == [0.0, 0.0]
    rows = [{tuple(x.tolist()) for x in part[0]} for part in start.a]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_a_sequence_is_one_observation_of_its_bytes():
    start = start_of("texts")
    ewc = EWC(start.model, 1.0, kind="sketch", likelihood=Categorical(class_dim=1))
    fisher = ewc.consolidate(start.old)
    assert torch.allclose(fisher.trace(), start.fisher["diagonal"].trace())
    assert start.terms == FINE["texts"]["length"] == start.old[0].shape[1]


def test_the_divergence_is_the_mean_over_terms_of_what_is_said_from_what_was_said():
    start = start_of("texts")
    after = tuned(start, FINE["texts"], None, rate=1e-2, seed=0)[3]
    x, _ = start.a.test
    before = start.model(x).softmax(1)
    weights = {name: after[name] for name in start.whole.shapes}  # the head is tied
    now = torch.func.functional_call(start.model, weights, (x,)).log_softmax(1)
    expected = (before * (before.log() - now)).sum(1).mean().item()
    assert math.isclose(measured(start, after)["kl"][0], expected, abs_tol=1e-5)
