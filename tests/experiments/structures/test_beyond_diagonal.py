import math
import statistics

import pytest

from ewc_lib.experiments.structures.beyond_diagonal import (
    METHODS,
    PROTOCOL,
    chosen,
    comparison,
    flat,
    table,
)
from ewc_lib.experiments.structures.two_tasks import OUTCOMES

SHORT = {
    **PROTOCOL,
    "hidden": [4],
    "steps": 30,
    "strengths": [1.0, 10.0],
    "rates": [1.0, 10.0],
    "shares": [0.5, 1.0],
    "costly_seeds": 1,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "short.json"
    return comparison(path, seeds=2, protocol=SHORT, progress=False)


def rows(result):
    return {(r["optimizer"], r["form"], r["method"]) for r in result["runs"]}


def test_every_method_has_as_many_settings_as_the_others(result):
    assert {len(run["settings"]) for run in result["runs"]} == {2}
    full = {len(PROTOCOL[name]) for name in ("strengths", "rates", "shares")}
    assert len(full) == 1


def test_each_optimizer_has_every_method_and_crossed_ones_both_forms(result):
    for optimizer, usual in (("SGD", "proximal"), ("Adam", "gradient")):
        own = {(form, method) for name, form, method in rows(result) if name == optimizer}
        free = {("none", "plain"), ("none", "averaging"), ("gradient", "predictions")}
        assert {method for _, method in own} == {*METHODS}
        crossed = {(form, m) for form in ("gradient", "proximal") for m in PROTOCOL["crossed"]}
        held = {(usual, m) for m in METHODS[2:-1]}
        assert own == free | crossed | held


def test_what_takes_long_comes_last_and_with_fewer_seeds(result):
    costly = [
        run
        for run in result["runs"]
        if (run["optimizer"], run["form"]) == ("Adam", "proximal")
        and run["method"] in PROTOCOL["costly"]
    ]
    assert costly == result["runs"][-3:]
    assert {run["seed"] for run in costly} == {0}


def test_a_flat_run_has_the_means_and_what_task_a_has_lost(result):
    runs = flat(result, optimizer="SGD", method="kronecker")
    assert len(runs) == 2 * 2 * 2
    for run in runs:
        (stored,) = (
            r
            for r in result["runs"]
            if all(r[n] == run[n] for n in ("optimizer", "form", "method", "seed"))
        )
        assert run["accuracy"] == (run["accuracy_a"] + run["accuracy_b"]) / 2
        assert run["forgotten"] == stored["before"][0] - run["accuracy_a"]
        assert run["nats"] == run["loss_a"] - stored["before"][1]
        at = stored["settings"].index(run["setting"])
        assert all(run[name] == stored[name][at] for name in OUTCOMES)
        assert not run["diverged"]


def test_a_network_that_knows_neither_task_has_diverged(result):
    (run,) = (
        r for r in result["runs"] if (r["method"], r["optimizer"], r["seed"]) == ("plain", "SGD", 0)
    )
    poor = {**run, "loss_a": [None, 2.31], "loss_b": [None, 2.5]}
    forgetful = {**run, "loss_a": [2.31, 2.29], "loss_b": [0.5, 2.5]}
    for loss, expected in ((poor, [True, True]), (forgetful, [False, False])):
        found = flat({"runs": [loss]})
        assert [r["diverged"] for r in found] == expected
        assert [r["valid"] is None for r in found] == expected


def test_validation_images_choose_and_not_those_of_the_test():
    def run(seed, valid, tested):
        kept = {"valid": valid, "accuracy_a": tested, "accuracy_b": tested}
        rest = {name: [0.1, 0.1, 0.1] for name in OUTCOMES if name not in kept}
        name = {"optimizer": "SGD", "form": "none", "method": "plain", "seed": seed}
        return {**name, "before": [1.0, 0.1], "settings": [1.0, 2.0, 3.0], **kept, **rest}

    runs = [run(1, [0.5, 0.9, 0.1], [0.9, 0.3, 0.4]), run(0, [0.5, 0.2, 0.1], [0.9, 0.4, 0.4])]
    choice, kept = chosen({"runs": runs}, method="plain")
    assert choice.settings == {"setting": 2.0}
    assert [(r["seed"], r["accuracy"]) for r in kept] == [(0, 0.4), (1, 0.3)]


def test_the_table_shows_each_row_at_its_chosen_setting(result):
    lines = table(result).splitlines()
    assert len(lines) == len(rows(result))
    (line,) = (x for x in lines if x.startswith("Adam gradient kronecker "))
    choice, runs = chosen(result, optimizer="Adam", form="gradient", method="kronecker")
    mean = statistics.mean(run["accuracy"] for run in runs)
    assert f"{100 * mean:.2f} ±" in line
    assert f"at {choice.settings['setting']:g}, at the edge" in line  # of two settings each is
    assert math.isfinite(mean)
