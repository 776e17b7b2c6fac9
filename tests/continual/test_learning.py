"""Whole streams: what is measured, what is kept, and going on after a stop."""

import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ewc_lib import EWC, data
from ewc_lib.continual import MultiHead, accuracy, learn, mlp, permuted, rotated, split, train
from ewc_lib.regularizers import SI, Replay
from tests.regularizers import cases

ROOT = Path(__file__).parents[2]
QUICK = {"steps": 20, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def network(stream, seed=0):
    return MultiHead(mlp((stream.n_features, 16, stream.n_outputs), seed))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def equal(a, b):
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_a_stream_is_its_tasks_trained_one_after_another(digits):
    stream = permuted(digits, 2, seed=0)
    model, other = network(stream), network(stream)
    learned = learn(stream, model, seed=3, **QUICK)
    optimizer = torch.optim.Adam(other.parameters(), fused=True)
    for t, task in enumerate(stream):
        seed = 3 * 1_000_003 + t
        train(other, task.train, optimizer=optimizer, seed=seed, **QUICK)
        assert learned.accuracies[t, t] == accuracy(other, task.test)
    assert torch.equal(weights(model), weights(other))
    assert len(learned.seconds_training) == len(learned.seconds_consolidation) == 2


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_accuracies_are_measured_for_the_tasks_so_far_and_the_next(digits, scenario):
    stream = split(digits, scenario=scenario)
    model = network(stream)
    start = network(stream)
    learned = learn(stream, model, **QUICK)
    known = [[j <= t + (scenario != "class") for j in range(5)] for t in range(5)]
    assert (~learned.accuracies.isnan()).tolist() == known
    assert learned.accuracies.dtype == torch.float64
    for j, task in enumerate(stream):
        model.outputs = stream.outputs(j, after=4)
        assert learned.accuracies[4, j] == accuracy(model, task.test)
        start.outputs = task.outputs
        if j == 0 or scenario != "class":
            assert learned.initial[j] == accuracy(start, task.test)
    assert learned.initial[1:].isnan().all() == (scenario == "class")


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_outputs_that_are_not_read_do_not_change(digits, scenario):
    stream = split(digits, scenario=scenario)
    model = network(stream)
    before = model.net[-1].bias.detach().clone()

    class Once(EWC):
        def consolidate(self, data, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(stream, model, Once(model, 1.0), **QUICK)
    changed = (model.net[-1].bias != before).tolist()
    assert changed == [True] * 2 + [False] * 8


class Spy:
    """A regularizer that notes what is asked of it."""

    strength = 1.0

    def __init__(self):
        self.calls = []
        self.data = []

    def before_task(self):
        self.calls.append("before_task")

    def before_step(self, inputs=None):
        self.calls.append("before_step")

    def add_gradient_(self):
        self.calls.append("add_gradient_")

    def proximal_step_(self, optimizer):
        assert isinstance(optimizer, torch.optim.Adam)
        self.calls.append("proximal_step_")

    def after_step(self):
        self.calls.append("after_step")

    def consolidate(self, data):
        self.data.append(data)
        self.calls.append("consolidate")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("proximal", [False, True])
def test_a_regularizer_is_called_in_order(digits, proximal):
    stream, spy = permuted(digits, 2, seed=0), Spy()
    learn(stream, network(stream), spy, steps=2, proximal=proximal, progress=False)
    step = ["before_step", "proximal_step_" if proximal else "add_gradient_", "after_step"]
    assert spy.calls == 2 * ["before_task", *step, *step, "consolidate"]


def test_a_regularizer_sees_a_random_part_of_the_data_if_wanted(digits):
    stream = permuted(digits, 2, seed=0)
    seen = []
    for n in (None, 7, 7, 10**6):
        spy = Spy()
        learn(stream, network(stream), spy, steps=0, n_samples=n, progress=False)
        seen.append(spy.data)
    assert torch.equal(seen[0][1][0], stream[1].train[0])
    assert len(seen[1][1][0]) == len(seen[1][1][1]) == 7
    assert torch.equal(seen[1][1][0], seen[2][1][0])
    assert not torch.equal(seen[1][1][0], stream[1].train[0][:7])
    assert torch.equal(seen[3][1][0], stream[1].train[0])


def test_epochs_are_passes_over_the_data(digits):
    stream, spy = permuted(digits, 1, seed=0), Spy()
    learn(stream, network(stream), spy, epochs=2, batch_size=100, progress=False)
    assert spy.calls.count("after_step") == 2 * 15  # 1,437 images


@pytest.mark.parametrize("options", [{}, {"steps": 1, "epochs": 1}])
def test_either_steps_or_epochs_are_given(digits, options):
    stream = permuted(digits, 1, seed=0)
    with pytest.raises(ValueError, match="either steps or epochs"):
        learn(stream, network(stream), **options)


def test_the_optimizer_is_kept_or_reset(digits):
    stream, made = permuted(digits, 3, seed=0), []

    def factory(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        return made[-1]

    found = [network(stream) for _ in range(2)]
    learn(stream, found[0], optimizer=factory, **QUICK)
    assert len(made) == 1
    learn(stream, found[1], optimizer=factory, reset_optimizer=True, **QUICK)
    assert len(made) == 4
    assert not torch.equal(*map(weights, found))


def test_an_optimizer_or_a_scheduler_that_is_no_function_is_refused(digits):
    stream = permuted(digits, 1, seed=0)
    model = network(stream)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for made in (
        {"optimizer": optimizer},
        {"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)},
    ):
        with pytest.raises(TypeError, match=r"give functions, such as functools\.partial"):
            learn(stream, model, **QUICK | made)


def test_dropout_is_repeated_by_the_seed_and_the_global_state_is_left_alone(digits):
    stream = permuted(digits, 1, seed=0)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = torch.random.get_rng_state()
        model = MultiHead(nn.Sequential(mlp((64, 10), 0), nn.Dropout(0.5)))
        learn(stream, model, seed=seed, **QUICK)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_two_training_sets_are_in_memory_at_once(digits):
    stream, made, alive = permuted(digits, 4, seed=0), [], []

    def change(t, x, y):
        new = stream.change(t, x, y)
        if len(x) == len(digits.x_train):
            alive.append(sum(old() is not None for old in made))
            made.append(weakref.ref(new[0]))
        return new

    watched, model = replace(stream, change=change), network(stream)
    learn(watched, model, EWC(model, 1.0), **QUICK)
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("n", [0, -5])
def test_a_number_of_samples_that_is_not_positive_is_refused(digits, n):
    stream = permuted(digits, 1, seed=0)
    with pytest.raises(ValueError, match=f"n_samples must be positive, or None for all, got {n}"):
        learn(stream, network(stream), n_samples=n, **QUICK)


def test_a_model_that_cannot_read_some_of_its_outputs_is_refused(digits):
    stream = split(digits, scenario="task")
    with pytest.raises(TypeError, match="must be a MultiHead, got Sequential"):
        learn(stream, mlp((64, 10), 0), **QUICK)


def test_a_network_with_too_few_outputs_is_refused_before_training(digits):
    stream, model = split(digits, scenario="class"), MultiHead(mlp((64, 4), 0))
    before = weights(model)
    with pytest.raises(ValueError, match="needs 10 outputs, the network has 4"):
        learn(stream, model, **QUICK)
    assert torch.equal(weights(model), before)


def test_outputs_are_those_of_the_last_task_at_the_end(digits):
    for scenario, outputs in (("task", range(8, 10)), ("domain", range(2)), ("class", range(10))):
        stream = split(digits, scenario=scenario)
        model = network(stream)
        learn(stream, model, **QUICK)
        assert model.outputs == outputs


# Checkpoints

METHODS = {
    "none": lambda model: None,
    "EWC": lambda model: EWC(model, 30.0),
    "SI": lambda model: SI(model, 1.0),
    "replay": lambda model: Replay(model, capacity=3),
}


class Interrupted(EWC):
    """EWC that is interrupted at the end of the second task."""

    def consolidate(self, data, **options):
        if self.n_tasks == 1:
            raise KeyboardInterrupt
        return super().consolidate(data, **options)


def test_an_interruption_loses_no_finished_task(digits, tmp_path):
    stream, path = permuted(digits, 3, seed=0), tmp_path / "run.pt"
    whole, first, second = (network(stream) for _ in range(3))
    expected = learn(stream, whole, EWC(whole, 30.0), settings={"a": (1, 2)}, **QUICK)
    options = {"checkpoint": path, "settings": {"a": [1, 2]}, **QUICK}
    Interrupted.__name__ = "EWC"
    with pytest.raises(KeyboardInterrupt):
        learn(stream, first, Interrupted(first, 30.0), **options)
    found = learn(stream, second, EWC(second, 30.0), **options)
    assert torch.equal(weights(second), weights(whole))
    assert equal(found.accuracies, expected.accuracies)
    assert equal(found.initial, expected.initial)
    assert len(found.seconds_training) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_is_not_done_again(digits, tmp_path):
    stream, path = permuted(digits, 2, seed=0), tmp_path / "run.pt"
    first, second = network(stream), network(stream)
    expected = learn(stream, first, checkpoint=path, **QUICK)
    spy = Spy()
    with pytest.raises(ValueError, match=r"regularizer\.type was None and is .Spy."):
        learn(stream, second, spy, checkpoint=path, **QUICK)
    found = learn(stream, second, checkpoint=path, **QUICK)
    assert torch.equal(weights(first), weights(second))
    assert found.seconds_training == expected.seconds_training


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, -1])
def test_a_truncated_checkpoint_is_refused_by_name(digits, tmp_path, keep):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    learn(stream, network(stream), checkpoint=path, **QUICK)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep < 0 else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"run\.pt is damaged"):
        learn(stream, network(stream), checkpoint=path, **QUICK)


def test_a_checkpoint_with_one_wrong_bit_in_its_weights_is_refused(digits, tmp_path):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    model = network(stream)
    learn(stream, model, checkpoint=path, **QUICK)
    content = bytearray(path.read_bytes())
    place = content.find(model.net[0].weight.detach().numpy().tobytes())
    assert place > 0
    content[place + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is damaged"):
        learn(stream, network(stream), checkpoint=path, **QUICK)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"configuration": 3}, {"weights": torch.zeros(3)}]
)
def test_another_file_is_no_checkpoint(digits, tmp_path, content):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="no checkpoint of a stream"):
        learn(stream, network(stream), checkpoint=path, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 21}, r"training\.(steps|seed|proximal) was"),
        ({"seed": 1}, r"training\.(steps|seed|proximal) was"),
        ({"proximal": True}, r"training\.(steps|seed|proximal) was"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.1)}, r"optimizer\.lr was"),
        ({"settings": {"data": "mnist"}}, "settings\\.data was absent"),
    ],
)
def test_a_checkpoint_of_another_configuration_names_what_differs(
    digits, tmp_path, options, message
):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    learn(stream, network(stream), checkpoint=path, **QUICK)
    with pytest.raises(ValueError, match=f"checkpoint of another configuration: {message}"):
        learn(stream, network(stream), checkpoint=path, **QUICK | options)


