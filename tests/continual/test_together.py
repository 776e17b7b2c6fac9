"""Networks that are trained at once end where each would have ended alone."""

import copy
from functools import partial

import pytest
import torch

from ewc_lib import EWC, data
from ewc_lib.continual import (
    MultiHead,
    Together,
    learn,
    learn_together,
    mlp,
    permute_pixels,
    permuted,
    train,
)

SIZES, SEEDS, STRENGTHS = (64, 16, 10), (0, 1, 2), (0.0, 10.0, 1000.0)
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def digits():
    return data.digits(dtype=torch.float64)


def networks():
    return [mlp(SIZES, seed).double() for seed in SEEDS]


def assert_equal_weights(found, expected):
    for one, other in zip(found, expected, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_networks_without_a_penalty_are_trained_as_if_alone(digits):
    tasks = [permute_pixels(digits, seed).train for seed in SEEDS]
    found, expected = networks(), networks()
    together = Together(found)
    for steps in (30, 10):  # the optimizer is kept
        together.train(tasks, steps=steps, seeds=SEEDS, batch_size=32)
    for seed, task, model in zip(SEEDS, tasks, expected, strict=True):
        optimizer = torch.optim.Adam(model.parameters())
        for steps in (30, 10):
            options = {"steps": steps, "seed": seed, "batch_size": 32}
            train(model, task, optimizer=optimizer, **options)
    assert_equal_weights(found, expected)
    assert not torch.equal(found[0][0].weight, found[1][0].weight)


def consolidated(digits, structure):
    """Return networks with a penalty each: of another strength, anchor and precision."""
    models = networks()
    penalties = [
        EWC(model, strength, structure=structure)
        for model, strength in zip(models, STRENGTHS, strict=True)
    ]
    for seed, model, ewc in zip(SEEDS, models, penalties, strict=True):
        train(model, digits.train, steps=20, seed=seed)
        ewc.consolidate((digits.x_train[:200], digits.y_train[:200]))
    return models, penalties


@pytest.mark.parametrize(
    ("structure", "optimizer", "proximal"),
    [
        ("diagonal", torch.optim.Adam, False),
        ("diagonal", SGD, False),
        ("diagonal", torch.optim.Adam, True),
        ("diagonal", torch.optim.Adam, "euclidean"),
        ("diagonal", SGD, True),
        ("dense", torch.optim.Adam, False),
    ],
)
def test_networks_with_penalties_are_trained_as_if_alone(digits, structure, optimizer, proximal):
    task_b = permute_pixels(digits, 5).train
    found, penalties = consolidated(digits, structure)
    expected, own = consolidated(digits, structure)
    together = Together(found, penalties, optimizer=optimizer, proximal=proximal)
    together.train([task_b] * 3, steps=30, seeds=[7, 8, 9])
    for seed, model, ewc in zip((7, 8, 9), expected, own, strict=True):
        own_optimizer = optimizer(model.parameters())
        options = {"regularizer": ewc, "optimizer": own_optimizer, "proximal": proximal}
        train(model, task_b, steps=30, seed=seed, **options)
    assert_equal_weights(found, expected)


def test_a_strength_beyond_single_precision_holds_what_has_information_and_nothing_else(digits):
    images = digits._replace(x_train=digits.x_train.float())
    model = mlp((64, 10), seed=0)
    ewc = EWC(model, 1e39)
    ewc.consolidate(images.train)
    before = [p.detach().clone() for p in model.parameters()]
    together = Together([model], [ewc], optimizer=SGD, proximal=True)
    together.train([permute_pixels(images, 1).train], steps=5, seeds=[0])
    for p, old, values in zip(
        model.parameters(), before, ewc.precision.values.values(), strict=True
    ):
        assert torch.equal(p[values > 1e-30], old[values > 1e-30])
        assert p.isfinite().all()
    assert not torch.equal(model[0].weight, before[0])  # of pixels that are always black


def test_a_network_without_a_penalty_may_stand_beside_one_with_it(digits):
    found, penalties = consolidated(digits, "diagonal")
    expected = copy.deepcopy(found[2])
    Together(found, [*penalties[:2], None]).train([digits.train] * 3, steps=20, seeds=SEEDS)
    train(expected, digits.train, steps=20, seed=2)
    assert_equal_weights(found[2:], [expected])


def test_a_network_that_diverges_leaves_the_others_alone(digits):
    found, penalties = consolidated(digits, "diagonal")
    expected = copy.deepcopy(found[0])
    penalties[1].strength = 1e30
    Together(found, penalties, optimizer=SGD).train([digits.train] * 3, steps=50, seeds=SEEDS)
    train(expected, digits.train, steps=50, seed=0, optimizer=SGD(expected.parameters()))
    assert not found[1][0].weight.isfinite().all()
    assert_equal_weights(found[:1], [expected])


def test_every_network_needs_a_penalty_or_none():
    with pytest.raises(ValueError, match="3 networks need as many penalties, got 1"):
        Together(networks(), [None])


def test_proximal_steps_need_diagonal_precisions(digits):
    models, penalties = consolidated(digits, "dense")
    together = Together(models, penalties, proximal=True)
    with pytest.raises(ValueError, match="only with diagonal precisions"):
        together.train([digits.train] * 3, steps=1, seeds=SEEDS)


def streams_and_networks(digits, modes):
    streams = [permuted(digits, 3, seed=seed) for seed in SEEDS]
    models = [MultiHead(model) for model in networks()]
    penalties = [
        mode and EWC(model, 100.0, mode) for model, mode in zip(models, modes, strict=True)
    ]
    return streams, models, penalties


@pytest.mark.parametrize("n_samples", [None, 100])
def test_streams_are_learned_as_if_alone(digits, n_samples):
    modes = (None, "separate", "online")
    streams, models, penalties = streams_and_networks(digits, modes)
    options = {"steps": 15, "batch_size": 32, "n_samples": n_samples}
    found = learn_together(streams, models, penalties, seeds=SEEDS, **options)
    for seed, *own, learned, model in zip(
        SEEDS, *streams_and_networks(digits, modes), found, models, strict=True
    ):
        alone = learn(*own, seed=seed, progress=False, **options)
        torch.testing.assert_close(learned.accuracies, alone.accuracies, equal_nan=True)
        torch.testing.assert_close(learned.initial, alone.initial)
        assert_equal_weights([model], [own[1]])
        assert model.outputs == own[1].outputs


def test_what_a_diverged_network_knows_is_nan_and_the_others_go_on(digits):
    streams, models, penalties = streams_and_networks(digits, ("separate",) * 3)
    penalties[1].strength = 1e30
    found = learn_together(
        streams, models, penalties, steps=50, seeds=SEEDS, optimizer=SGD, batch_size=32
    )
    for k, learned in enumerate(found):
        assert learned.accuracies[0, 0] > 0.1
        assert learned.accuracies[1:].isnan().all() == (k == 1)
    assert [ewc.n_tasks for ewc in penalties] == [3, 1, 3]
