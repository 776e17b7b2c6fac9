from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from ewc_lib import data
from ewc_lib.continual import permute_pixels, permuted, rotated, split
from ewc_lib.continual.streams import turn

SCENARIOS = ("task", "domain", "class")


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def source(labels, test_labels=None, n_features=4):
    """Return a data set of the given labels, each image as bright as its number."""
    y = torch.tensor(labels)
    y_test = y if test_labels is None else torch.tensor(test_labels)
    x, x_test = (torch.arange(float(len(t)))[:, None].repeat(1, n_features) for t in (y, y_test))
    return SimpleNamespace(x_train=x, y_train=y, x_test=x_test, y_test=y_test)


def test_every_image_keeps_its_pixels_in_one_common_new_order():
    a = data.digits()
    b = permute_pixels(a, seed=3)
    before, after = (torch.cat([task.x_train, task.x_test]) for task in (a, b))
    order = [int((before == after[:, i : i + 1]).all(0).nonzero()[0]) for i in range(64)]
    assert torch.equal(before[:, order], after)
    assert not torch.equal(before, after)


def test_labels_stay():
    a = data.digits()
    b = permute_pixels(a, seed=3)
    assert torch.equal(a.y_train, b.y_train)
    assert torch.equal(a.y_test, b.y_test)


def test_the_seed_chooses_the_permutation_and_the_global_state_is_not_used():
    a = data.digits()
    before = torch.random.get_rng_state()
    same = [permute_pixels(a, seed=1).x_train for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], permute_pixels(a, seed=2).x_train)
    assert torch.equal(before, torch.random.get_rng_state())


# Streams


@pytest.mark.claim("def-scenarios")
def test_split_tasks_share_the_classes_out_and_number_them_by_scenario(digits):
    for scenario, outputs, labels in (
        ("task", [range(2 * t, 2 * t + 2) for t in range(5)], [[0, 1]] * 5),
        ("domain", [range(2)] * 5, [[0, 1]] * 5),
        ("class", [range(2 * t + 2) for t in range(5)], [[2 * t, 2 * t + 1] for t in range(5)]),
    ):
        stream = split(digits, scenario=scenario)
        assert stream.n_outputs == (2 if scenario == "domain" else 10)
        assert [task.outputs for task in stream] == outputs
        assert [task.train[1].unique().tolist() for task in stream] == labels
        assert [task.test[1].unique().tolist() for task in stream] == labels
        assert sum(len(task.train[0]) for task in stream) == len(digits.x_train)


def test_a_split_task_holds_the_images_of_its_classes(digits):
    task = split(digits, scenario="task")[3]
    assert task.name == "6 and 7"
    for new, old in ((0, 6), (1, 7)):
        expected = digits.x_train[digits.y_train == old]
        assert torch.equal(task.train[0][task.train[1] == new], expected)


def test_the_seed_of_a_split_chooses_the_order_of_the_classes(digits):
    names = {seed: split(digits, scenario="task", seed=seed).names for seed in range(3)}
    assert len(set(names.values())) == 3
    for found in names.values():
        assert sorted("".join(found).replace(" and ", "")) == list("0123456789")
    assert split(digits, scenario="task", seed=1).names == names[1]
    assert split(digits, scenario="task").names[0] == "0 and 1"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_permuted_tasks_have_all_images_in_orders_of_their_own(digits, scenario):
    stream = permuted(digits, 3, seed=0, scenario=scenario)
    assert stream.n_outputs == (10 if scenario == "domain" else 30)
    seen = [task.train[0] for task in stream]
    for t, x in enumerate(seen):
        assert torch.equal(x.sort(1).values, digits.x_train.sort(1).values)
        assert not torch.equal(x, digits.x_train)
        assert not any(torch.equal(x, other) for other in seen[:t])
        shift = 10 * t if scenario == "class" else 0
        assert torch.equal(stream[t].train[1], digits.y_train + shift)


def test_train_and_test_have_the_same_permutation():
    whole = torch.arange(12.0).reshape(3, 4)  # no two pixels are alike
    images = source([0, 1, 1])
    images.x_train, images.x_test = whole, whole + 100
    task = permuted(images, 2, seed=0)[1]
    assert torch.equal(task.train[0] + 100, task.test[0])