def test_a_checkpoint_of_another_stream_or_network_is_refused(digits, tmp_path):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    learn(stream, network(stream), checkpoint=path, **QUICK)
    longer = permuted(digits, 2, seed=0)
    with pytest.raises(ValueError, match="configuration: stream\\.tasks was"):
        learn(longer, network(longer), checkpoint=path, **QUICK)
    wider = MultiHead(mlp((64, 17, 10), 0))
    with pytest.raises(ValueError, match="configuration: parameters\\.net\\.0\\.weight was"):
        learn(stream, wider, checkpoint=path, **QUICK)


OTHER_STREAMS = {
    "seed was 0 and is 1": lambda d: (permuted(d, 2, seed=0), permuted(d, 2, seed=1)),
    "angles was": lambda d: (rotated(d, [0, 30]), rotated(d, [0, 30.0000001])),
    "seed was None and is 1": lambda d: (
        split(d, scenario="task"),
        split(d, scenario="task", seed=1),
    ),
    "scenario was 'task' and is 'class'": lambda d: (
        split(d, scenario="task"),
        split(d, scenario="class"),
    ),
    "data was": lambda d: (
        permuted(d, 2, seed=0),
        permuted(d._replace(x_train=d.x_train.flip(0)), 2, seed=0),
    ),
}


