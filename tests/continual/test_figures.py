import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from ewc_lib.continual.figures import draw_curves, draw_matrix

R = torch.tensor([[0.9, 0.2, math.nan], [0.7, 0.8, 0.3], [0.6, 0.5, 1.0]])


@pytest.fixture
def axes():
    mpl.use("agg")
    yield plt.figure().add_subplot()
    plt.close("all")


def test_the_heat_map_shows_percent_of_what_was_learned_and_nothing_else(axes):
    draw_matrix(axes, R)
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["90", "70", "80", "60", "50", "100"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "3"]


def test_a_large_matrix_has_colours_without_numbers(axes):
    draw_matrix(axes, torch.rand(11, 11))
    assert not axes.texts


def test_a_curve_begins_when_its_task_was_learned(axes):
    draw_curves(axes, R)
    curves = [(list(line.get_xdata()), line.get_ydata()) for line in axes.lines]
    assert [x for x, _ in curves] == [[1, 2, 3], [2, 3], [3]]
    assert [y for _, y in curves] == [
        pytest.approx([0.9, 0.7, 0.6]),
        pytest.approx([0.8, 0.5]),
        pytest.approx([1.0]),
    ]
