from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost import peers
from ewc_lib.experiments.cost.benchmarks import Benchmark, _sequences, _text, _vectors
from ewc_lib.experiments.cost.models import GPT2, Transformer
from ewc_lib.experiments.cost.peers import CONTESTANTS, PEERS, answer, error, plain_pass

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


@pytest.mark.parametrize("exact", [True, False])
def test_the_loop_is_right_for_softmax_regression(exact):
    model = nn.Linear(3, 4)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(9) % 4
    p = model(x).softmax(-1).detach()
    weight = p * (1 - p) if exact else (F.one_hot(y, 4) - p).square()
    found = PEERS["loop"]["exact" if exact else "empirical"](
        model, [(x[:5], y[:5]), (x[5:], y[5:])]
    )
    torch.testing.assert_close(found["bias"], weight.mean(0))
    torch.testing.assert_close(found["weight"], weight.T @ x.square() / 9)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("library", WITHOUT_LIBRARY)
def test_answers_are_right(library, name):
    for kind in {"empirical", "exact"} & set(CONTESTANTS[library]):
        if kind == "empirical" or TINY[name].exact:
            assert error(CONTESTANTS[library][kind], kind, TINY[name]) < 1e-12


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_chunks_do_not_change_the_answer(kind, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK_BYTES", {"cpu": 1})
    assert error(PEERS["torch.func"][kind], kind, TINY["mlp"]) < 1e-12


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


def test_a_plain_pass_computes_the_gradient_of_the_mean_loss():
    model, batches = TINY["gpt2"].model(), TINY["gpt2"].batches(4)
    plain_pass(model, batches)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ((x, y),) = batches
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_a_loader_yields_the_same_batches_and_its_own_tensors():
    batches = TINY["mlp"].batches(10)
    loaded = list(peers._loader(batches))
    assert [len(y) for _, y in loaded] == [7, 3]
    for (x, y), (x_loaded, y_loaded) in zip(batches, loaded, strict=True):
        assert torch.equal(x, x_loaded)
        assert torch.equal(y, y_loaded)
        assert x.data_ptr() != x_loaded.data_ptr()


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


def test_the_classes_are_moved_to_the_second_axis():
    model, batches = TINY["gpt2"].model(), TINY["gpt2"].batches(4)
    ((x, y),) = batches
    moved = F.cross_entropy(peers.ClassesSecond(model)(x), y, reduction="sum")
    torch.testing.assert_close(moved, peers.cross_entropy(model(x), y))
    assert y.is_contiguous()


@pytest.mark.parametrize("columns", [1, 10])
def test_chunks_are_larger_on_a_card(columns):
    class There(nn.Module):
        def parameters(self):
            return iter([torch.empty(2**20, device="meta")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.CHUNK_BYTES, "meta", peers.CHUNK_BYTES["cuda"])
        there = peers._chunk(There(), columns)
    assert there == peers.CHUNK_BYTES["cuda"] // (columns * 2**22)
    assert there > peers._chunk(There(), columns) == peers.CHUNK_BYTES["cpu"] // (columns * 2**22)
