import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.lines import Line2D

from ewc_lib.experiments.cost.report import Fit, Measured, figure, fits, rows, with_later


@pytest.fixture(autouse=True)
def restore_style():
    mpl.use("agg")
    with mpl.rc_context():
        yield
    plt.close("all")


def test_a_cost_is_the_median_ratio_to_the_plain_pass_just_before(result):
    row = rows(result)[0]
    assert row[:7] == ("mlp", "ewc_lib", "empirical", 100, 1.5, 1.0, 2.0)
    assert row.mebibytes == 20
    assert not row.scaled


def test_fewer_observations_are_scaled_to_all(result):
    row = next(row for row in rows(result) if row.library == "slow")
    assert (row.n, row.passes, row.scaled) == (20, 5.0, True)


def test_only_answers_that_should_be_exact_are_wrong():
    assert Measured("m", "l", "exact", error=1e-3).wrong
    assert Measured("m", "l", "empirical", error=1e-3).wrong
    assert not Measured("m", "l", "exact", error=1e-7).wrong
    assert not Measured("m", "l", "sketch", error=1.0).wrong
    assert not Measured("m", "l", "exact").wrong


def test_what_was_measured_once_more_takes_the_place_of_what_was_there(result):
    mine = result["sections"]["mlp"]
    again = {"sections": {"mlp": {**mine, "contestants": {"slow": {"exact": {"reason": "no"}}}}}}
    before, after = ({row[:3]: row for row in rows(r)} for r in (result, with_later(result, again)))
    assert [key for key in before if before[key] != after[key]] == [("mlp", "slow", "exact")]
    assert after["mlp", "slow", "exact"].reason == "no"
    assert "reason" not in mine["contestants"]["slow"]["exact"]


def test_another_number_of_observations_is_not_put_into_a_result(result):
    other = {"sections": {"mlp": {**result["sections"]["mlp"], "n": 7}}}
    with pytest.raises(ValueError, match="100, then 7 observations"):
        with_later(result, other)


@pytest.mark.parametrize(("slowest", "numbers"), [(2.0, "1 2 5"), (500.0, "1 10 100")])
def test_the_axis_of_times_has_plain_numbers(slowest, numbers, result):
    result["sections"]["mlp"]["contestants"]["slow"]["exact"] |= {
        "seconds": [slowest * plain / 5 for plain in (1.0, 2.0, 4.0)]
    }
    axes = figure(result).axes[0]
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == numbers.split()


def test_a_straight_line_is_found(result):
    plain, exact = fits(result)
    assert plain == pytest.approx(Fit("plain", 1.0, 1.0, 1.0, 0.0))
    assert exact[0] == "exact"
    assert exact[1:] == pytest.approx((3.0, 1.0, 1.0, 5.0))


def test_the_figure_has_a_panel_for_each_section_and_a_point_for_each_cost(result):
    models, line = figure(result).axes
    assert (models.get_title(), line.get_title()) == ("Tiny", "Tiny")
    assert [t.get_text() for t in models.get_yticklabels()] == ["ewc_lib", "slow", "careless"]
    points = [container[0] for container in models.containers]
    costs = sorted(float(point.get_xdata()[0]) for point in points)
    assert costs == [1.0, 1.5, 3.0, 5.0]
    hollow = [p.get_xdata()[0] for p in points if p.get_markerfacecolor() == "none"]
    assert hollow == [1.0]
    drawn = [curve for curve in line.lines if isinstance(curve, Line2D)]
    assert [list(curve.get_ydata()) for curve in drawn] == [[11, 21, 41], [31, 61, 121]]


def test_bars_reach_from_the_smallest_to_the_largest_time(result):
    models = figure(result).axes[0]
    bars = models.containers[0].lines[2][0].get_segments()
    assert [list(x) for x in bars[0][:, 0:1].T] == [[1.0, 2.0]]


def test_the_figure_leaves_no_empty_axes(result):
    result["sections"]["again"] = result["sections"]["mlp"]
    drawn = figure(result)
    assert sum(axes.axison for axes in drawn.axes) == 3
    assert math.isclose(drawn.get_figheight(), 6.6)
