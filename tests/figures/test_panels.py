import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import ConnectionPatch

from ewc_lib.figures._panels import windows


def panels(columns, rows=1, **options):
    return plt.subplots(rows, columns, figsize=(7, 3), **options)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (1, 4), (2, 3)])
def test_each_column_of_panels_has_a_window_and_together_they_are_the_figure(rows, columns):
    found = windows(panels(columns, rows)[0])
    assert len(found) == columns
    edges = [left for left, _ in found] + [7 * 72]
    assert [left + width for left, width in found] == pytest.approx(edges[1:])
    assert edges[0] == 0


def test_no_window_cuts_through_a_panel_or_its_labels():
    figure, axes = panels(2)
    axes[1].set_ylabel("long\nlabel")
    (_, cut), _ = windows(figure)
    boxes = [panel.get_tightbbox() for panel in axes]
    assert boxes[0].x1 < cut / 72 * figure.dpi < boxes[1].x0


def test_a_colour_bar_stays_with_the_panel_at_its_left():
    figure, axes = panels(2)
    for panel in axes:
        figure.colorbar(panel.imshow([[0, 1]]), ax=panel)
    assert len(windows(figure)) == 2


@pytest.mark.parametrize("title", ["suptitle", "supxlabel"])
def test_a_title_over_the_gap_keeps_the_panels_together(title):
    figure, _ = panels(2)
    getattr(figure, title)("A title of some length in the middle")
    assert windows(figure) == [(0, 504)]


def test_a_label_at_the_side_belongs_to_a_window():
    figure, _ = panels(2)
    figure.supylabel("y")
    assert len(windows(figure)) == 2


def test_a_line_from_one_panel_to_another_keeps_them_together():
    figure, axes = panels(2)
    ends = {"xyA": (0.5, 0.5), "xyB": (0.5, 0.5), "axesA": axes[0], "axesB": axes[1]}
    figure.add_artist(ConnectionPatch(coordsA="data", coordsB="data", **ends))
    assert len(windows(figure)) == 1


def test_an_invisible_panel_has_no_window():
    figure, axes = panels(3)
    axes[1].set_visible(False)
    assert len(windows(figure)) == 2


def test_several_figures_are_cut_where_none_has_ink():
    drawn = [panels(2, layout="none", gridspec_kw={"wspace": 0.6}) for _ in range(2)]
    drawn[1][1][1].set_ylabel("long\nlabel")
    both = windows(*(figure for figure, _ in drawn))
    assert len(both) == 2
    for figure, axes in drawn:
        boxes = [panel.get_tightbbox() for panel in axes]
        assert boxes[0].x1 < both[0][1] / 72 * figure.dpi < boxes[1].x0


def test_figures_without_a_common_gap_stay_whole():
    one, other = (panels(2, gridspec_kw={"width_ratios": ratios})[0] for ratios in ((1, 2), (2, 1)))
    assert len(windows(one)) == len(windows(other)) == 2
    assert windows(one, other) == [(0, 504)]
