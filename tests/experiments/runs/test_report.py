import math

import pytest

from ewc_lib.experiments.runs.report import Row, beside, interval, rows, table


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
    assert first == Row(settings, [0.9, 1.0, 1.1], 0, 3.0, 0.1, (0, 1, 2))
    assert first.by_seed == {0: 0.9, 1: 1.0, 2: 1.1}
    assert first.mean == pytest.approx(1.0)
    assert (second.accuracies, third.accuracies) == ([0.5], [0.4])


def test_the_seeds_of_a_row_are_in_order_so_that_rows_can_be_compared_seed_by_seed():
    (row,) = rows([run("EWC", 2, 0.7), run("EWC", 0, 0.9), run("EWC", 1, 0.8)])
    assert row.accuracies == [0.9, 0.8, 0.7]


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


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_an_accuracy_that_is_not_finite_is_that_of_a_run_that_diverged(lost):
    (row,) = rows([run("EWC", 0, 0.9), run("EWC", 1, lost)])
    assert (row.accuracies, row.seeds, row.diverged) == ([0.9], (0,), 1)


def test_the_same_seed_twice_is_refused():
    with pytest.raises(ValueError, match=r"same seed twice, \[0, 0\], at task EWC"):
        rows([run("EWC", 0, 0.9), run("EWC", 0, 0.8)])


@pytest.mark.parametrize("seeds", [(), (0,), (1, 1)])
def test_accuracies_without_a_seed_of_their_own_are_not_told_by_seed(seeds):
    with pytest.raises(ValueError, match="2 accuracies of the seeds"):
        _ = Row({}, [0.5, 0.6], 0, 1.0, 1.0, seeds).by_seed


def test_a_setting_of_zero_is_shown_and_one_that_is_absent_is_not():
    settings = {"strength": 0.0, "draws": 0, "decay": None, "clipped": False, "wide": True}
    result = {"experiment": "x", "data": "mnist", "runs": [run("EWC", 0, 0.5, **settings)]}
    assert "task EWC strength 0 draws 0 wide  " in table(result)


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


def rows_at(*accuracies):
    return rows([run("EWC", seed, accuracy) for seed, accuracy in enumerate(accuracies)])


def test_published_numbers_stand_beside_the_rows_that_they_are_about():
    (found,) = beside(rows_at(0.99, 0.98), "split-mnist", "{scenario} {method}")
    assert found.label == "task EWC"
    assert found.published.value == 99.06
    assert found.difference == pytest.approx(98.5 - 99.06)
    (unknown,) = beside(rows_at(0.99), "split-mnist", "{method}")
    assert unknown.published is None
    assert math.isnan(unknown.difference)
    assert unknown.verdict == ""


def test_the_error_of_a_difference_is_that_of_both_means():
    (found,) = beside(rows_at(0.98, 0.99, 1.0), "split-mnist", "{scenario} {method}")
    assert found.error == pytest.approx(math.hypot(1 / math.sqrt(3), 0.15))
    assert found.visible == pytest.approx((4.302653 + 1.060660) * found.error, rel=1e-6)


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([0.9906], ""),  # one seed has no error
        ([0.990, 0.991, 0.992], "agrees"),
        ([0.9699, 0.9701, 0.97], "differs"),
        ([0.90, 1.0], "undecided"),
        ([0.97, 0.99, 1.0], "undecided"),  # near, but two points would not have been seen
    ],
)
def test_numbers_agree_only_where_two_points_would_have_been_seen(accuracies, verdict):
    (found,) = beside(rows_at(*accuracies), "split-mnist", "{scenario} {method}")
    assert found.verdict == verdict


def test_more_noise_never_makes_a_number_agree():
    quiet, loud = (
        beside(rows_at(*values), "split-mnist", "{scenario} {method}")[0]
        for values in ([0.9600, 0.9601, 0.9602], [0.90, 0.96, 1.02])
    )
    assert (quiet.verdict, loud.verdict) == ("differs", "undecided")
