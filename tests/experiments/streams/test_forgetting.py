import math

import pytest

from ewc_lib import EWC, data
from ewc_lib.continual import accuracy, mlp, permute_pixels, train
from ewc_lib.experiments.streams.forgetting import Outcome, forgetting, summarise


def test_ewc_forgets_less_than_plain_training_on_every_seed():
    runs = forgetting(data.digits(), strengths=[0.0, 100.0], seeds=[0, 1], steps=200)
    kept = {(run.strength, run.seed): run.accuracy_a for run in runs}
    assert len(runs) == 4
    for seed in (0, 1):
        assert kept[100.0, seed] > kept[0.0, seed] + 0.05
    assert all(run.accuracy_b > 0.4 for run in runs)


def test_runs_of_one_seed_start_from_the_same_optimum_whatever_else_is_run():
    def run(strengths, structures):
        return forgetting(
            data.digits(),
            hidden=[8],
            strengths=strengths,
            seeds=[3],
            structures=structures,
            steps=30,
        )

    alone = run([10.0], ["dense"])[0]
    among_others = run([0.0, 10.0], ["diagonal", "dense"])
    assert alone in among_others
    assert len(among_others) == 4


def test_outcomes_are_those_of_networks_trained_one_after_another():
    digits = data.digits()
    runs = forgetting(digits, hidden=[16], strengths=[0.0, 100.0], seeds=[0, 4], steps=60)
    for run in runs:
        task_b = permute_pixels(digits, run.seed + 1000)
        model = mlp((64, 16, 10), run.seed)
        train(model, digits.train, steps=60, seed=run.seed)
        ewc = EWC(model, run.strength)
        ewc.consolidate(digits.train)
        train(model, task_b.train, steps=60, seed=run.seed + 1, regularizer=ewc)
        # rounding may move an image or two over the border between two classes
        assert run.accuracy_a == pytest.approx(accuracy(model, digits.test), abs=0.01)
        assert run.accuracy_b == pytest.approx(accuracy(model, task_b.test), abs=0.01)
    assert len({run.accuracy_a for run in runs}) > 2


def test_summary_is_mean_and_standard_error_per_structure_and_strength():
    runs = [
        Outcome("diagonal", 1.0, 0, 0.4, 0.9),
        Outcome("diagonal", 1.0, 1, 0.6, 0.7),
        Outcome("dense", 1.0, 0, 0.8, 0.8),
    ]
    diagonal, dense = summarise(runs)
    assert diagonal.accuracy_a == pytest.approx(0.5)
    assert diagonal.error_a == pytest.approx(0.1)
    assert diagonal.accuracy_b == pytest.approx(0.8)
    assert dense.accuracy_a == 0.8
    assert math.isnan(dense.error_a)
