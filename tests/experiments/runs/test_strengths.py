import math

import matplotlib.pyplot as plt
import pytest

from ewc_lib.experiments.runs.strengths import (
    Point,
    best,
    decades,
    draw,
    plateau,
    points,
    sweep,
)


def parabola(strength, seed):
    return 0.9 - 0.01 * (math.log10(strength) - 2) ** 2 + 0.001 * seed


def explodes(strength, seed):
    return math.nan if strength > 100 and seed else parabola(strength, seed)


def test_a_sweep_has_a_point_for_each_strength_averaged_over_seeds(tmp_path):
    found = sweep(parabola, decades(0, 4), seeds=[0, 2], path=tmp_path / "s.json")
    assert [p.strength for p in found] == [1.0, 10.0, 100.0, 1e3, 1e4]
    assert found[2].mean == pytest.approx(0.901)
    assert found[2].error == pytest.approx(0.001)
    assert (found[2].n, found[2].failed) == (2, 0)


def test_a_sweep_goes_on_where_it_was_and_keeps_settings_apart(tmp_path):
    path, done = tmp_path / "s.json", []
    sweep(parabola, [1.0], seeds=[0], path=path, settings={"steps": 5})

    def recorded(strength, seed):
        done.append((strength, seed))
        return parabola(strength, seed)

    again = sweep(recorded, [1.0, 10.0], seeds=[0], path=path, settings={"steps": 5})
    assert done == [(10.0, 0)]
    assert len(again) == 2
    with pytest.raises(ValueError, match="another protocol"):
        sweep(parabola, [1.0], seeds=[0], path=path, settings={"steps": 6})


def test_all_strengths_of_a_seed_come_before_the_next_seed(tmp_path):
    done = []

    def recorded(strength, seed):
        done.append((seed, strength))
        return 0.5

    sweep(recorded, [10.0, 1.0], seeds=[0, 1], path=tmp_path / "s.json")
    assert done == [(0, 10.0), (0, 1.0), (1, 10.0), (1, 1.0)]


def test_runs_that_diverged_are_counted_and_not_averaged(tmp_path):
    found = sweep(explodes, decades(1, 4), seeds=[0, 1], path=tmp_path / "s.json")
    assert [p.failed for p in found] == [0, 0, 0.5, 0.5]
    assert found[2].mean == pytest.approx(parabola(1e3, 0))
    assert math.isnan(found[2].error)
    assert best(found).strength == 100


def test_the_plateau_ends_where_the_result_is_worse_or_a_run_diverged():
    means = [0.5, 0.895, 0.89, 0.9, 0.895, 0.85, 0.9]
    found = [Point(10.0**i, mean, 0.0, 2, 0.0) for i, mean in enumerate(means)]
    assert plateau(found, tolerance=0.006) == (1e3, 1e4)
    assert plateau(found, tolerance=0.01) == (10.0, 1e4)
    assert plateau(found, tolerance=0.1) == (10.0, 1e6)
    found[4] = found[4]._replace(failed=0.5)
    assert plateau(found, tolerance=0.1) == (10.0, 1e3)


def test_there_is_no_best_strength_if_some_run_diverged_at_each():
    with pytest.raises(ValueError, match="diverged at every strength"):
        best([Point(1.0, 0.5, 0.0, 1, 0.5)])


def test_points_know_none_for_nan():
    (point,) = points([{"strength": 1.0, "accuracy": None}], "accuracy")
    assert math.isnan(point.mean)
    assert (point.n, point.failed) == (0, 1)


def test_decades_are_exact_powers_of_ten():
    assert decades(-1, 2) == [0.1, 1.0, 10.0, 100.0]
    assert decades(0, 12, step=6) == [1.0, 1e6, 1e12]


def test_the_figure_shows_the_curve_its_plateau_and_the_bayesian_strength():
    axes = plt.figure().add_subplot()
    found = [Point(10.0**i, m, 0.01, 3, 0.0) for i, m in enumerate([0.1, 0.9, 0.9, 0.2])]
    draw(axes, found, label="EWC", bayesian=5.0)
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert [1.0, 10.0, 100.0, 1000.0] in lines
    assert [10.0, 100.0] in lines
    assert [5.0, 5.0] in lines
    assert axes.get_xscale() == "log"
    plt.close("all")
