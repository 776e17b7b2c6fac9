from collections import Counter
from functools import partial

import pytest
import torch

from ewc_lib import EWC
from ewc_lib.continual import accuracy, mlp, permute_pixels, train
from ewc_lib.data import digits, hold_out
from ewc_lib.experiments.runs.report import table
from ewc_lib.experiments.streams import forgetting
from ewc_lib.experiments.streams.forgetting import (
    FORGETTING,
    at_usual_rate,
    chosen,
    curve,
    shown,
)
from tests.experiments.cases import run

PROTOCOL = FORGETTING.protocols["digits"]
NETWORKS = {"wide": [8], "narrow": [4]}
PAIRS = [(network, method) for network, found in PROTOCOL["grids"].items() for method in found]


def settings(method, *, network="wide", rate=1e-3, strength=0.0, seed=0, search=False):
    found = {"network": network, "method": method, "rate": rate, "strength": strength}
    return {**found, "seed": seed, "search": search}


def play(protocol, **options):
    return FORGETTING.play(digits(), protocol, "cpu", settings(**options))


@pytest.fixture(autouse=True)
def nothing_learned():
    """Let no test begin with what another one has learned."""
    forgetting._after_task_a.cache_clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting")
    grids = {
        network: {m: {name: grid[:2] for name, grid in knobs.items()} for m, knobs in own.items()}
        for network, own in PROTOCOL["grids"].items()
    }
    changes = {"networks": NETWORKS, "search_seeds": 1, "every": 1, "steps": 2, "grids": grids}
    return run(FORGETTING, folder, seeds=2, **changes)["runs"]


@pytest.mark.parametrize("preset", FORGETTING.protocols)
def test_every_method_has_a_search_of_the_same_size(preset):
    runs = list(forgetting._search(FORGETTING.protocols[preset], 1, []))
    assert len({tuple(run.values()) for run in runs}) == len(runs)
    assert set(Counter((r["network"], r["method"]) for r in runs).values()) == {6 * 15}


def test_what_is_shown_has_the_settings_that_the_search_found_best(runs):
    for network, method in PAIRS:
        own = [r for r in runs if (r["network"], r["method"]) == (network, method)]
        best = max((r for r in own if r["search"]), key=lambda r: r["mean"])
        assert chosen(runs, network, method).value == best["mean"]
        found = shown(runs, network, method)
        assert list(found) == [0, 1]
        for final in found.values():
            assert (final["rate"], final["strength"]) == (best["rate"], best["strength"])
            assert not final["search"]


def test_a_curve_has_the_means_of_the_search_at_the_chosen_rate_alone():
    def tried(rate, strength, a, seed):
        shared = {"network": "wide", "method": "EWC", "search": True}
        return shared | {
            "rate": rate,
            "strength": strength,
            "seed": seed,
            "a": a,
            "b": 0.5,
            "mean": a,
        }

    some = [tried(1e-3, s, a, seed) for s, a, seed in ((1.0, 0.2, 0), (1.0, 0.4, 1), (9.0, 0.8, 0))]
    some += [tried(1e-3, 9.0, 0.6, 1), tried(1e-4, 1.0, 0.1, 0), tried(1e-4, 1.0, 0.1, 1)]
    strengths, (a, b) = curve(some, "wide", "EWC")
    assert strengths == [1.0, 9.0]
    torch.testing.assert_close(a, torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(b, torch.tensor([0.5, 0.5]))


def test_the_command_has_a_table_of_the_runs(runs):
    told = table({"experiment": "forgetting", "data": "digits", "runs": runs})
    final = [line for line in told.splitlines() if line.startswith("narrow EWC, full")]
    assert any("(2 seeds)" in line for line in final)


def test_plain_training_is_also_shown_at_the_usual_rate(runs):
    found = at_usual_rate(runs, PROTOCOL["rate"])
    assert list(found) == [0, 1]
    assert all(run["strength"] == 0 and run["rate"] == PROTOCOL["rate"] for run in found.values())


def test_the_search_never_sees_a_test_image_and_nothing_learns_from_validation_images(monkeypatch):
    learned, judged = [], []
    monkeypatch.setattr(forgetting, "train", lambda model, data, **o: learned.append(data[0]))
    monkeypatch.setattr(forgetting, "accuracy", lambda model, data: judged.append(data[0]) or 0.5)
    rest, valid = hold_out(digits(), PROTOCOL["held_out"])
    for search, tested in ((True, valid.x_test), (False, digits().x_test)):
        learned.clear()
        judged.clear()
        play(PROTOCOL, method="none", search=search)
        permuted = permute_pixels(rest._replace(x_test=tested), 1000)
        assert all(any(x.equal(t) for t in (tested, permuted.x_test)) for x in judged)
        assert [len(x) for x in learned] == [len(rest.x_train)] * 2
        assert learned[0].equal(rest.x_train)
        assert learned[1].equal(permuted.x_train)


def test_joint_training_sees_the_images_of_both_tasks_and_makes_the_updates_of_both(monkeypatch):
    calls = []
    monkeypatch.setattr(forgetting, "train", lambda model, data, **o: calls.append((data, o)))
    play(PROTOCOL, method="joint")
    ((x, y), options) = calls[0]
    rest, _ = hold_out(digits(), PROTOCOL["held_out"])
    assert len(calls) == 1
    assert options["steps"] == 2 * PROTOCOL["steps"]
    assert x.equal(torch.cat([rest.x_train, permute_pixels(rest, 1000).x_train]))
    assert y.equal(torch.cat([rest.y_train] * 2))


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_an_outcome_is_that_of_a_network_trained_by_hand(structure):
    protocol = {**PROTOCOL, "networks": NETWORKS, "steps": 40}
    method = {"diagonal": "EWC", "dense": "EWC, full"}[structure]
    found = play(protocol, method=method, network="narrow", rate=3e-3, strength=10.0, seed=4)
    rest, _ = hold_out(digits(), protocol["held_out"])
    task_b = permute_pixels(rest, 1004)
    model = mlp((64, 4, 10), 4)
    learn = partial(train, model, steps=40, progress=False)
    adam = partial(torch.optim.Adam, fused=True)
    learn(rest.train, seed=4, optimizer=partial(adam, lr=1e-3))
    ewc = EWC(model, 10.0, structure=structure)
    before = accuracy(model, rest.test)
    ewc.consolidate(rest.train)
    learn(task_b.train, seed=5, regularizer=ewc, optimizer=partial(adam, lr=3e-3))
    assert found["before"] == pytest.approx(before, abs=1e-5)
    assert found["a"] == pytest.approx(accuracy(model, rest.test), abs=1e-5)
    assert found["b"] == pytest.approx(accuracy(model, task_b.test), abs=1e-5)
    assert found["mean"] == (found["a"] + found["b"]) / 2


def test_the_way_is_watched_from_the_optimum_of_task_a_to_the_end():
    protocol = {**PROTOCOL, "networks": NETWORKS, "steps": 6, "every": 3}
    found = play(protocol, method="L2", strength=0.1)
    assert len(found["curve"]) == 3
    assert found["curve"][0][0] == found["before"]
    assert found["curve"][-1] == [found["a"], found["b"]]
    assert "curve" not in play(protocol, method="L2", strength=0.1, search=True)


def test_ewc_forgets_less_than_plain_training():
    protocol = {**PROTOCOL, "steps": 200}
    plain, held = (
        play(protocol, method=m, strength=s, seed=1) for m, s in (("none", 0.0), ("EWC", 100.0))
    )
    assert held["before"] == plain["before"]
    assert held["a"] > plain["a"] + 0.05
    assert held["b"] > 0.4
