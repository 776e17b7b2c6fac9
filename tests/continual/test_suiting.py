"""What does not suit each other is refused before anything is trained."""

import copy

import pytest
import torch
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import learn, train
from ewc_lib.regularizers import MAS, KroneckerLaplace, LwF, Replay

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 2
REAL = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize("run", [run_train, run_learn])
@pytest.mark.parametrize("method", [EWC, KroneckerLaplace, LwF, Replay])
@pytest.mark.parametrize(
    ("criterion", "target", "said"),
    [
        (nn.MSELoss(), REAL, "that of Gaussian"),
        (nn.BCEWithLogitsLoss(), (REAL > 0).float(), "that of Bernoulli"),
        (nn.L1Loss(), REAL, "of no known likelihood"),
    ],
    ids=["gaussian", "bernoulli", "none"],
)
def test_a_criterion_that_the_regularizer_does_not_know_of_is_refused(
    run, method, criterion, target, said
):
    model, message = linear(), f"the criterion is {said}.* to {method.__name__}, too"
    assert_refused(run, model, method(model, 1.0), target, message, criterion=criterion)


def test_classes_on_the_second_axis_have_to_be_said_to_the_regularizer():
    model = nn.Sequential(linear(), nn.Unflatten(1, (2, 1, 1)), nn.Upsample(scale_factor=3))
    labels, criterion = CLASSES[:, None, None].expand(12, 3, 3), nn.CrossEntropyLoss()
    message = "that of Categorical.*class_dim=1"
    assert_refused(run_learn, model, EWC(model, 1.0), labels, message, criterion=criterion)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: EWC(model, 1.0, criterion=nn.MSELoss()),
        lambda model: EWC(model, 1.0, likelihood="gaussian"),
        lambda model: MAS(model, 1.0),
        lambda model: None,
    ],
    ids=["criterion", "likelihood", "no need", "none"],
)
def test_a_criterion_that_the_regularizer_knows_of_or_does_not_need_is_learned(make):
    model = linear()
    learned = run_learn(model, make(model), REAL, criterion=nn.MSELoss())
    assert learned.names == ["only"]
    assert not torch.equal(model.weight, linear().weight)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0])}]
)
def test_classes_are_learned_by_whatever_criterion(options):
    model = linear()
    ewc = EWC(model, 1.0)
    run_learn(model, ewc, CLASSES, criterion=nn.CrossEntropyLoss(**options))
    assert ewc.n_tasks == 1


def test_a_fisher_information_from_elsewhere_goes_with_every_criterion():
    model = linear()
    ewc = EWC(model, 1.0)
    ewc.remember(fisher_information(model, (X, REAL), "gaussian"))
    assert len(run_train(model, ewc, REAL, criterion=nn.MSELoss())) == 2


def test_the_look_at_the_first_batch_leaves_training_as_it_is():
    def losses(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
        ewc = EWC(model, 1.0, **options)
        return run_train(model, ewc, CLASSES, criterion=nn.CrossEntropyLoss())

    assert losses() == losses(likelihood="categorical")
