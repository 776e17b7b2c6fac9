"""Right on every model of the zoo, however the data are cut, and by the path it deserves."""

import io
from fnmatch import filter as matching
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ewc_lib import Fisher, fisher_information
from tests.scenarios import BATCH_SIZES, N, Scenario, definition, relative_error, same, trace_of
from tests.zoo import (
    COMPLEX,
    PATHS,
    REFUSED,
    SINGLE_PRECISION,
    ZOO,
    Branches,
    Functional,
    call,
    error,
    measure,
    set_mode,
    slower_than_expected,
    truth,
    zoo_truth,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:LSTM with projections is not supported"
)

KINDS = ("exact", "empirical")
CUTS = {
    "exact": [(4,), (N,), (1, N)],
    "empirical": [(4,), *((size,) for size in BATCH_SIZES), (1, N)],
}
"""The batches that the data are cut into: the first sizes, of which the last is repeated.

The exact kind goes the same way for each of its columns, so fewer cuts are enough for it.
"""


class Run(NamedTuple):
    """What was found for each cut, and what model and inputs were before and afterwards."""

    case: Scenario
    found: dict[tuple[int, ...], Fisher]
    before: dict[str, Any]
    after: dict[str, Any]


def cuts(case, kind):
    """Return the sizes of batches, of which one holds all observations of an entry."""
    n = len(case.y)
    return [*CUTS[kind], (n,)] if n > N else CUTS[kind]


def state(case):
    return trace_of(case.model) | {"inputs": tree_map(torch.clone, case.x)}


@cache
def run(name, kind):
    """Measure the diagonal of an entry once for all tests."""
    case = ZOO[name]()
    before = state(case)
    found = {sizes: measure(case, *sizes, kind=kind) for sizes in cuts(case, kind)}
    return Run(case, found, before, state(case))


def tolerance(name):
    return 1e-6 if name in SINGLE_PRECISION else 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_the_diagonal_is_that_of_one_observation_at_a_time(name, kind):
    expected = zoo_truth(name).diagonal(kind)
    for sizes, found in run(name, kind).found.items():
        assert error(found.diagonal(), expected) < tolerance(name), sizes
        assert found.n_samples == len(zoo_truth(name).score)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_no_parameter_takes_a_slower_path_than_it_should(name, kind):
    """In single precision, rounding may look like a mistake if there is one observation only."""
    for sizes in CUTS[kind] if name not in SINGLE_PRECISION else [(N,)]:
        assert not slower_than_expected(name, run(name, kind).found[sizes].paths), sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_no_trace_is_left(name, kind):
    found = run(name, kind)
    for key, before in found.before.items():
        assert same(found.after[key], before), key


def saved(model):
    """Save a whole model and return the size of the file, or say what kept it from that."""
    file = io.BytesIO()
    try:
        torch.save(model, file)
    except Exception as error:
        return type(error)
    return len(file.getvalue()) // 1024


