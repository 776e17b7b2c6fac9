import math

import pytest

from ewc_lib.experiments.report import Row, interval, rows, table


def run(method, seed, accuracy, **other):
    outcome = {"accuracy": accuracy, "final": [accuracy], "seconds": 3.0, "sitting": 0}
    outcome |= {"seconds_training": 2.0 + seed, "seconds_consolidation": 0.1}
    return {
        "scenario": "task",
        "method": method,
        "strength": None,
        "seed": seed,
        **outcome,
        **other,
    }


RUNS = [
    run("EWC", 0, 0.9, strength=10.0),
    run("none", 0, 0.5),
    run("EWC", 1, 1.0, strength=10.0),
    run("EWC", 2, 1.1, strength=10.0),
    run("none", 0, 0.4, scenario="class"),
]


def test_a_row_holds_all_seeds_of_its_settings():
    first, second, third = rows(RUNS)
    settings = {"scenario": "task", "method": "EWC", "strength": 10.0}
    assert first == Row(settings, [0.9, 1.0, 1.1], 0, 3.0, 0.1)
    assert first.mean == pytest.approx(1.0)
    assert (second.accuracies, third.accuracies) == ([0.5], [0.4])


def test_rows_can_be_chosen_by_their_settings():
    assert [row.mean for row in rows(RUNS, scenario="class")] == [0.4]
    assert [len(row.accuracies) for row in rows(RUNS, method="EWC", scenario="task")] == [3]


def test_the_interval_is_that_of_students_distribution():
    assert interval([0.9, 1.0, 1.1]) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval([1.0]))


def test_runs_that_diverged_are_counted_and_not_averaged():
    lost = {"method": "EWC", "seed": 0, "accuracy": None, "diverged": True, "sitting": 0}
    (row,) = rows([lost])
    assert (row.accuracies, row.diverged) == ([], 1)
    assert math.isnan(row.mean)


def test_the_table_has_a_line_for_each_row_and_marks_a_demonstration():
    result = {"experiment": "x", "data": "digits", "runs": RUNS}
    title, warning, *lines = table(result).splitlines()
    assert title == "x on digits, 5 runs"
    assert "demonstration" in warning
    assert lines[0].split() == [
        "task",
        "EWC",
        "strength",
        "10",
        "100.00",
        "±",
        "24.84",
        "(3",
        "seeds)",
    ]
    assert len(lines) == 3
    assert "demonstration" not in table({**result, "data": "mnist"})
