"""Arguments that cannot be meant, and what may be meant instead."""

from functools import partial
from inspect import isclass, isroutine, signature

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib import (
    EWC,
    Gaussian,
    ewc,
    fisher,
    fisher_information,
    likelihood,
    quadratic,
    regularizers,
    score,
)
from ewc_lib._arguments import WORDS, check_choice, check_place, check_whole, random_source
from ewc_lib.fisher.estimate import STRUCTURES
from ewc_lib.fisher.output import KINDS
from ewc_lib.likelihood.outputs import output_distribution
from ewc_lib.regularizers import L2, Replay

ALLOWED = {"kind": KINDS, "structure": STRUCTURES}
CPU = torch.device("cpu")


def refuse(what, value):
    if what == "likelihood":
        output_distribution(value)
    else:
        check_choice(what, value, ALLOWED[what])


MEANT = {
    "kind": {
        "mc": "sampled",  # curvlinops, laplace-torch
        "type-2": "exact",
        "ggn": "exact",
        "emp_fisher": "empirical",
        "MC": "sampled",
        "Exact": "exact",
        "sampeld": "sampled",
        "emprical": "empirical",
    },
    "structure": {
        "diag": "diagonal",
        "kron": "kronecker",
        "kfac": "kronecker",
        "KFAC": "kronecker",
        "KFAC-reduce": "kronecker-reduce",
        "kronecker_reduce": "kronecker-reduce",
        "ekfac": "eigenkronecker",
        "full": "dense",
        "low_rank": "lowrank",
        "PMatEKFAC": "eigenkronecker",  # nngeometry
        "PMatBlockDiag": "module",
        "layer-wise": "module",
        "diagnal": "diagonal",
    },
    "likelihood": {
        "classification": "categorical",
        "regression": "gaussian",
        "cross_entropy": "categorical",
        "MSELoss": "gaussian",
        "binary": "bernoulli",
        "categorial": "categorical",
        "Poisson": "poisson",
    },
}
CASES = [(what, given, meant) for what, words in MEANT.items() for given, meant in words.items()]


@pytest.mark.parametrize(("what", "given", "meant"), CASES)
def test_a_word_that_is_unknown_here_is_answered_by_the_one_that_is_meant(what, given, meant):
    with pytest.raises(
        ValueError, match=rf"^{what} must .* got '{given}'; did you mean '{meant}'\?$"
    ):
        refuse(what, given)


@pytest.mark.parametrize("what", WORDS)
def test_no_word_stands_for_two_things_and_each_thing_can_be_asked_for(what):
    words = [word for words in WORDS[what].values() for word in words.split()]
    assert len(set(words)) == len(words)
    for meant in WORDS[what]:
        if meant != "ewc_lib.fisher.MatrixFree":
            refuse_nothing = partial(refuse, what, meant)
            assert refuse_nothing() is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (nn.CrossEntropyLoss(), "categorical"),
        (nn.MSELoss, "gaussian"),
        (F.cross_entropy, "categorical"),
        (F.binary_cross_entropy_with_logits, "bernoulli"),
        (Gaussian, "gaussian"),
    ],
)
def test_a_loss_in_place_of_a_likelihood_is_answered_by_the_likelihood(given, meant):
    with pytest.raises(ValueError, match=rf"did you mean '{meant}'\?"):
        output_distribution(given)


def test_what_is_near_to_nothing_gets_no_answer():
    for what, value in [("kind", "zebra"), ("structure", None), ("likelihood", 3), ("kind", [])]:
        with pytest.raises(ValueError, match=f"{what} must be one of") as found:
            refuse(what, value)
        assert "did you mean" not in str(found.value)


def test_products_without_a_matrix_are_another_class():
    with pytest.raises(ValueError, match=r"did you mean ewc_lib\.fisher\.MatrixFree\?"):
        refuse("structure", "implicit")