def trained(case):
    """Train by one step and return all parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.1)
        set_mode(case.model, True)
        call(case.model, tree_map(torch.clone, case.x)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in case.model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_the_model_can_be_saved_and_trained_as_before(name, kind):
    used, fresh = run(name, kind).case, ZOO[name]()
    assert saved(used.model) == saved(fresh.model)
    assert same(trained(used), trained(fresh))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in ZOO if name not in COMPLEX])
def test_the_whole_matrix_is_that_of_one_observation_at_a_time(name, kind):
    found = measure(ZOO[name](), kind=kind, structure="dense").to_dense()
    assert relative_error(found, zoo_truth(name).dense(kind)) < tolerance(name)


REORDERED = matching(ZOO, "order_*")


@pytest.mark.parametrize("name", REORDERED)
def test_all_eigenvectors_of_rows_in_another_order_make_the_whole_matrix(name):
    found = measure(ZOO[name](), structure="lowrank", rank=1000).to_dense()
    assert relative_error(found, zoo_truth(name).dense("exact")) < 1e-10


@pytest.mark.parametrize("name", REORDERED)
def test_kronecker_factors_of_rows_in_another_order_can_be_pooled(name):
    case = ZOO[name]()
    half = len(case.y) // 2
    parts = [
        Scenario(case.model, tree_map(lambda t, p=p: t[p], case.x), case.likelihood, case.y[p])
        for p in (slice(half), slice(half, None))
    ]
    first, second = (measure(part, structure="kronecker") for part in parts)
    whole = measure(case, structure="kronecker").to_dense()
    assert relative_error(first.pool(second).to_dense(), whole) < 1e-10


def test_expected_paths_are_those_of_entries():
    assert all(matching(ZOO, entries) for entries in PATHS)
    assert {*SINGLE_PRECISION, *COMPLEX} <= ZOO.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_scores_is_refused_by_name_and_left_alone(name, kind):
    make, message, sizes = REFUSED[name]
    case = make()
    before = state(case)
    with pytest.raises(ValueError, match=message):
        measure(case, *sizes, kind=kind)
    assert same(state(case), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["mlp", "attention", "gaussian_outputs", "bernoulli_outputs", "poisson_outputs"]
)
def test_the_slow_answer_is_that_of_the_definition(name, kind):
    assert relative_error(zoo_truth(name).dense(kind), definition(ZOO[name](), kind)) < 1e-10


class Parts(nn.Module):
    """A model whose complex parameters are pairs of real ones."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.parts = nn.ParameterDict(
            {
                name.replace(".", "_"): torch.view_as_real(p.detach()).clone()
                for name, p in model.named_parameters()
                if p.is_complex()
            }
        )

    def forward(self, x):
        together = {
            name: torch.view_as_complex(self.parts[name.replace(".", "_")])
            for name, p in self.model.named_parameters()
            if p.is_complex()
        }
        return functional_call(self.model, together, (x,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPLEX)
def test_the_slow_answer_for_a_complex_parameter_is_the_sum_of_its_parts(name, kind):
    case = ZOO[name]()
    parts = truth(case._replace(model=Parts(case.model))).diagonal(kind)
    for key, found in zoo_truth(name).diagonal(kind).items():
        pair = parts.get(f"parts.{key.replace('.', '_')}")
        expected = parts[f"model.{key}"] if pair is None else pair.sum(-1)
        assert torch.allclose(found, expected, rtol=1e-10, atol=0)


class Summary(nn.Module):
    """Three classes for a sequence of any length, whose layers depend on its length."""

    def __init__(self):
        super().__init__()
        self.body = Branches()
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.head(self.body(x).mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_may_differ_in_length_and_so_in_what_is_computed(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Summary()
        batches = [
            (torch.randn(n, length, 4, dtype=torch.float64), torch.arange(n) % 3)
            for n, length in ((1, 5), (7, 2), (7, 3), (5, 7), (1, 1))
        ]
    found = fisher_information(model, batches, kind=kind)
    parts = [truth(Scenario(model, x, "categorical", y)).diagonal(kind) for x, y in batches]
    count = sum(len(y) for _, y in batches)
    expected = {
        name: sum(len(y) * part[name] for part, (_, y) in zip(parts, batches, strict=True)) / count
        for name in parts[0]
    }
    assert found.n_samples == count
    assert error(found.diagonal(), expected) < 1e-10
    assert found.paths["body.idle"] == "unused"


@pytest.mark.parametrize("pack", [list, lambda rows: (), lambda rows: {"scores": rows[0]}])
def test_outputs_of_another_form_are_refused(pack):
    model = Functional(lambda p, x: pack([x @ p.w]), w=(4, 3))
    data = torch.randn(N, 4), torch.zeros(N, dtype=torch.long)
    with pytest.raises(TypeError, match=r"must return a tensor or have \.logits, got"):
        fisher_information(model, data)