def test_a_stream_is_fixed_by_its_seed_and_leaves_the_global_state_alone(digits):
    before = torch.random.get_rng_state()
    a, b, c = (permuted(digits, 2, seed=seed)[1].train[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (270, 3), (-90, 3)])
@pytest.mark.parametrize("side", [8, 7])
def test_right_angles_turn_images_counter_clockwise(degrees, turns, side):
    x = torch.rand(5, side * side, generator=torch.Generator().manual_seed(0))
    expected = torch.rot90(x.reshape(5, side, side), turns, dims=(1, 2)).reshape(5, -1)
    torch.testing.assert_close(turn(x, degrees), expected, rtol=0, atol=1e-5)


def test_rotated_tasks_are_the_images_turned_by_their_angles(digits):
    stream = rotated(digits, [0, 30.0], scenario="task")
    assert stream.names == ("0°", "30°")
    torch.testing.assert_close(stream[1].test[0], turn(digits.x_test, 30))
    assert stream.n_outputs == 20
    back = turn(stream[1].train[0], -30)
    errors = [(x - digits.x_train).square().mean() for x in (back, stream[1].train[0])]
    assert errors[0] < 0.3 * errors[1]


def test_any_data_set_with_the_same_fields_can_be_split():
    stream = split(source([5, 7, 5, 9, 7, 9, 11, 11]), 2, scenario="domain")
    assert stream.names == ("5 and 7", "9 and 11")
    assert stream[1].train[0][:, 0].tolist() == [3, 5, 6, 7]
    assert stream[1].train[1].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: split(d, 3, scenario="task"), "10 classes cannot be split into 3"),
        (lambda d: split(d, 20, scenario="task"), "10 classes cannot be split into 20"),
        (lambda d: split(d, 0, scenario="task"), "at least one task, got 0"),
        (lambda d: split(d, scenario="tasks"), "got 'tasks'"),
        (lambda d: permuted(d, 0, seed=0), "at least one task, got 0"),
        (lambda d: permuted(d, 2, seed=0, scenario="all"), "got 'all'"),
        (lambda d: permuted(source([]), 2, seed=0), "data set has no training data"),
        (lambda d: rotated(source([]), [0]), "data set has no training data"),
        (lambda d: split(source([]), 2, scenario="task"), "data set has no training data"),
        (lambda d: permuted(source([0, -1]), 2, seed=0), "must not be negative, got -1"),
        (lambda d: rotated(d, []), "at least one task, got 0"),
        (lambda d: rotated(source([0, 1], n_features=6), [3]), "only square images .* got 6"),
        (
            lambda d: split(source([0, 1], [0, 2]), 2, scenario="task"),
            r"test data of the data set hold classes \[2\] without training",
        ),
        (lambda d: split(source([0, 1], [1]), 2, scenario="task")[0], "task '0' has no test data"),
        (lambda d: permuted(source([0, 1], [2]), 1, seed=0)[0], r"classes \[2\] without training"),
        (
            lambda d: permuted(
                SimpleNamespace(**vars(source([0, 1])) | {"x_train": torch.ones(0, 4)}), 1, seed=0
            )[0],
            "task 'permutation 1' has no training data",
        ),
    ],
)
def test_bad_streams_are_refused_by_name(digits, make, message):
    with pytest.raises(ValueError, match=message):
        make(digits)


@pytest.mark.parametrize("make", [permuted, split, rotated])
def test_a_data_set_that_is_read_item_by_item_is_refused_with_the_way_out(make):
    options = {permuted: {"n_tasks": 2, "seed": 0}, split: {"scenario": "task"}}
    images = TensorDataset(torch.zeros(4, 4), torch.arange(4))
    way_out = r"TensorDataset has no x_train.*\[\(name, train, test\).*data\.Subset"
    with pytest.raises(TypeError, match=way_out):
        make(images, **options.get(make, {"angles": [0]}))
    with pytest.raises(TypeError, match=r"tuple has no x_train, y_train, x_test, y_test$"):
        make((1, 2), **options.get(make, {"angles": [0]}))