@pytest.mark.parametrize("message", OTHER_STREAMS)
def test_a_checkpoint_of_a_stream_of_the_same_size_is_refused(digits, tmp_path, message):
    path, (one, other) = tmp_path / "run.pt", OTHER_STREAMS[message](digits)
    learn(one, network(one), checkpoint=path, **QUICK)
    with pytest.raises(ValueError, match=rf"stream\.{message}"):
        learn(other, network(other), checkpoint=path, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 2.0}, "strength was 1.0 and is 2.0"),
        ({"mode": "online"}, "mode was 'separate' and is 'online'"),
        ({"kind": "empirical"}, "kind was 'exact' and is 'empirical'"),
    ],
)
def test_a_checkpoint_of_another_regularizer_is_refused(digits, tmp_path, options, message):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    one, other = network(stream), network(stream)
    learn(stream, one, EWC(one, 1.0), checkpoint=path, **QUICK)
    with pytest.raises(ValueError, match=rf"regularizer\.{message}"):
        learn(stream, other, EWC(other, **{"strength": 1.0} | options), checkpoint=path, **QUICK)


def test_all_that_differs_is_named(digits, tmp_path):
    stream, path = permuted(digits, 1, seed=0), tmp_path / "run.pt"
    learn(stream, network(stream), checkpoint=path, **QUICK)
    both = r"training\.steps was 20 and is 21; training\.seed was 0 and is 5$"
    with pytest.raises(ValueError, match=both):
        learn(stream, network(stream), checkpoint=path, **QUICK | {"steps": 21, "seed": 5})


