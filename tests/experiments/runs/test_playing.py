import math

import pytest
import torch

from ewc_lib import data
from ewc_lib.continual import Learned, MultiHead, mlp, split
from ewc_lib.experiments.runs._playing import METHODS, average_over, outcome, play


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


def test_a_run_that_diverges_before_its_last_task_is_an_outcome():
    stream = split(data.digits(), scenario="domain", seed=0)
    settings = {"hidden": [8], "rate": 0.1, "steps": 30, "batch": 32}
    found = play(
        stream,
        settings,
        "cpu",
        lambda model: METHODS["EWC"](model, 1e9, 0),
        seed=0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    assert found["diverged"]
    assert math.isnan(found["accuracy"])


def test_another_fault_of_a_run_is_not_taken_for_divergence():
    stream = split(data.digits(), scenario="domain", seed=0)
    settings = {"hidden": [8], "rate": 0.1, "steps": -1, "batch": 32}
    with pytest.raises(ValueError, match="steps"):
        play(stream, settings, "cpu", lambda model: None, seed=0)
