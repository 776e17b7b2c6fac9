"""Sums over observations: blocks, whole matrices, low rank, precision and place."""

import pytest
import torch

from ewc_lib import fisher_information
from ewc_lib.fisher import BlockDiagonal, Diagonal, LowRank, sums
from tests.scenarios import SCENARIOS, N, estimate, oracle, relative_error

NAMES = (
    "mlp_categorical",
    "attention",
    "lstm",
    "tied_weights",
    "frozen_parameters",
    "custom_function",
)
KINDS = ("exact", "empirical")


def inside(blocks, matrix, shapes):
    """Set what lies between groups of parameters to zero."""
    places, start = {}, 0
    for name, shape in shapes.items():
        places[name] = list(range(start, start + shape.numel()))
        start += shape.numel()
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for names in blocks:
        index = torch.tensor([i for name in names for i in places[name]])
        mask[index[:, None], index] = True
    return matrix * mask


@pytest.mark.parametrize("size", [1, 7, N])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["block", "module"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_of_the_whole_matrix(name, structure, kind, size):
    if name == "lstm" and size != N:
        pytest.skip("the loop takes long, and one observation at a time in any case")
    found = estimate(SCENARIOS[name](), size, kind=kind, structure=structure)
    assert isinstance(found, BlockDiagonal)
    groups = [list(block.shapes) for block in found.blocks]
    if structure == "block":
        assert groups == [[parameter] for parameter in found.shapes]
    else:
        assert len(groups) == len({parameter.rpartition(".")[0] for parameter in found.shapes})
    expected = inside(groups, oracle(name, kind), found.shapes)
    assert relative_error(found.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("kind", ["sketch", "sampled", "exact"])
@pytest.mark.parametrize("structure", ["block", "module", "dense", "lowrank"])
def test_the_diagonal_is_the_same_in_every_structure(structure, kind):
    case = SCENARIOS["attention"]()
    expected = estimate(case, kind=kind, draws=2)
    assert isinstance(expected, Diagonal)
    found = estimate(case, kind=kind, draws=2, structure=structure, rank=999).diagonal()
    for name, values in expected.diagonal().items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-15)


# Low rank


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_categorical", "one_number_each", "lstm"])
def test_full_rank_is_the_whole_matrix(name, kind):
    found = estimate(SCENARIOS[name](), kind=kind, structure="lowrank", rank=999)
    assert relative_error(found.to_dense(), oracle(name, kind)) < 1e-10


@pytest.mark.parametrize("name", ["mlp_categorical", "one_number_each"])
def test_low_rank_keeps_the_largest_eigenvalues(name):
    found = estimate(SCENARIOS[name](), 3, structure="lowrank", rank=3)
    assert isinstance(found, LowRank)
    expected = torch.linalg.eigvalsh(oracle(name, "exact")).flip(0)
    torch.testing.assert_close(found.eigenvalues, expected[:3], rtol=1e-10, atol=0.0)
    torch.testing.assert_close(found.trace(), expected[:3].sum(), rtol=1e-10, atol=0.0)
    u = found.directions
    torch.testing.assert_close(u.mT @ u, torch.eye(3, dtype=u.dtype), rtol=0.0, atol=1e-10)


def test_gradients_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(sums, "MAX_BYTES", 5_000)
    with pytest.raises(ValueError, match=r"gradients of .* numbers take more than"):
        estimate(SCENARIOS["mlp_categorical"](), 1, structure="lowrank")


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        estimate(SCENARIOS["mlp_categorical"](), structure="lowrank", rank=0)


# Size, precision and place


@pytest.mark.parametrize("structure", ["dense", "module"])
def test_a_matrix_that_nobody_means_is_refused_by_its_size_and_parameters(structure):
    model = torch.nn.Linear(1000, 300)
    data = torch.zeros(2, 1000), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="300300 × 300300 for 'weight', 'bias' takes 336 GiB"):
        fisher_information(model, data, structure=structure)


@pytest.mark.parametrize("structure", ["diagonal", "block", "dense", "lowrank", "kronecker"])
def test_sums_in_double_precision_are_close_to_those_in_single(structure):
    case = SCENARIOS["mlp_categorical"]()
    case = case._replace(model=case.model.float(), x=case.x.float())
    single = estimate(case, structure=structure)
    double = estimate(case, structure=structure, dtype=torch.float64)
    assert {d.dtype for d in single.diagonal().values()} == {torch.float32}
    assert {d.dtype for d in double.diagonal().values()} == {torch.float64}
    assert relative_error(double.to_dense().float(), single.to_dense()) < 1e-5


@pytest.mark.parametrize("name", ["mlp_categorical", "attention", "custom_function"])
@pytest.mark.parametrize("structure", ["diagonal", "block", "dense", "lowrank", "kronecker"])
def test_the_place_of_the_sums_changes_no_number(structure, name):
    case = SCENARIOS[name]()
    expected = estimate(case, structure=structure)
    found = estimate(case, structure=structure, device="cpu")
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-12


def test_sums_that_lie_elsewhere_are_added_to_in_parts(monkeypatch):
    """As on a CPU for a model on an accelerator: the gradients meet the sum only once summed."""
    case = SCENARIOS["mlp_categorical"]()
    expected, added = estimate(case).diagonal(), []

    class Elsewhere(sums.DiagonalSum):
        def _add(self, name, add, like):
            part = like.new_zeros(self.shapes[name])
            add(part)
            added.append(name)
            self.sums[name] += part

    monkeypatch.setattr("ewc_lib.fisher.estimate.DiagonalSum", Elsewhere)
    found = estimate(case).diagonal()
    assert set(added) == set(found)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
