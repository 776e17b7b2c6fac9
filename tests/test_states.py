"""What states say of themselves, and the wrappers and processes between which they travel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributions import Gamma
from torch.utils.checkpoint import checkpoint

from ewc_lib import EWC, Categorical, Gaussian
from ewc_lib.fisher.structures.states import decode
from ewc_lib.regularizers import SI, AdapterEWC, KroneckerLaplace, RWalk, add_adapters
from tests.scenarios import same


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def task(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 3


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5


def consolidated(model=None, **options):
    ewc = EWC(model or network(), 2.0, **options)
    ewc.consolidate(task())
    return ewc


def said(state):
    keys = "structure", "mode", "kind", "likelihood", "decay"
    return {key: decode(state[key]) for key in keys if key in state}


# What a state says of itself


def test_a_state_says_how_its_numbers_were_made():
    plain = {"structure": "diagonal", "mode": "separate", "kind": "exact"}
    assert said(EWC(network(), 1.0).state_dict()) == plain
    found = said(consolidated().state_dict())
    assert found == plain | {"likelihood": repr(Categorical())}
    online = EWC(network(), 1.0, "online", decay=0.5, likelihood=Gaussian(2.0), structure="dense")
    assert said(online.state_dict()) == {
        "structure": "dense",
        "mode": "online",
        "kind": "exact",
        "decay": "0.5",
        "likelihood": "Gaussian(sigma=2.0)",
    }


OTHERS = [
    ({"mode": "online"}, {}, "online, but this EWC is separate (mode)"),
    ({}, {"mode": "online"}, "separate, but this EWC is online (mode)"),
    ({"kind": "empirical"}, {}, "empirical, but this EWC is exact (kind)"),
    ({"structure": "dense"}, {}, "dense, but this EWC is diagonal (structure)"),
    (
        {"mode": "online", "decay": 0.5},
        {"mode": "online", "decay": 0.9},
        "0.5, but this EWC is 0.9 (decay)",
    ),
    (
        {},
        {"likelihood": "next-token"},
        f"{Categorical()}, but this EWC is {Categorical(next_token=True)} (likelihood)",
    ),
]


@pytest.mark.parametrize(("first", "second", "message"), OTHERS)
def test_a_state_of_other_settings_is_refused_by_both_and_nothing_changes(first, second, message):
    state = consolidated(**first).state_dict()
    other = EWC(network(), 2.0, **second)
    before = other.state_dict()
    with pytest.raises(ValueError, match="the state is") as error:
        other.load_state_dict(state)
    assert message in str(error.value)
    assert same(other.state_dict(), before)


def test_a_state_names_every_setting_that_differs():
    state = consolidated(mode="online", decay=0.5, kind="sketch").state_dict()
    with pytest.raises(ValueError, match=r"online, .* \(mode\); the state is sketch, .* \(kind\)"):
        EWC(network(), 1.0).load_state_dict(state)


@pytest.mark.parametrize("options", [{"mode": "online", "decay": 0.5}, {"kind": "sketch"}])
def test_a_state_that_does_not_say_its_settings_still_loads(options):
    ewc = consolidated(**options)
    state = {k: v for k, v in ewc.state_dict().items() if k not in said(ewc.state_dict())}
    del state["precision.likelihood"]
    again = EWC(ewc.model, 2.0, **options)
    again.load_state_dict(state)
    move(ewc.model)
    assert torch.equal(again.penalty(), ewc.penalty())


def test_a_likelihood_that_was_found_is_the_one_of_its_name():
    state = consolidated().state_dict()
    for likelihood in (None, "categorical", Categorical()):
        EWC(network(), 1.0, likelihood=likelihood).load_state_dict(state)


@pytest.mark.parametrize("method", [EWC, KroneckerLaplace])
def test_the_next_task_is_not_read_by_another_likelihood_than_that_of_a_state(method):
    data = task()
    first, second = method(network(), 1.0, likelihood="gaussian"), method(network(), 1.0)
    first.consolidate((data[0], data[0]))
    second.load_state_dict(first.state_dict())
    before = second.state_dict()
    with pytest.raises(ValueError, match=r"of the likelihood Gaussian.* read as Categorical"):
        second.consolidate(data)
    assert same(second.state_dict(), before)
    second.likelihood = Categorical()  # said, it is meant
    second.consolidate(data)
    assert second.n_tasks == 2


def test_a_likelihood_that_is_a_function_is_said_without_its_address():
    def gamma(f):
        return Gamma(f[:, 0].exp(), 1.0)

    text = said(EWC(network(), 1.0, likelihood=gamma).state_dict())["likelihood"]
    assert "gamma" in text
    assert "0x" not in text


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (KroneckerLaplace, EWC, "averaged factors, but this EWC is separate (mode)"),
        (SI, EWC, "path integral"),
        (SI, RWalk, "path integral"),
    ],
)
def test_a_state_of_another_method_is_refused(first, second, message):
    options = {"structure": "kronecker"} if first is KroneckerLaplace else {}
    with pytest.raises(ValueError, match="the state is") as error:
        second(network(), 1.0, **options).load_state_dict(first(network(), 1.0).state_dict())
    assert message in str(error.value)


def test_kronecker_laplace_refuses_another_kind():
    one, other = (KroneckerLaplace(network(), 1.0, kind=kind) for kind in ("exact", "sketch"))
    one.consolidate(task())
    with pytest.raises(ValueError, match=r"exact, but this KroneckerLaplace is sketch \(kind\)"):
        other.load_state_dict(one.state_dict())


def test_adapters_refuse_another_kind_or_likelihood():
    model = network()
    add_adapters(model, ["0", "2"], rank=1)
    one = AdapterEWC(model, 1.0)
    one.consolidate(task())
    state = one.state_dict()
    for options in ({"kind": "sketch"}, {"likelihood": "next-token"}):
        with pytest.raises(ValueError, match="but this AdapterEWC is"):
            AdapterEWC(model, 1.0, **options).load_state_dict(state)
    again = AdapterEWC(model, 1.0)
    again.load_state_dict({k: v for k, v in state.items() if k not in ("kind", "likelihood")})
    assert same(again.state_dict() | {"kind": 0}, state | {"kind": 0})


def test_a_decay_is_the_same_number_as_an_integer():
    model = network()
    add_adapters(model, ["0"], rank=1)
    for method in (EWC, AdapterEWC):
        one = method(model, 1.0, "online", decay=1)
        one.load_state_dict(one.state_dict())
        method(model, 1.0, "online", decay=1.0).load_state_dict(one.state_dict())


# Names


class Recomputed(nn.Module):
    """A wrapper that recomputes, by the attribute that wrappers of PyTorch use."""

    def __init__(self, model):
        super().__init__()
        self._checkpoint_wrapped_module = model

    def forward(self, x):
        return checkpoint(self._checkpoint_wrapped_module, x, use_reentrant=False)


def adapted(model):
    """Adapters beside every layer; the weights of the model stay trainable."""
    config = LoraConfig(r=1, target_modules=["0", "2"])
    wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        p.requires_grad_("lora" not in name)
    return wrapped


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "recomputed": Recomputed,
    "peft": adapted,
}
METHODS = {
    "EWC": EWC,
    "dense": lambda model, strength: EWC(model, strength, structure="dense"),
    "module": lambda model, strength: EWC(model, strength, structure="module"),
    "low rank": lambda model, strength: EWC(model, strength, structure="lowrank"),
    "Kronecker": KroneckerLaplace,
    "SI": SI,
}


def learned(method, model):
    penalty = method(model, 2.0)
    penalty.before_task()
    for p in model.parameters():
        p.grad = -torch.ones_like(p)
    penalty.before_step()
    move(model)
    penalty.after_step()
    penalty.consolidate(task())
    move(model)
    return penalty


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_travels_between_a_plain_model_and_a_wrapped_one(name, wrapper):
    method = METHODS[name]
    plain = learned(method, network())
    wrapped = learned(method, WRAPPERS[wrapper](network()))
    there, back = method(wrapped.model, 2.0), method(network(), 2.0)
    there.load_state_dict(plain.state_dict())
    back.load_state_dict(wrapped.state_dict())
    assert plain.state_dict().keys() == wrapped.state_dict().keys()
    assert same(there.state_dict(), plain.state_dict())
    assert same(back.state_dict(), wrapped.state_dict())
    assert there.penalty() > 0
    torch.testing.assert_close(there.penalty(), plain.penalty())


def test_a_state_with_the_names_of_a_wrapper_still_loads():
    """As states were before names were taken out of their wrappers."""
    ewc = consolidated()
    names = {name: f"_orig_mod.{name}" for name in ewc.anchor}
    state = {
        key: value
        for key, value in ewc.state_dict().items()
        if not key.startswith(("anchor.", "precision."))
    }
    precision = ewc.precision._renamed(names).state_dict()
    state |= {f"precision.{key}": value for key, value in precision.items()}
    state |= {f"anchor.{names[name]}": value for name, value in ewc.anchor.items()}
    again = EWC(network(), 2.0)
    again.load_state_dict(state)
    assert same(again.state_dict(), ewc.state_dict())


def test_adapters_in_a_wrapper_have_the_state_of_adapters_without():
    model = network()
    add_adapters(model, ["0", "2"], rank=1)
    plain, wrapped = AdapterEWC(model, 1.0), AdapterEWC(torch.compile(model), 1.0)
    plain.consolidate(task())
    wrapped.consolidate(task())
    assert same(plain.state_dict(), wrapped.state_dict())
    again = AdapterEWC(nn.DataParallel(model), 1.0)
    again.load_state_dict(plain.state_dict())
    assert same(again.state_dict(), plain.state_dict())


# Processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes with sharded models have found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "tests.sharding", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def everywhere(ranks, check):
    found = [results[check] for results in ranks]
    assert not any(isinstance(result, str) for result in found), found
    return found


def test_a_plain_state_is_sharded_like_the_model(ranks):
    for found in everywhere(ranks, "a_plain_state_in_a_sharded_model"):
        assert found["anchor"]
        assert found["precision"]
        assert same(found["state"], found["expected state"])
        for name, gradient in found["expected gradient"].items():
            torch.testing.assert_close(found["gradient"][name], gradient)


def test_a_sharded_state_is_gathered_for_a_plain_model(ranks):
    for found in everywhere(ranks, "a_sharded_state_in_a_plain_model"):
        assert (found["was sharded"], found["is sharded"]) == (True, False)
        assert same(found["state"], found["expected state"])


def test_a_sharded_state_loads_into_a_sharded_model(ranks):
    for found in everywhere(ranks, "a_sharded_state_in_a_sharded_model"):
        assert found["anchor"]
        assert same(found["state"], found["expected state"])


def test_of_a_matrix_the_anchor_is_sharded_alone(ranks):
    for found in everywhere(ranks, "a_matrix_in_a_sharded_model"):
        assert found["anchor"]
        assert same(found["state"], found["expected state"])


def test_a_penalty_follows_a_model_that_is_sharded_after_its_task(ranks):
    for found in everywhere(ranks, "a_model_that_is_sharded_after_its_task"):
        for expected, sharded in found.values():
            assert sharded[0]
            for one, other in zip(sharded[1:], expected[1:], strict=True):
                torch.testing.assert_close(one, other)


def test_what_a_path_remembers_is_sharded_and_gathered_as_well(ranks):
    for found in everywhere(ranks, "the_memory_of_a_path"):
        assert found["sharded"]
        assert same(found["state"], found["expected state"])
        assert same(found["other state"], found["expected state"])


def test_a_sharded_penalty_is_one_file_for_any_model(ranks):
    for found in everywhere(ranks, "files"):
        assert (found["data"], found["left"]) == ("of two processes", [])
        assert same(found["state"], found["expected state"])
        assert same(found["sharded state"], found["expected state"])
        assert same(found["fisher"], found["expected fisher"])
        assert same(found["precision"], found["expected precision"])
