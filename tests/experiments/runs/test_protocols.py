"""What experiments on streams of tasks have in common."""

import pytest
import torch

from ewc_lib import data
from ewc_lib.continual import Learned, MultiHead, mlp, split
from ewc_lib.experiments import __main__ as command
from ewc_lib.experiments.runs import protocols
from ewc_lib.experiments.runs.protocols import METHODS, average_over, measure, outcome, play
from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST
from tests.experiments.cases import run


@pytest.mark.parametrize("name", command.STREAMS)
def test_the_demonstration_and_the_protocol_differ_in_size_only(name):
    experiment = command.experiment(name)
    first, digits = next(iter(experiment.protocols.values())), experiment.protocols["digits"]
    assert first.keys() == digits.keys()
    assert experiment.file("digits").endswith("_digits.json")
    assert experiment.file(next(iter(experiment.protocols))) == f"{name.replace('-', '_')}.json"


def test_a_measurement_is_resumed_with_more_seeds(tmp_path):
    first = run(PERMUTED_MNIST, tmp_path)
    second = run(PERMUTED_MNIST, tmp_path, seeds=2)
    assert second["runs"][: len(first["runs"])] == first["runs"]
    assert len(second["runs"]) == 2 * len(first["runs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "large"}, "unknown preset 'large' of permuted-mnist; there are small, three"),
        ({"preset": "zenke"}, "needs MNIST: give --data or set EWC_DATA"),
    ],
)
def test_presets_that_cannot_be_run_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure(PERMUTED_MNIST, out=tmp_path, **options)


@pytest.fixture
def asked(monkeypatch):
    """Return what the runs are asked for; a copy holds the data set by which it is called."""
    found = []
    monkeypatch.setattr(protocols, "run_all", lambda *a, **o: found.append(o) or {"runs": []})
    monkeypatch.setattr(data, "local_copy", lambda root: data.digits()._replace(name=root))
    return found


def test_a_local_copy_is_taken_if_it_is_there(asked, tmp_path, monkeypatch):
    measure(PERMUTED_MNIST, root="fashion-mnist", out=tmp_path)
    monkeypatch.setenv("EWC_DATA", "mnist")
    measure(PERMUTED_MNIST, out=tmp_path)
    measure(PERMUTED_MNIST, preset="digits", out=tmp_path)
    assert [o["data"] for o in asked] == ["fashion-mnist", "mnist", "digits"]
    assert [o["protocol"]["preset"] for o in asked] == ["small", "small", "digits"]


def test_a_copy_of_another_data_set_is_refused(asked, tmp_path):
    with pytest.raises(ValueError, match="permuted-mnist needs MNIST, and cifar10 holds cifar10"):
        measure(PERMUTED_MNIST, root="cifar10", out=tmp_path)
    assert not asked


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_made_and_used(method):
    digits = data.digits()
    model = MultiHead(mlp((64, 8, 10), 0))
    found = METHODS[method](model, 1.0, 0)
    assert (found is None) == (method == "none")
    if found is not None:
        found.before_task()
        torch.nn.functional.cross_entropy(model(digits.x_train[:9]), digits.y_train[:9]).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found.before_step(digits.x_train[:9])
        optimizer.step()
        found.after_step()
        found.consolidate((digits.x_train[:9], digits.y_train[:9]))
        for p in model.parameters():
            p.data += 0.1
        found.before_step(digits.x_train[:9])
        assert found.penalty() > 0


def test_outcomes_are_read_off_the_matrix():
    R = torch.tensor([[1.0, 0.2], [0.5, 0.9]], dtype=torch.float64)
    found = outcome(Learned(R, R[0], [1.0, 2.0], [0.25, 0.25]))
    assert found == {
        "accuracy": 0.7,
        "final": [0.5, 0.9],
        "average": [1.0, 0.7],
        "learning": 0.95,
        "forgetting": 0.5,
        "transfer": -0.5,
        "seconds_training": 3.0,
        "seconds_consolidation": 0.5,
    }


def test_only_the_wanted_runs_are_done_and_the_others_later(tmp_path):
    some = run(PERMUTED_MNIST, tmp_path, only={"method": ["EWC", "SI"], "strength": ["0.2"]})
    assert [(r["method"], r["strength"]) for r in some["runs"]] == [("SI", 0.2)]
    assert len(run(PERMUTED_MNIST, tmp_path)["runs"]) == 6


def test_settings_that_no_run_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run of permuted-mnist has method as wanted"):
        run(PERMUTED_MNIST, tmp_path, only={"method": ["ewc"]})


def test_validation_images_are_judged_after_the_last_task():
    rest, held = data.hold_out(data.digits(), 0.2)
    stream, valid = (split(images, scenario="class", seed=1) for images in (rest, held))
    settings = {"hidden": [8], "rate": 1e-2, "steps": 20, "batch": 32}
    models = []

    def remember(model):
        models.append(model)

    found = play(stream, settings, "cpu", remember, seed=0, valid=valid, watch=[1, 5])
    x, y = (torch.cat(parts) for parts in zip(*(task.test for task in valid), strict=True))
    sizes = [len(task.test[1]) for task in valid]
    right = (models[0](x).argmax(1) == y).float().split(sizes)
    assert found["valid"] == pytest.approx(sum(part.mean().item() for part in right) / len(sizes))
    assert found["worst"] <= min(found["final"][:-1])
    plain = play(stream, settings, "cpu", remember, seed=0)
    assert plain["accuracy"] == found["accuracy"]
    assert {*found} - {*plain} == {"valid", "worst"}


def test_validation_images_are_judged_as_the_test_images_are():
    stream = split(data.digits(), 5, scenario="task")
    model, seen = MultiHead(mlp((64, 8, 10), 0)), []

    def judge(model, test):
        seen.append((model.outputs, len(test[1])))
        return len(seen) / 10

    assert average_over(model, stream, judge) == pytest.approx(0.3)
    assert seen == [(range(2 * t, 2 * t + 2), len(stream.test(t)[1])) for t in range(5)]
