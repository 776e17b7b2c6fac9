from functools import partial

import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost.benchmarks import Benchmark, _sequences, _text, _vectors
from ewc_lib.experiments.cost.models import GPT2, Transformer
from ewc_lib.experiments.cost.peers import CONTESTANTS, PEERS, answer, error

TINY = {
    "mlp": Benchmark(
        "MLP", partial(mlp, (4, 5, 3), 0), partial(_vectors, shape=(4,), classes=3), batch_size=7
    ),
    "transformer": Benchmark(
        "Transformer",
        partial(Transformer, 6, 5, width=4, layers=1, heads=2, classes=3),
        partial(_sequences, length=5, vocabulary=6, classes=3),
    ),
    "gpt2": Benchmark(
        "GPT-2",
        partial(GPT2, 6, 5, width=4, layers=1, heads=2),
        partial(_text, length=5, vocabulary=6),
        exact=False,
    ),
}
WITHOUT_LIBRARY = ("ewc_lib", "torch.func", "loop")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("library", WITHOUT_LIBRARY)
def test_answers_are_right(library, name):
    for kind in {"empirical", "exact"} & set(CONTESTANTS[library]):
        if kind == "empirical" or TINY[name].exact:
            assert error(CONTESTANTS[library][kind], kind, TINY[name]) < 1e-12


def test_estimates_are_compared_with_the_exact_fisher_information():
    exact = CONTESTANTS["ewc_lib"]["exact"]
    assert error(exact, "sketch", TINY["mlp"]) < 1e-12
    assert error(exact, "empirical", TINY["mlp"]) > 0.01
    assert error(CONTESTANTS["ewc_lib"]["sketch"], "sketch", TINY["mlp"]) > 0.01


def test_without_a_truth_there_is_no_error():
    assert error(CONTESTANTS["ewc_lib"]["sketch"], "sketch", TINY["gpt2"]) is None


def test_a_missing_parameter_counts_as_zero():
    def forgetful(model, batches):
        found = CONTESTANTS["ewc_lib"]["exact"](model, batches)
        return {name: f for name, f in found.items() if name != "2.bias"}

    assert error(forgetful, "exact", TINY["mlp"]) == 1


def test_rounding_of_what_is_zero_by_symmetry_is_no_error():
    def noisy(model, batches):
        found = CONTESTANTS["ewc_lib"]["exact"](model, batches)
        (name,) = (name for name in found if name.endswith("key.bias"))
        return {**found, name: found[name] + 1e-30}

    assert error(noisy, "exact", TINY["transformer"]) < 1e-12


def test_an_answer_that_is_not_finite_is_refused():
    def broken(model, batches):
        return {name: p.detach() * torch.nan for name, p in model.named_parameters()}

    with pytest.raises(ValueError, match="not finite"):
        error(broken, "exact", TINY["mlp"])


def test_answers_are_computed_in_double_precision_and_the_default_stays():
    def check(model, batches):
        assert torch.get_default_dtype() == torch.float64
        assert [len(targets) for _, targets in batches] == [8, 8]
        assert {x.dtype for x, _ in batches} == {p.dtype for p in model.parameters()}
        assert torch.float64 in {p.dtype for p in model.parameters()}
        return {}

    assert answer(check, TINY["mlp"]) == {}
    assert torch.get_default_dtype() == torch.float32


READ_VALUES = ("BackPACK exact", "laplace exact", "laplace (BackPACK) exact")
"""Contestants that read a number of a tensor, and so cannot run where tensors have no values."""

EVERYONE = {
    f"{library} {kind}": contestant
    for library, kinds in PEERS.items()
    for kind, contestant in kinds.items()
}


def installed(contestant, *given):
    """Run a contestant, or skip the test if its library is not there."""
    try:
        return contestant(*given)
    except ImportError as missing:
        pytest.skip(f"a library is not installed (pip install 'ewc_lib[peers]'): {missing}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in EVERYONE if name not in READ_VALUES])
def test_every_contestant_takes_and_gives_tensors_where_the_model_is(name):
    """The device without values stands for an accelerator: nothing else may meet its tensors."""
    there = TINY["mlp"]._replace(device="meta")
    found = installed(EVERYONE[name], there.model(), there.batches(9))
    assert found.keys() == dict(there.model().named_parameters()).keys()
    assert {value.device.type for value in found.values()} == {"meta"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in EVERYONE if "nngeometry" not in name])
def test_no_contestant_makes_a_tensor_on_the_default_device(name):
    """What is made without a device is made where nothing has a value, and cannot be used here.

    The loader of data that nngeometry needs draws a number there, and so cannot be tried.
    """
    model, batches = TINY["mlp"].model(), TINY["mlp"].batches(9)
    with torch.device("meta"):
        found = installed(EVERYONE[name], model, batches)
    assert {value.device.type for value in found.values()} == {"cpu"}


@pytest.mark.filterwarnings("ignore")
def test_a_library_that_calls_the_loss_by_itself_gets_the_classes_where_the_loss_wants_them():
    empirical = PEERS["laplace"]["empirical"]
    assert installed(error, empirical, "empirical", TINY["gpt2"]) < 1e-12
    found = installed(answer, PEERS["curvlinops"]["sketch"], TINY["gpt2"])
    assert found.keys() == dict(TINY["gpt2"].model().named_parameters()).keys()
