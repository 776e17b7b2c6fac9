import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.distributions import Categorical
from ewc_lib.fisher import sums
from ewc_lib.fisher.passes import Passes
from ewc_lib.fisher.structures import Dense, Diagonal
from tests.fisher.test_passes import ThreePaths, batch


def add(structure, model, columns, dtype=None):
    parameters = dict(model.named_parameters())
    total = sums.SUMS[structure](parameters, dtype)
    passes = Passes(model, parameters)
    for n, first in ((5, 0), (3, 5)):
        passes.run(batch(n, first), Categorical())
        total.add(passes, iter([column[:n] for column in columns]), n)
    return total.mean("exact", passes.paths())


def columns(k):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(k, 5, 4, generator=generator, dtype=torch.float64))


@pytest.fixture(params=[ThreePaths, lambda: mlp((3, 4), seed=0)], ids=["three paths", "by rule"])
def model(request):
    return request.param().double().eval()


def test_the_diagonal_sum_is_the_diagonal_of_the_dense_sum(model):
    diagonal, dense = (add(structure, model, columns(3)) for structure in ("diagonal", "dense"))
    assert isinstance(diagonal, Diagonal)
    assert isinstance(dense, Dense)
    torch.testing.assert_close(diagonal.to_dense().diagonal(), dense.to_dense().diagonal())
    assert diagonal.n_samples == dense.n_samples == 8


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_the_sum_does_not_depend_on_how_many_columns_go_at_once(model, structure, monkeypatch):
    at_once = add(structure, model, columns(5)).to_dense()
    monkeypatch.setattr(sums, "COLUMNS_AT_ONCE", 2)
    torch.testing.assert_close(add(structure, model, columns(5)).to_dense(), at_once)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_no_column_is_no_information(model, structure):
    assert not add(structure, model, []).to_dense().any()


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_the_precision_of_the_sums_can_be_chosen(model, structure):
    found = add(structure, model.float().double(), columns(2), torch.float32)
    assert found.to_dense().dtype == torch.float32
