"""Right on every model of the zoo, however the data are cut, and by the path it deserves."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ewc_lib import Fisher, fisher_information
from tests.scenarios import BATCH_SIZES, N, Scenario, definition, relative_error, same, trace_of
from tests.zoo import (
    PATHS,
    SINGLE_PRECISION,
    ZOO,
    Branches,
    Functional,
    error,
    measure,
    slower_than_expected,
    truth,
    zoo_truth,
)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

KINDS = ("exact", "empirical")
CUTS = {"exact": [(N,), (1, N)], "empirical": [*((size,) for size in BATCH_SIZES), (1, N)]}
"""The batches that the data are cut into: the first sizes, of which the last is repeated.

The exact kind goes the same way for each of its columns, so half of the cuts are enough for it.
"""


class Run(NamedTuple):
    """What was found for each cut, and what the model was before and afterwards."""

    found: dict[tuple[int, ...], Fisher]
    before: dict[str, Any]
    after: dict[str, Any]


@cache
def run(name, kind):
    """Measure the diagonal of an entry once for all tests."""
    case = ZOO[name]()
    before = trace_of(case.model)
    found = {sizes: measure(case, *sizes, kind=kind) for sizes in CUTS[kind]}
    return Run(found, before, trace_of(case.model))


def tolerance(name):
    return 1e-6 if name in SINGLE_PRECISION else 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_the_diagonal_is_that_of_one_observation_at_a_time(name, kind):
    expected = zoo_truth(name).diagonal(kind)
    for sizes, found in run(name, kind).found.items():
        assert error(found.diagonal(), expected) < tolerance(name), sizes
        assert found.n_samples == N


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_no_parameter_takes_a_slower_path_than_it_should(name, kind):
    """In single precision, rounding may look like a mistake if there is one observation only."""
    for sizes in CUTS[kind] if name not in SINGLE_PRECISION else [(N,)]:
        assert not slower_than_expected(name, run(name, kind).found[sizes].paths), sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_no_trace_is_left(name, kind):
    _, before, after = run(name, kind)
    assert same(after, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_the_whole_matrix_is_that_of_one_observation_at_a_time(name, kind):
    found = measure(ZOO[name](), kind=kind, structure="dense").to_dense()
    assert relative_error(found, zoo_truth(name).dense(kind)) < tolerance(name)


def test_expected_paths_are_those_of_entries():
    assert PATHS.keys() <= ZOO.keys()
    assert set(SINGLE_PRECISION) <= ZOO.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["mlp", "attention", "gaussian_outputs", "bernoulli_outputs", "poisson_outputs"]
)
def test_the_slow_answer_is_that_of_the_definition(name, kind):
    assert relative_error(zoo_truth(name).dense(kind), definition(ZOO[name](), kind)) < 1e-10


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


@pytest.mark.parametrize(
    "pack", [list, lambda rows: ("scores", *rows), lambda rows: {"scores": rows[0]}]
)
def test_outputs_of_another_form_are_refused(pack):
    model = Functional(lambda p, x: pack([x @ p.w]), w=(4, 3))
    data = torch.randn(N, 4), torch.zeros(N, dtype=torch.long)
    with pytest.raises(TypeError, match=r"must return a tensor or have \.logits, got"):
        fisher_information(model, data)
