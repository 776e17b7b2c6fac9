from ewc_lib.experiments.runs.protocols import measure
from ewc_lib.experiments.streams.stability import STABILITY
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


def test_the_forms_differ_and_choose_on_images_that_they_do_not_learn(tmp_path):
    found = short(STABILITY, steps=30, optimizers={"Adam": 1e-3}, tasks=2)
    found.protocols["digits"]["grid"] = [1000.0]
    runs = measure(found, seeds=1, out=tmp_path, workers=1, progress=False)["runs"]
    assert [run["form"] for run in runs] == ["gradient", "proximal", "euclidean"]
    assert len({run["accuracy"] for run in runs}) == 3
    assert all(0 < run["valid"] < 1 and run["valid"] != run["accuracy"] for run in runs)
