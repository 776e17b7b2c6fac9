from ewc_lib.experiments.protocols import measure
from ewc_lib.experiments.stability import STABILITY
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