def test_targets_in_place_of_a_likelihood_are_answered_by_the_form_of_data():
    x, y = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got a Tensor; data are one argument: \(inputs, targets"):
        fisher_information(nn.Linear(2, 2), x, y)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "n must be at least 1, got 0"),
        (-3, "n must be at least 1, got -3"),
        (0.5, "n must be a whole number, got 0.5"),
        (True, "n must be a whole number, got True"),
        ("10", "n must be a whole number, got '10'"),
        (torch.ones(2), "n must be a whole number, got a Tensor"),
    ],
)
def test_a_number_that_is_not_positive_and_whole_is_named(number, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_whole(n=number)


def test_whole_numbers_of_other_libraries_and_none_are_taken():
    check_whole(a=1, b=np.int64(7), c=None)


@pytest.mark.parametrize("method", [EWC, L2, Replay])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(torch.ones(3, 2), torch.zeros(3).long())], "a list; data go to consolidate"),
        (torch.ones(3), "a Tensor"),
        ("100", "'100'"),
        (1j, "a complex"),
    ],
)
def test_data_in_place_of_a_strength_are_sent_to_where_they_belong(method, given, message):
    with pytest.raises(ValueError, match=f"strength must be a number, got {message}"):
        method(nn.Linear(2, 2), given)


def test_a_strength_may_be_any_real_number():
    for strength in (2, np.float32(2), torch.tensor(2.0)):
        assert EWC(nn.Linear(2, 2), strength).strength == 2.0


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        ("float64", None, r"dtype must be a real torch\.dtype.* got 'float64'"),
        (torch.int64, None, r"got torch\.int64"),
        (torch.complex64, None, r"got torch\.complex64"),
        (float, None, "got the class float"),
        (None, "gpu", "device must be one of PyTorch, got 'gpu'"),
        (None, 1.5, "device must be one of PyTorch, got 1.5"),
    ],
)
def test_a_precision_or_a_device_that_is_none_is_named(dtype, device, message):
    with pytest.raises(ValueError, match=message):
        check_place(dtype, device)


def test_precisions_and_devices_are_taken():
    check_place(torch.float64, "cpu")
    check_place(torch.bfloat16, CPU)
    check_place(None, None)


def test_randomness_is_a_generator_or_a_fresh_one_with_seed_zero():
    own = torch.Generator().manual_seed(7)
    assert random_source(own, CPU) is own
    for _ in range(2):
        assert random_source(None, CPU).initial_seed() == 0


@pytest.mark.parametrize("given", [0, 1, "0", np.random.default_rng(0)])
def test_randomness_in_another_form_is_answered_by_the_one_form(given):
    with pytest.raises(ValueError, match=r"torch\.Generator\('cpu'\)\.manual_seed\(seed\)"):
        random_source(given, CPU)


def test_a_generator_on_another_device_than_the_draws_is_named():
    with pytest.raises(ValueError, match=r"on cpu, but draws on meta: torch\.Generator\('meta'\)"):
        random_source(torch.Generator(), torch.device("meta"))


PUBLIC = [ewc, fisher, likelihood, quadratic, regularizers, score]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_randomness_has_one_word_and_one_form_in_the_core(module):
    others = {"seed", "seeds", "rng", "random_state", "key"}
    for name in module.__all__:
        thing = getattr(module, name)
        methods = [m for m in vars(thing).values() if callable(m)] if isclass(thing) else []
        for function in filter(isroutine, [thing, *methods]):
            arguments = signature(function).parameters
            assert not others & arguments.keys(), name
            if "generator" in arguments:
                assert "torch.Generator" in str(arguments["generator"].annotation), name


def test_arguments_are_refused_before_the_data_are_read():
    class Unread:
        def __iter__(self):
            raise AssertionError

    for wrong in ({"rank": 0}, {"dtype": torch.int64}, {"device": "gpu"}, {"generator": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fisher_information(nn.Linear(2, 2), Unread(), **wrong)
