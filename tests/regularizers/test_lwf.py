"""Learning without forgetting, against its formula written out."""

import copy

import pytest
import torch

from ewc_lib.regularizers import LwF
from tests.regularizers.cases import TIGHT, learn, move, network, sgd, task


def divergence(old, new, temperature):
    p, q = ((f / temperature).softmax(-1) for f in (old, new))
    return (p * (p.log() - q.log())).sum(1).mean()


def after(heads, **options):
    """A model after tasks with these heads, the method, and the last optimum."""
    model = network()
    regularizer = LwF(model, **options)
    for t, head in enumerate(heads):
        model.outputs = head
        learn(model, sgd(model), regularizer, task(t))
    old = copy.deepcopy(model)
    move(model)
    return model, regularizer, old


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_old_heads_are_compared_on_the_new_inputs_by_the_last_network(temperature):
    heads = [range(0, 2), range(2, 4)]
    model, regularizer, old = after(heads, strength=3.0, temperature=temperature)
    x, _ = task(9)
    regularizer.before_step(x)
    each = [
        divergence(old.net(x)[:, h.start : h.stop], model.net(x)[:, h.start : h.stop], temperature)
        for h in heads
    ]
    torch.testing.assert_close(regularizer.penalty(), 3 * sum(each) / 2, **TIGHT)


def test_by_default_each_task_weighs_the_same():
    """Up to the factor t: 1/t of the loss of the task, 1 - 1/t of the mean over old heads."""
    _, regularizer, _ = after([range(0, 2), range(1, 3), range(2, 4)], strength=1.0)
    x, _ = task(9)
    regularizer.before_step(x)
    mean, t = regularizer.penalty().item(), 4
    regularizer.strength = None
    assert regularizer.penalty().item() / t == pytest.approx((1 - 1 / t) * mean, rel=1e-12)


@pytest.mark.parametrize(
    ("heads", "kept"),
    [
        ([range(0, 2), range(0, 2)], [range(0, 2)]),
        ([range(0, 2), range(0, 3), range(0, 4)], [range(0, 4)]),
        ([range(0, 2), range(2, 4)], [range(0, 2), range(2, 4)]),
        ([None], [range(0, 4)]),
    ],
)
def test_a_head_that_is_part_of_a_newer_one_is_dropped(heads, kept):
    _, regularizer, _ = after(heads)
    assert regularizer.state_dict()["heads"].tolist() == [[h.start, h.stop] for h in kept]


def test_the_gradient_is_that_of_the_cross_entropy_of_softened_outputs():
    model, regularizer, old = after([range(0, 4)], strength=1.0)
    x, _ = task(9)
    regularizer.before_step(x)
    cross_entropy = (
        -((old.net(x) / 2).softmax(-1).detach() * (model.net(x) / 2).log_softmax(-1)).sum(1).mean()
    )
    found, expected = (
        torch.autograd.grad(loss, [*model.parameters()])
        for loss in (regularizer.penalty(), cross_entropy)
    )
    torch.testing.assert_close(found, expected, **TIGHT)


def test_the_old_network_does_not_follow_the_new_one():
    model, regularizer, old = after([range(0, 2)])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    kept = regularizer.state_dict()
    for name, value in old.state_dict().items():
        assert torch.equal(kept[f"old.{name}"], value)


def test_a_model_without_heads_has_one():
    model = network().net
    regularizer = LwF(model)
    regularizer.consolidate(task())
    assert regularizer.state_dict()["heads"].tolist() == [[0, 4]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        LwF(network(), temperature=temperature)


def test_an_incomplete_state_is_refused():
    with pytest.raises(ValueError, match=r"not the state of LwF: it has no \['heads'\]"):
        LwF(network()).load_state_dict({"n_tasks": torch.tensor(1)})
