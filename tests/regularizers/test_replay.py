"""Experience replay, and joint training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from ewc_lib.regularizers import Replay
from tests.regularizers.cases import DOUBLE, TIGHT, copies, learn, move, network, sgd, task
from tests.scenarios import same


def numbered(n, first, classes=2):
    """Observations that can be told apart by their inputs."""
    x = torch.zeros(n, 3, dtype=DOUBLE)
    x[:, 0] = torch.arange(first, first + n)
    return x / 100, torch.arange(n) % classes


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def after(heads, tasks, **options):
    model = network()
    regularizer = Replay(model, **options)
    for head, data in zip(heads, tasks, strict=True):
        model.outputs = head
        regularizer.consolidate(data)
    return model, regularizer


def drawn(regularizer):
    regularizer.before_step()
    rows = [
        (part.inputs, part.target, torch.full((len(part),), t)) for t, part in regularizer._batch
    ]
    x, y, t = map(torch.cat, zip(*rows, strict=True))
    return (100 * x[:, 0]).round().long(), x, y, t


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_each_observation_is_read_by_its_head_or_by_the_outputs_read_now_that_contain_it(scenario):
    heads, now = {
        "task": ([range(0, 1), range(1, 3)], range(3, 4)),
        "domain": ([range(0, 2), range(0, 2)], range(0, 2)),
        "class": ([range(0, 2), range(0, 3)], range(0, 4)),
    }[scenario]
    tasks = [numbered(10, 10 * t, classes=len(head)) for t, head in enumerate(heads)]
    model, regularizer = after(heads, tasks, strength=3.0, batch_size=50)
    model.outputs = now
    move(model)
    number, x, _, _ = drawn(regularizer)
    assert set((number // 10).tolist()) == {0, 1}
    total = 0
    for k, one in zip(number.tolist(), x, strict=True):
        head, label = heads[k // 10], tasks[k // 10][1][k % 10]
        read = now if scenario == "class" else head
        logits = model.net(one[None])[:, read.start : read.stop]
        total += F.cross_entropy(logits, (label + head.start - read.start)[None])
    torch.testing.assert_close(regularizer.penalty(), 3 * total / 50, **TIGHT)


def test_by_default_each_task_weighs_the_same():
    _, regularizer = after([range(4)] * 3, [task(t) for t in range(3)], strength=1.0)
    regularizer.before_step()
    mean, t = regularizer.penalty().item(), 4
    regularizer.strength = None
    assert regularizer.penalty().item() / t == pytest.approx((1 - 1 / t) * mean, rel=1e-12)


@pytest.mark.parametrize(("capacity", "kept"), [(1, 3), (4, 12), (7, 20), (100, 20), (None, 20)])
def test_the_capacity_is_of_each_class_of_each_task(capacity, kept):
    data = numbered(20, 0, classes=3)
    _, regularizer = after([range(3)] * 2, [data, data], capacity=capacity)
    assert regularizer.n_stored == 2 * kept
    y = regularizer.state_dict()["y.0"]
    sizes = [7, 7, 6]
    expected = sizes if capacity is None else [min(capacity, size) for size in sizes]
    assert y.bincount().tolist() == expected


def test_inputs_keep_their_labels():
    data = numbered(20, 0)
    _, regularizer = after([range(2, 4)], [data], capacity=6)
    number, _, y, _ = drawn(regularizer)
    assert torch.equal(y, data[1][number] + 2)


def test_what_is_kept_and_drawn_depends_on_the_generator_alone():
    def draws(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            _, regularizer = after(
                [range(2)], [numbered(50, 0)], capacity=10, generator=seeded(seed)
            )
            return [drawn(regularizer)[0] for _ in range(3)]

    assert same(draws(0, 0), draws(0, 1))
    assert not same(draws(0, 0), draws(1, 0))


def test_every_observation_has_the_same_chance():
    tasks = [numbered(5, 0), numbered(15, 5)]
    _, regularizer = after([range(2)] * 2, tasks, batch_size=20_000)
    frequencies = drawn(regularizer)[0].bincount(minlength=20) / 20_000
    torch.testing.assert_close(frequencies, torch.full((20,), 1 / 20), rtol=0.2, atol=0)


def test_without_a_capacity_tensors_are_kept_not_copied():
    x, y = numbered(20, 0)
    _, regularizer = after([range(2)], [(x, y)])
    state = regularizer.state_dict()
    assert state["x.0"].data_ptr() == x.data_ptr()
    assert state["y.0"].data_ptr() == y.data_ptr()


def test_tasks_that_share_their_memory_can_be_stored_by_safetensors():
    x, y = numbered(20, 0)
    _, regularizer = after([range(2)] * 2, [(x, y), (x, y)])
    state = load(save(regularizer.state_dict()))
    assert torch.equal(state["x.1"], x)


def test_a_restored_method_draws_what_the_first_one_would_have_drawn():
    model, regularizer = after([range(2)] * 2, [task(0), task(1)], capacity=5, generator=seeded(4))
    for _ in range(3):
        regularizer.before_step()
    restored = Replay(copy.deepcopy(model), capacity=5, generator=seeded(0))
    restored.load_state_dict(load(save(regularizer.state_dict())))
    for r in (regularizer, restored):
        r.consolidate(task(2))
    assert same(regularizer.state_dict(), restored.state_dict())
    assert same(drawn(regularizer), drawn(restored))


def test_joint_training_does_not_forget():
    """The last input tells the tasks apart; the first has opposite meanings in them."""

    def opposite(t):
        x, _ = task(t, 60)
        x[:, 2] = 2 - 4 * t
        return x, ((x[:, 0] > 0) ^ bool(t)).long()

    def loss_of_the_first_task(make):
        model = network(n_outputs=2)
        regularizer = make(model)
        for t in range(2):
            learn(model, sgd(model, 0.3), regularizer, opposite(t), steps=200)
        x, y = opposite(0)
        return F.cross_entropy(model(x), y).item()

    joint, plain = (loss_of_the_first_task(make) for make in (Replay, lambda model: None))
    assert joint < 0.5 * plain


def test_the_parameters_alone_are_trained():
    model, regularizer = after([range(2)], [task()])
    before = copies(model)
    regularizer.before_step()
    regularizer.add_gradient_()
    assert same(copies(model), before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(4, 3), torch.tensor([0, 1, 2, 5])), r"the labels \[2, 5\] are not those"),
        ((torch.zeros(4, 3), torch.tensor([0, 1, 0, -1])), r"the labels \[-1\]"),
        ((torch.zeros(4, 3), torch.zeros(4)), "labels must be integers"),
        ((torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long)), "categorical output must be"),
        ((torch.zeros(4, 3), torch.zeros(3, dtype=torch.long)), "different lengths"),
        ((torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), "empty"),
        ((torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4).long()), "must be a pair"),
    ],
)
def test_data_that_cannot_be_replayed_are_refused_and_change_nothing(data, message):
    model = network(dtype=torch.float32)
    model.outputs = range(2)
    regularizer = Replay(model)
    with pytest.raises(ValueError, match=message):
        regularizer.consolidate(data)
    assert (regularizer.n_tasks, regularizer.n_stored) == (0, 0)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"batch_size": 0}])
def test_numbers_that_are_not_positive_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        Replay(network(), **options)