def test_a_finished_run_is_not_even_tested_again(digits, tmp_path):
    stream, path = split(digits, scenario="class"), tmp_path / "run.pt"
    learn(stream, network(stream), checkpoint=path, **QUICK)
    tested = []

    class Watched(MultiHead):
        def forward(self, x):
            tested.append(len(x))
            return super().forward(x)

    model = Watched(network(stream).net)
    learn(stream, model, checkpoint=path, **QUICK)
    assert not tested
    assert model.outputs == range(10)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("name", cases.METHODS)
def test_every_method_goes_on_with_the_same_bits(digits, tmp_path, name, scenario):
    stream = split(digits, scenario=scenario)
    options = {"steps": 3, "batch_size": 32, "n_samples": 20, "progress": False}
    options["checkpoint"] = tmp_path / "run.pt"
    make = partial(cases.METHODS[name], strength=1.0)
    whole = network(stream)
    regularizer = make(whole)
    expected = learn(stream, whole, regularizer, **options | {"checkpoint": None})
    first = network(stream)
    stopped = make(first)
    consolidate, done = stopped.consolidate, []

    def interrupted(data):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(consolidate(data))

    stopped.consolidate = interrupted
    with pytest.raises(KeyboardInterrupt):
        learn(stream, first, stopped, **options)
    second = network(stream, seed=9)
    found = learn(stream, second, make(second), **options)
    assert torch.equal(weights(second), weights(whole))
    assert equal(found.accuracies, expected.accuracies)
    assert equal(found.initial, expected.initial)


