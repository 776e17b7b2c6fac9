import math

import pytest
import torch

from ewc_lib import data, fisher_information
from ewc_lib.continual import accuracy, mlp, permute_pixels, train
from ewc_lib.data import hold_out
from ewc_lib.experiments.structures.beyond_diagonal import PROTOCOL
from ewc_lib.experiments.structures.displacements import divergence
from ewc_lib.experiments.structures.two_tasks import OUTCOMES, play
from ewc_lib.fisher import MatrixFree
from ewc_lib.regularizers import L2

SHORT = {
    **PROTOCOL,
    "hidden": [4],
    "steps": 3,
    "strengths": [1.0, 10.0],
    "rates": [1.0, 10.0],
    "shares": [0.5, 1.0],
}
OPTIONS = {"steps": 3, "batch_size": 64, "progress": False}


def played(method, form, optimizer="SGD", **changes):
    run = {"optimizer": optimizer, "form": form, "method": method, "seed": 1}
    return play({**SHORT, **changes}, run)


@pytest.fixture(scope="module")
def scene():
    """Both tasks, and the network after the first."""
    task_a, valid = hold_out(data.digits(dtype=torch.float64), 0.2, seed=1)
    model = mlp((64, 4, 10), seed=1).double()
    train(model, task_a.train, seed=1, **OPTIONS)
    return model, task_a, valid


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def measured(model, anchor, task_a, valid):
    """Return some outcomes of a network, by the functions of the package."""
    (task_b, valid_b), whole = (permute_pixels(x, 1001) for x in (task_a, valid)), None
    found = {
        "accuracy_a": accuracy(model, task_a.test),
        "accuracy_b": accuracy(model, task_b.test),
        "valid": (accuracy(model, valid.test) + accuracy(model, valid_b.test)) / 2,
        "distance": float((vector(model) - anchor).square().sum()),
    }
    moved, here = vector(model) - anchor, vector(model)
    step, start = {}, 0
    for name, p in model.named_parameters():
        step[name] = moved[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    torch.nn.utils.vector_to_parameters(anchor, model.parameters())
    whole = MatrixFree(model, task_a.train, progress=False)
    found["whole"] = float(whole.quadratic(step)) / 2
    found["diagonal"] = float(fisher_information(model, task_a.train).quadratic(step)) / 2
    found["divergence"] = float(divergence(model, task_a.x_train, step))
    found["razor"] = float(divergence(model, task_b.x_train, step))
    torch.nn.utils.vector_to_parameters(here, model.parameters())
    back = {name: -part for name, part in step.items()}
    found["reverse"] = float(divergence(model, task_b.x_train, back))
    return found


def test_plain_training_is_that_of_the_package_at_multiples_of_the_rate(scene):
    start, task_a, valid = scene
    found = played("plain", "none")
    model = mlp((64, 4, 10), seed=1).double()
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train(model, permute_pixels(task_a, 1001).train, seed=2, optimizer=optimizer, **OPTIONS)
    assert found["settings"] == [1.0, 10.0]
    for name, value in measured(model, vector(start), task_a, valid).items():
        assert math.isclose(found[name][1], value, rel_tol=1e-4, abs_tol=1e-12), name


def test_averaging_ends_with_plain_training_at_the_usual_rate():
    plain, averaged = played("plain", "none"), played("averaging", "none")
    assert averaged["settings"] == [0.5, 1.0]
    for name in OUTCOMES:
        assert math.isclose(averaged[name][1], plain[name][0], rel_tol=1e-4)
    assert math.isclose(averaged["distance"][0], averaged["distance"][1] / 4, rel_tol=1e-4)


def test_l2_has_the_trace_of_the_fisher_information(scene):
    start, task_a, valid = scene
    found = played("L2", "gradient")
    model = mlp((64, 4, 10), seed=1).double()
    model.load_state_dict(start.state_dict())
    trace = fisher_information(model, task_a.train).trace() / len(vector(model))
    held = L2(model, 10.0 * float(trace))
    held.consolidate(task_a.train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task_b = permute_pixels(task_a, 1001)
    train(model, task_b.train, seed=2, optimizer=optimizer, regularizer=held, **OPTIONS)
    for name, value in measured(model, vector(start), task_a, valid).items():
        assert math.isclose(found[name][1], value, rel_tol=1e-4, abs_tol=1e-12), name


def test_damping_closes_the_directions_that_the_whole_matrix_leaves_open():
    whole, damped = (played(method, "proximal") for method in ("dense", "damped"))
    assert all(d < w for d, w in zip(damped["distance"], whole["distance"], strict=True))


def test_much_damping_is_l2():
    strengths = {"strengths": [1e-3]}
    damped = played("damped", "proximal", damping=1e6, **strengths)
    l2 = played("L2", "proximal", strengths=[1e3])
    assert math.isclose(damped["distance"][0], l2["distance"][0], rel_tol=1e-3)


@pytest.mark.parametrize("method", ["diagonal", "kronecker", "dense", "predictions"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_penalty_keeps_what_it_measures_small(method, optimizer):
    held = {"predictions": "divergence", "dense": "whole"}.get(method, method)
    plain = played("plain", "none", optimizer, steps=20)
    kept = played(method, "gradient", optimizer, steps=20, strengths=[0.0, 1.0])
    assert kept[held][1] < kept[held][0]
    assert math.isclose(kept[held][0], plain[held][0], rel_tol=1e-4)


def test_before_task_b_nothing_is_lost(scene):
    start, task_a, _ = scene
    found = played("L2", "proximal", strengths=[1e12])
    assert found["before"][0] == float(f"{accuracy(start, task_a.test):.5g}")
    assert found["before"] == [found["accuracy_a"][0], found["loss_a"][0]]
    assert max(found[name][0] for name in ("divergence", "razor", "whole", "distance")) < 1e-12


def test_where_training_diverges_the_outcomes_are_no_numbers():
    found = played("dense", "gradient", steps=200, strengths=[0.1, 1e6])
    assert all(math.isfinite(found[name][0]) for name in OUTCOMES)
    assert all(math.isnan(found[name][1]) for name in OUTCOMES)
