import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ewc_lib import EWC
from ewc_lib.continual import averaged
from ewc_lib.experiments.language.starts import begin, rows_of, tuned
from ewc_lib.experiments.language.ways import diagonal, points
from tests.experiments.texts import FINE, SHORT, cut_short

few = pytest.fixture(autouse=True)(cut_short)
OWN = {**SHORT["texts"], "metric": SHORT["metric"]}


def found(trained, **settings):
    start = begin(json.dumps(SHORT), "texts", 0)
    run = {"data": "texts", "seed": 0, "rate": 1e-2, "trained": trained}
    return start, list(points(start, OWN, {**SHORT["settings"], **settings}, run))


def test_a_run_can_be_repeated_by_hand():
    start, (of_ewc, *_) = found("EWC")
    ewc = EWC(start.model, 10.0, kind="sketch")
    ewc.remember(start.fisher["diagonal"])
    after = tuned(start, OWN, ewc, rate=1e-2, seed=1, proximal="optimizer")[OWN["steps"]]
    x, y = start.b.test
    weights = {name: after[name] for name in start.whole.shapes}  # the head is tied
    expected = cross_entropy(torch.func.functional_call(start.model, weights, (x,)), y)
    assert math.isclose(of_ewc["losses"][3], expected.item(), abs_tol=1e-5)
    step = {name: after[name] - start.model.state_dict()[name] for name in weights}
    nats = start.fisher["diagonal"].quadratic(step).item() / (2 * OWN["length"])
    assert math.isclose(of_ewc["nats"]["diagonal"], nats, rel_tol=1e-4)


def test_adapters_begin_where_the_model_is_and_leave_it_as_it_was():
    start, _ = found("LoRA")
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    still, (of_none,) = found("LoRA", LoRA=[0.0])
    assert all(torch.equal(before[n], v) for n, v in still.model.state_dict().items())
    assert of_none["kl"][1] > 0
    assert of_none["nats"]["whole"] > 0
    assert not any("parametrizations" in name for name in still.model.state_dict())


@pytest.mark.parametrize("method", ["LoRA, L2", "LoRA, EWC"])
def test_a_penalty_on_products_is_none_at_strength_zero_and_holds_at_a_large_one(method):
    _, (free, held) = found(method)
    _, (plain,) = found("LoRA")
    assert free["losses"] == plain["losses"]
    assert held["kl"][0] < free["kl"][0]


def test_the_metric_of_a_proximal_step_is_that_of_the_way():
    (_, (own, *_)), (_, (plain,)) = (
        found("EWC"),
        found("EWC, euclidean", **{"EWC, euclidean": [10]}),
    )
    assert own["setting"] == plain["setting"]
    assert own["losses"] != plain["losses"]


def test_the_two_penalties_on_products_are_not_the_same():
    (_, (_, alike)), (_, (_, informed)) = found("LoRA, L2"), found("LoRA, EWC")
    assert alike["losses"] != informed["losses"]


def test_replay_sees_a_few_old_sequences_and_joint_training_all():
    (start, (few,)), (_, (joint,)) = found("replay"), found("joint")
    assert few["losses"] != joint["losses"]
    assert len(start.old[0]) == SHORT["old"] < len(start.a.train[0])
    _, (none,) = found("replay", replay=[0.0])
    _, (plain, *_) = found("plain")
    assert none["losses"] == plain["losses"]


def test_only_rates_that_are_asked_for_are_looked_at_along_the_way():
    _, rows = found("plain", along=[1e-3])
    assert [row["method"] for row in rows] == ["learning rate"]
    _, rows = found("plain", along=[1e-2])
    assert [row["method"] for row in rows] == [
        "learning rate",
        "early stopping",
        "averaging",
        "Fisher averaging",
    ]


def test_ewc_with_averaging_lies_between_the_start_and_the_end_of_ewc():
    _, rows = found("EWC")
    (middle,) = (row for row in rows if row["method"] == "EWC, averaging")
    (end,) = (row for row in rows if row["setting"] == 10.0)
    assert middle["setting"] == [10.0, 0.5]
    ratio = middle["nats"]["whole"] / end["nats"]["whole"]
    assert math.isclose(ratio, 0.25, rel_tol=1e-3)


def test_what_is_seen_is_what_the_fisher_information_is_from():
    start = begin(json.dumps(SHORT), "texts", 0)
    assert len(start.seen[0]) == SHORT["seen"]
    few = rows_of(start.seen, slice(SHORT["old"]))
    assert torch.equal(few[0], start.old[0])
    assert start.fisher["diagonal"].n_samples == SHORT["seen"]


def test_an_average_by_information_leaves_each_task_what_it_alone_knows():
    start = begin(json.dumps(FINE), "digits", 0)
    before = start.model.state_dict()
    after = {name: value + 1.0 for name, value in before.items()}
    of_b = diagonal(start, after, start.b.train)
    fishers, of_a = (start.fisher["diagonal"], of_b), start.fisher["diagonal"].diagonal()
    found = averaged(start.model, before, after=after, fishers=fishers)
    for name, value in found.items():
        a, b = of_a[name], of_b.values[name]
        moved = value - before[name]
        assert ((moved >= -1e-5) & (moved <= 1 + 1e-5)).all()
        neither = (a == 0) & (b == 0)
        assert torch.allclose(moved[neither], torch.tensor(0.5), atol=1e-4)
        firm = (a > 1e-3) & (b == 0)
        assert (moved[firm] < 0.01).all()
    for share, expected in ((0.0, before), (1.0, after)):
        end = averaged(start.model, before, share, after=after, fishers=fishers)
        assert all(torch.allclose(end[n], expected[n], atol=1e-5) for n in end)