SCRIPT = """
import os
import signal
import sys
from ewc_lib import data
from ewc_lib.continual import learn, permuted
from tests.continual.test_learning import METHODS, QUICK, network

training = []

def stop_in_the_second_task(model, inputs, output):
    training.append(model.training)
    if sum(training) == QUICK["steps"] + 2:
        os.kill(os.getpid(), signal.SIGKILL)

stream = permuted(data.digits(), 3, seed=0)
model = network(stream)
model.register_forward_hook(stop_in_the_second_task)
learn(stream, model, METHODS[sys.argv[1]](model), checkpoint="run.pt", **QUICK)
"""


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name == "EWC" else pytest.mark.slow) for name in METHODS],
)
def test_a_killed_process_goes_on_in_another_with_the_same_bits(digits, tmp_path, method):
    stream, path = permuted(digits, 3, seed=0), tmp_path / "run.pt"
    whole = network(stream)
    expected = learn(stream, whole, METHODS[method](whole), **QUICK)
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, method],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(torch.load(path, weights_only=True)["found"]["seconds_training"]) == 1
    model = network(stream)
    found = learn(stream, model, METHODS[method](model), checkpoint=path, **QUICK)
    assert torch.equal(weights(model), weights(whole))
    assert equal(found.accuracies, expected.accuracies)


def test_what_is_watched_is_the_lowest_accuracy_on_earlier_tasks_while_a_task_is_learned(digits):
    stream = permuted(digits, 3, seed=0)
    model, seen = network(stream), []

    def note(model, test):
        seen.append(accuracy(model, test))
        return seen[-1]

    learned = learn(
        stream, model, steps=6, batch_size=32, progress=False, watch=[2, 4], evaluate=note
    )
    # three before training; two around the first switch, and two while the second is learned ...
    first, of_first, of_second = seen[5:7], seen[10:14:2], seen[11:14:2]
    assert learned.lowest[1, 0] == min(first)
    assert learned.lowest[2, :2].tolist() == [min(of_first), min(of_second)]
    assert learned.lowest.isnan().sum() == 6


def test_watching_changes_nothing_else(digits):
    stream = split(digits, scenario="class")
    watched, plain = network(stream), network(stream)
    one = learn(stream, watched, SI(watched, 1.0), watch=range(1, 20), **QUICK)
    other = learn(stream, plain, SI(plain, 1.0), **QUICK)
    assert torch.equal(weights(watched), weights(plain))
    assert equal(one.accuracies, other.accuracies)
    assert other.lowest.isnan().all()
    assert other.lowest.shape == other.accuracies.shape


def test_what_was_watched_is_in_the_checkpoint(digits, tmp_path):
    stream, path = permuted(digits, 2, seed=0), tmp_path / "stream.pt"
    whole = learn(stream, network(stream), watch=[1, 5], checkpoint=path, **QUICK)
    again = learn(stream, network(stream), watch=[1, 5], checkpoint=path, **QUICK)
    assert equal(whole.lowest, again.lowest)
    assert not again.lowest[1, 0].isnan()
    with pytest.raises(ValueError, match="watch"):
        learn(stream, network(stream), watch=[1], checkpoint=path, **QUICK)


def test_what_is_watched_is_counted_in_updates_from_one(digits):
    stream = permuted(digits, 2, seed=0)
    for watch in (torch.tensor([1, 5]), [1, 5]):
        found = learn(stream, network(stream), watch=watch, **QUICK)
        assert not found.lowest[1, 0].isnan()
    with pytest.raises(ValueError, match="counts updates from 1, got -3"):
        learn(stream, network(stream), watch=[-3, 5], **QUICK)
    with pytest.raises(TypeError, match="float"):
        learn(stream, network(stream), watch=[1.5], **QUICK)
