"""What does not suit each other is refused before anything is trained."""

import copy

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib.continual import learn, train
from ewc_lib.regularizers import LwF

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 2


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def run_train(model, regularizer, y, **options):
    return train(model, (X, y), steps=2, regularizer=regularizer, **options)


def run_learn(model, regularizer, y, **options):
    return learn([("only", (X, y), None)], model, regularizer, steps=2, **options)


def assert_refused(run, model, regularizer, y, message, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        run(model, regularizer, y, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("run", [run_train, run_learn])
@pytest.mark.parametrize("method", [EWC, LwF])
def test_a_regularizer_of_a_copy_of_the_model_is_refused(run, method):
    model = linear()
    regularizer = method(copy.deepcopy(model), 1.0)
    assert_refused(run, model, regularizer, CLASSES, "made for another model")


@pytest.mark.parametrize("run", [run_train, run_learn])
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, nn.Sequential, lambda model: torch.compile(model, backend="eager")]
)
@pytest.mark.parametrize("wrapped", ["trained", "held"])
def test_a_model_in_a_wrapper_is_the_same_model(run, wrap, wrapped):
    model = linear()
    trained, held = (wrap(model), model) if wrapped == "trained" else (model, wrap(model))
    before = model.weight.detach().clone()
    run(trained, EWC(held, 1.0), CLASSES)
    assert not torch.equal(model.weight, before)
