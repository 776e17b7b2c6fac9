import pytest

from ewc_lib.experiments.cost.overhead import Overhead, overhead, overheads


def test_every_form_is_timed_after_every_number_of_tasks(tmp_path):
    path = tmp_path / "overhead.json"
    result = overhead(path, tasks=(1, 2), rounds=3, sizes=(4, 5, 3))
    keys = [(run["form"], run["tasks"]) for run in result["runs"]]
    forms = ("gradient", "proximal", "penalty")
    assert keys == [("plain", 0), *((form, n) for n in (1, 2) for form in forms)]
    assert all(len(run["seconds"]) == 3 for run in result["runs"])
    assert path.exists()
    assert len(overheads(result)) == 6


def test_an_overhead_is_relative_to_the_plain_step_of_the_same_round():
    runs = [
        {"form": "plain", "tasks": 0, "seconds": [1.0, 2.0, 4.0]},
        {"form": "gradient", "tasks": 50, "seconds": [1.1, 2.4, 5.2]},
    ]
    (found,) = overheads({"runs": runs})
    assert found == Overhead("gradient", 50, *[pytest.approx(v) for v in (0.2, 0.1, 0.3)])
