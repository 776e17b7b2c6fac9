import pytest
import torch

from ewc_lib.continual import MultiHead, mlp
from ewc_lib.data import digits
from ewc_lib.experiments.runs.choosing import choose
from ewc_lib.experiments.streams.split_chosen import (
    CLIP,
    SPLIT_CHOSEN,
    ClippedPenalty,
    all_so_far,
    among_all,
    corrected,
    criteria,
    knobs_of,
    searched,
)
from tests.experiments.cases import run


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    few = {"class": ["none", "EWC", "joint"], "masked": ["EWC, clipped", "EWC, all classes"]}
    return run(SPLIT_CHOSEN, tmp_path_factory.mktemp("few"), seeds=2, budget=4, methods=few)


def test_every_method_tries_as_many_settings_on_seeds_that_no_table_shows(result):
    for scenario, methods in result["protocol"]["methods"].items():
        for method in methods:
            own = searched(result["runs"], scenario, method)
            assert len({(r["strength"], r["rate"]) for r in own}) == 4
            shown = [r for r in result["runs"] if r["method"] == method and not r["search"]]
            assert {r["seed"] for r in shown} == {0, 1}
            assert not {r["seed"] for r in own} & {0, 1}


def test_what_is_shown_was_chosen_on_validation_images(result):
    for scenario, methods in result["protocol"]["methods"].items():
        for method in methods:
            own = searched(result["runs"], scenario, method)
            best = [choose(own, knobs_of(method), by).settings for by in criteria(scenario)]
            shown = [r for r in result["runs"] if r["method"] == method and not r["search"]]
            assert all({k: r[k] for k in knobs_of(method)} in best for r in shown)
            assert len(shown) == 2 * len({tuple(b.values()) for b in best})


def test_all_outputs_compete_however_few_are_read():
    model = MultiHead(torch.nn.Identity())
    z = torch.tensor([[5.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    model.outputs = range(2, 4)
    y = torch.tensor([0, 1])  # right within the head, where the first is wrong among all
    assert (model(z).argmax(1) == y).all()
    assert among_all(model, (z, y)) == 0.5


def test_the_head_comes_back_after_a_look_at_all_classes():
    model = MultiHead(torch.nn.Identity())
    model.outputs = range(2, 4)
    with all_so_far(model, (torch.eye(4), torch.tensor([0, 1, 0, 1]))) as (_, y):
        assert model.outputs == range(4)
        assert y.tolist() == [2, 3, 2, 3]
    assert model.outputs == range(2, 4)


def test_a_correction_finds_the_shift_between_tasks():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    z = 4 * torch.eye(4)[y] + torch.randn(400, 4, generator=generator)
    moved = z + torch.tensor([0.0, 0.0, 9.0, 9.0])  # the second task is always named
    assert (moved.argmax(1) == y).double().mean() < 0.6
    own, few = slice(40, None), slice(0, 40)
    found = corrected(moved[own], y[own], moved[few], y[few], 2)
    assert found > (z[own].argmax(1) == y[own]).double().mean() - 0.05


@pytest.mark.parametrize("reverse", [False, True])
def test_the_clipped_importance_is_that_of_batches_of_all_classes_and_averages_tasks(reverse):
    images = digits(dtype=torch.float64)
    model = MultiHead(mlp((64, 8, 4), seed=0).double())
    penalty = ClippedPenalty(model, 1.0, reverse=reverse, batch_size=20)
    expected = []
    for head, rows in ((range(2), slice(0, 60)), (range(2, 4), slice(60, 120))):
        model.outputs = head
        x, y = images.x_train[rows], images.y_train[rows] % 2
        squares = []
        for part in range(3):
            own = slice(20 * part, 20 * part + 20)
            z = model.net(x[own])[:, : head.stop] * (-1 if reverse else 1)
            loss = torch.nn.functional.cross_entropy(z, y[own] + head.start)
            squares.append(torch.autograd.grad(loss, model.net[0].weight)[0] ** 2)
        expected.append(torch.stack(squares).mean(0).clamp(max=CLIP))
        penalty.consolidate((x, y))
    assert penalty.precision is not None
    found = penalty.precision.diagonal()["net.0.weight"]
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2)
    assert any((e == CLIP).any() for e in expected)
    assert any((e < CLIP).any() for e in expected)
