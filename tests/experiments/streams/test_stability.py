import pytest

from ewc_lib import data
from ewc_lib.experiments.runs.protocols import measure
from ewc_lib.experiments.streams.stability import STABILITY, play_together
from tests.experiments.cases import short


def test_stability_tells_runs_that_diverge_from_others(tmp_path):
    found = short(STABILITY, steps=30, optimizers={"SGD": 0.1})
    found.protocols["digits"]["grid"] = [0.1, 1e12]
    result = measure(found, seeds=1, out=tmp_path, workers=1, progress=False)
    diverged = {(r["form"], r["strength"]): r["diverged"] for r in result["runs"]}
    assert diverged == {
        ("gradient", 0.1): False,
        ("gradient", 1e12): True,
        ("proximal", 0.1): False,
        ("proximal", 1e12): False,
    }
    assert {r["accuracy"] is None for r in result["runs"] if r["diverged"]} == {True}


def test_runs_at_once_end_as_those_one_after_another():
    images, protocol = data.digits(), short(STABILITY, steps=30, tasks=3).protocols["digits"]
    protocol["grid"] = [0.1, 100.0, 1e12]
    rest, valid = data.hold_out(images, protocol["held_out"])
    found = play_together(rest, protocol, seeds=2, valid=valid)
    assert len(found) == (2 + 3) * 3 * 2  # two forms with SGD, three with Adam
    for run in found:
        alone = STABILITY.play(images, protocol, "cpu", run)
        assert run["diverged"] == alone["diverged"]
        assert run["valid"] == pytest.approx(alone["valid"], abs=0.03, nan_ok=True)
        # rounding may move images over the border between two classes
        assert run["accuracy"] == pytest.approx(alone["accuracy"], abs=0.02, nan_ok=True)
    diverged = {(r["optimizer"], r["form"], r["strength"]) for r in found if r["diverged"]}
    assert diverged == {("SGD", "gradient", 1e12)}
