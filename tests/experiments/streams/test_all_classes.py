import pytest
import torch

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import MultiHead, accuracy, mlp, split, train
from ewc_lib.data import digits
from ewc_lib.experiments.streams.all_classes import (
    CLIP,
    ClippedPenalty,
    OfAllClasses,
    after_correction,
    all_so_far,
    among_all,
    corrected,
)


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


def test_a_network_that_sees_the_last_task_everywhere_is_mended_by_a_few_images_of_each_class():
    stream = split(digits(), 5, scenario="class", seed=0)
    parts = [stream[t].train for t in range(5)]
    x = torch.cat([x for x, _ in parts])
    y = torch.cat([y % 2 + 2 * t for t, (_, y) in enumerate(parts)])
    net = mlp((64, 32, 10), seed=0)
    train(net, (x, y), steps=150, seed=0)
    before = accuracy(net, (x, y))
    net[-1].bias.data[8:] += 100
    found = after_correction(MultiHead(net), stream, stream, kept=5)
    assert accuracy(net, (x, y)) < 0.3 < before - 0.1 < found["corrected"]
    assert found["corrected"] == found["corrected_valid"]


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


def test_the_fisher_information_may_be_of_the_softmax_over_all_classes_so_far():
    images = digits(dtype=torch.float64)
    x, y = images.x_train[:50], images.y_train[:50] % 2
    model = MultiHead(mlp((64, 8, 4), seed=0).double())
    found = {}
    for make in (EWC, OfAllClasses):
        model.outputs = range(2, 4)
        penalty = make(model, 1.0)
        penalty.consolidate((x, y))
        found[make] = penalty.precision.diagonal()["net.2.bias"]
    model.outputs = None
    expected = fisher_information(model, (x, y + 2)).diagonal()["net.2.bias"]
    torch.testing.assert_close(found[OfAllClasses], expected)
    assert (found[OfAllClasses][:2] > 0).all()
    assert (found[EWC][:2] == 0).all()
