from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ewc_lib import fisher_information
from ewc_lib._batches import Batch
from ewc_lib.continual import mlp
from ewc_lib.fisher import MatrixFree
from ewc_lib.fisher.output import COLUMNS_AT_ONCE
from ewc_lib.fisher.structures import Dense, Diagonal
from ewc_lib.fisher.sums import base
from ewc_lib.fisher.sums.base import ParameterSpace
from ewc_lib.fisher.sums.diagonal import DiagonalSum
from ewc_lib.fisher.sums.kronecker import KroneckerSum
from ewc_lib.fisher.sums.rows import BlockSum, DenseSum, LowRankSum
from ewc_lib.likelihood.outputs import Categorical, Gaussian
from ewc_lib.score import memory
from ewc_lib.score.network import NetworkScores
from tests.budgets import set_budget
from tests.scenarios import (
    BATCH_SIZES,
    SCENARIOS,
    N,
    estimate,
    oracle,
    relative_error,
    same,
    trace_of,
)

KINDS = ["exact", "sketch", "sampled", "empirical"]
FULL = 10**6
"""A rank that leaves nothing out."""

STRUCTURES = [
    "diagonal",
    "block",
    "module",
    "dense",
    "lowrank",
    "kronecker",
    "kronecker-reduce",
    "eigenkronecker",
]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def close(found, expected, tolerance=1e-10):
    assert relative_error(found, expected) < tolerance


# One sum, filled by hand


class ThreePaths(nn.Module):
    """Parameters by rule, by the generic path, and without any use."""

    def __init__(self):
        super().__init__()
        self.by_rule = nn.Linear(3, 4)
        self.vector = nn.Parameter(torch.ones(4))
        self.matrix = nn.Parameter(torch.full((2, 4), 0.5))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = torch.hypot(self.by_rule(x), self.vector)
        return torch.hypot(h.unsqueeze(1), self.matrix).sum(1)


def one_block_each(space):
    return BlockSum(space, [[name] for name in space.parameters])


SUMS = {
    "diagonal": DiagonalSum,
    "block": one_block_each,
    "dense": DenseSum,
    "lowrank": partial(LowRankSum, rank=FULL),
    "kronecker": KroneckerSum,
}
each_sum = pytest.mark.parametrize("structure", SUMS)


def add(structure, model, columns, dtype=None, at_once=COLUMNS_AT_ONCE):
    """Sum the given output columns over two batches."""
    parameters = dict(model.named_parameters())
    total = SUMS[structure](ParameterSpace(parameters, dtype))
    network = NetworkScores(model, parameters, Categorical())
    for n, first in ((5, 0), (3, 5)):
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(first), dtype=torch.float64)
        batch = network.run(Batch(x, torch.zeros(n, dtype=torch.long), first))
        blocks = [columns[i : i + at_once] for i in range(0, len(columns), at_once)]
        total.add(batch, (torch.stack([column[:n] for column in block]) for block in blocks))
    return total.mean("exact", network.paths())


def columns(k):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(k, 5, 4, generator=generator, dtype=torch.float64))


@pytest.fixture(params=[ThreePaths, lambda: mlp((3, 4), seed=0)], ids=["three paths", "by rule"])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param().double().eval()


def test_the_three_paths_are_those_of_the_engine():
    found = add("dense", ThreePaths().double().eval(), columns(1))
    assert set(found.paths.values()) == {"rule", "generic", "unused"}


def test_the_diagonal_sum_is_the_diagonal_of_the_matrices(model):
    diagonal, *others = (add(s, model, columns(3)) for s in SUMS if s != "kronecker")
    assert isinstance(diagonal, Diagonal)
    assert isinstance(others[1], Dense)
    for other in others:
        torch.testing.assert_close(other.to_dense().diagonal(), diagonal.to_dense().diagonal())
        assert other.n_samples == diagonal.n_samples == 8


@each_sum
@pytest.mark.parametrize("at_once", [1, 2])
def test_the_sum_does_not_depend_on_how_many_columns_go_at_once(model, structure, at_once):
    """Neither in a block, nor back through the network together."""
    found = add(structure, model, columns(5), at_once=at_once).to_dense()
    torch.testing.assert_close(add(structure, model, columns(5)).to_dense(), found)
    with memory.as_on("cuda"):
        torch.testing.assert_close(add(structure, model, columns(5)).to_dense(), found)


@each_sum
def test_the_sum_does_not_depend_on_how_many_rows_go_at_once(model, structure, monkeypatch):
    at_once = add(structure, model, columns(3)).to_dense()
    set_budget(monkeypatch, rows=1)
    torch.testing.assert_close(add(structure, model, columns(3)).to_dense(), at_once)


def test_rows_are_written_out_in_pieces_of_bounded_size(model, monkeypatch):
    size = sum(p.numel() for p in model.parameters()) * 8
    set_budget(monkeypatch, rows=2 * size)
    lengths = []

    class Watched(DenseSum):
        def add_rows(self, rows, n):
            lengths.append(n)
            assert {len(g) for g in rows.values()} == {n}
            super().add_rows(rows, n)

    monkeypatch.setitem(SUMS, "watched", Watched)
    add("watched", model, columns(1))
    assert lengths == [2, 2, 1, 2, 1]


@each_sum
def test_no_column_is_no_information(model, structure):
    found = add(structure, model, [])
    assert found.to_dense().shape == (sum(p.numel() for p in model.parameters()),) * 2
    assert not found.to_dense().any()


@each_structure
def test_a_single_class_leaves_nothing_to_learn(structure):
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    found = fisher_information(nn.Linear(3, 1), data, structure=structure)
    assert not found.to_dense().any()
    assert found.n_samples == 4


@each_sum
def test_the_precision_of_the_sums_can_be_chosen(model, structure):
    found = add(structure, model.float().double(), columns(2), torch.float32)
    assert found.to_dense().dtype == torch.float32


# Blocks

BLOCKS = ["block", "module"]
each_block = pytest.mark.parametrize("structure", BLOCKS)

BY_EVERY_PATH = [
    "mlp_categorical",
    "mlp_poisson",
    "cnn_with_norms",
    "embedding_bag",
    "tied_weights",
    "attention",
    "raw_parameters",
    "flattened_positions",
    "linear_and_einsum",
    "weight_norm",
    "custom_function",
    "frozen_parameters",
    "lstm",
]


def only_blocks(matrix, shapes, structure):
    """Set everything outside the blocks of a structure to zero."""
    groups = [name if structure == "block" else name.rpartition(".")[0] for name in shapes]
    number = torch.cat(
        [
            torch.full((shape.numel(),), groups.index(group))
            for group, shape in zip(groups, shapes.values(), strict=True)
        ]
    )
    return matrix.where(number[:, None] == number, 0.0)


@each_block
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", BY_EVERY_PATH)
def test_blocks_are_those_of_the_definition_at_every_batch_size(name, kind, structure):
    case = SCENARIOS[name]()
    for size in BATCH_SIZES:
        found = estimate(case, size, kind=kind, structure=structure)
        close(found.to_dense(), only_blocks(oracle(name, kind), found.shapes, structure))
        assert found.n_samples == N


@each_block
@pytest.mark.parametrize("kind", ["sketch", "sampled"])
@pytest.mark.parametrize("name", ["mlp_poisson", "linear_and_einsum", "custom_function"])
def test_blocks_of_random_kinds_are_those_of_the_dense_matrix_of_the_same_draws(
    name, kind, structure
):
    case = SCENARIOS[name]()
    dense = estimate(case, kind=kind, draws=2, structure="dense")
    expected = only_blocks(dense.to_dense(), dense.shapes, structure)
    for size in BATCH_SIZES:
        found = estimate(case, size, kind=kind, draws=2, structure=structure)
        close(found.to_dense(), expected)


def test_there_is_one_block_for_each_parameter_or_for_each_module():
    case = SCENARIOS["mlp_categorical"]()
    by_parameter, by_module = (estimate(case, structure=structure) for structure in BLOCKS)
    names = [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]]
    assert [list(block.shapes) for block in by_parameter.blocks] == names
    assert [list(block.shapes) for block in by_module.blocks] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
    ]
    assert all(isinstance(b, Dense) for b in (*by_parameter.blocks, *by_module.blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_bernoulli", "custom_function"])
def test_all_structures_that_are_exact_share_one_diagonal(name, kind):
    """Random kinds too: they make the same draws."""
    case = SCENARIOS[name]()
    expected = estimate(case, kind=kind).diagonal()
    for structure in ("block", "module", "dense", "lowrank"):
        found = estimate(case, kind=kind, structure=structure, rank=FULL).diagonal()
        assert list(found) == list(expected)
        for parameter, values in expected.items():
            close(found[parameter], values)


# Low rank

FEW = "mlp_categorical"
"""Fewer gradients than parameters."""

MANY = "functional_convolution"
"""More gradients than parameters."""

each_side = pytest.mark.parametrize("name", [FEW, MANY])


def test_one_scenario_has_fewer_gradients_than_parameters_and_one_has_more():
    gradients = 2 * N  # three classes have two columns
    assert len(oracle(FEW, "exact")) > gradients >= len(oracle(MANY, "exact"))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", [*BY_EVERY_PATH, MANY])
def test_the_full_rank_is_the_whole_matrix(name, kind):
    found = estimate(SCENARIOS[name](), kind=kind, structure="lowrank", rank=FULL)
    close(found.to_dense(), oracle(name, kind))


@each_side
@pytest.mark.parametrize("kind", ["sketch", "sampled"])
def test_the_full_rank_of_random_kinds_is_the_whole_matrix_of_the_same_draws(name, kind):
    case = SCENARIOS[name]()
    found, dense = (
        estimate(case, kind=kind, draws=2, structure=structure, rank=FULL)
        for structure in ("lowrank", "dense")
    )
    close(found.to_dense(), dense.to_dense())


@each_side
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_largest_eigenvalues_and_their_eigenvectors_are_kept(name, rank):
    case, expected = SCENARIOS[name](), oracle(name, "exact")
    values, vectors = (part.flip(-1)[..., :rank] for part in torch.linalg.eigh(expected))
    for size in BATCH_SIZES:
        found = estimate(case, size, structure="lowrank", rank=rank)
        close(found.eigenvalues, values)
        close((found.directions * vectors).sum(0).abs(), torch.ones(rank, dtype=torch.float64))


@pytest.mark.parametrize(("name", "size"), [(FEW, 2 * N), (MANY, 12)])
def test_eigenvalues_are_those_of_the_smaller_matrix(name, size, monkeypatch):
    """Over gradients or over parameters, whichever are fewer."""
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix)
    )
    estimate(SCENARIOS[name](), structure="lowrank")
    assert sizes == [size]


@each_side
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_trace_lacks_the_eigenvalues_that_are_left_out(name, rank):
    expected = oracle(name, "exact")
    found = estimate(SCENARIOS[name](), structure="lowrank", rank=rank)
    left_out = torch.linalg.eigvalsh(expected)[:-rank].sum()
    assert left_out > 1e-3 * expected.trace()
    close((expected.trace() - found.trace()).reshape(1), left_out.reshape(1))


def uneven(n):
    """One linear map with inputs of very different sizes, and so eigenvalues."""
    model = nn.Linear(12, 3, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x * torch.logspace(0, -6, 12, dtype=torch.float64)


@pytest.mark.parametrize("n", [10, 100], ids=["fewer gradients", "more gradients"])
def test_directions_are_orthonormal_however_uneven_the_eigenvalues(n):
    model, x = uneven(n)
    y = torch.zeros(n, dtype=torch.long)
    found = fisher_information(model, [(x, y)], structure="lowrank", rank=FULL)
    assert found.eigenvalues[-1] < 1e-9 * found.eigenvalues[0]
    identity = torch.eye(len(found.eigenvalues), dtype=torch.float64)
    assert (found.directions.mT @ found.directions - identity).abs().max() < 1e-12
    assert found.eigenvalues.diff().max() <= 0


@pytest.mark.parametrize("n", [3, 40], ids=["fewer gradients", "more gradients"])
def test_what_has_no_gradient_has_exactly_no_information(n):
    """Rounding does not spread to a dead input or an unused parameter."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = 0
    y = torch.zeros(n, dtype=torch.long)
    found = fisher_information(model, [(x, y)], structure="lowrank", rank=FULL).diagonal()
    assert not found["idle"].any()
    assert not found["0.weight"][:, 2].any()
    assert (found["0.weight"][:, :2] > 0).all()


def test_no_more_directions_are_kept_than_gradients_have():
    found = estimate(SCENARIOS["mlp_gaussian"](), structure="lowrank", rank=FULL)
    assert len(found.eigenvalues) <= 3 * N
    assert (found.eigenvalues > 0).all()
    assert estimate(SCENARIOS[FEW](), structure="lowrank", rank=5).directions.shape == (43, 5)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        estimate(SCENARIOS[FEW](), structure="lowrank", rank=rank)


def test_more_gradients_than_memory_are_refused_before_the_last_batch(monkeypatch):
    case, seen = SCENARIOS[FEW](), []

    def batches():
        for n in range(N):
            seen.append(n)
            yield case.x[n : n + 1], case.y[n : n + 1]

    def run():
        return fisher_information(case.model, batches(), structure="lowrank")

    monkeypatch.setattr(base, "MAX_BYTES", 2 * N * 43 * 8)  # two columns, in double precision
    assert run().n_samples == N
    monkeypatch.setattr(base, "MAX_BYTES", 2 * 3 * 43 * 8)
    seen.clear()
    with pytest.raises(ValueError, match=r"7 gradients of 43 numbers.*n_samples, kind='sketch'"):
        run()
    assert len(seen) == 5  # one batch is looked at ahead


# Precision and place


@each_structure
def test_single_precision_models_may_have_double_precision_sums(structure):
    case = SCENARIOS["cnn_with_norms"]()
    case = case._replace(model=case.model.float(), x=case.x.float())
    single = estimate(case, structure=structure).to_dense()
    double = estimate(case, structure=structure, dtype=torch.float64).to_dense()
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    close(single.double(), double, 1e-4)


@pytest.mark.parametrize("structure", ["diagonal", "block", "dense", "kronecker"])
def test_double_precision_sums_keep_what_single_precision_would_lose(structure):
    """In single precision, 2 ** 24 and one is 2 ** 24."""
    model = nn.Linear(1, 1, bias=False)
    data = [(torch.tensor([[x]]), torch.zeros(1, 1)) for x in (2.0**12, *[1.0] * 15)]
    single, double = (
        fisher_information(model, data, Gaussian(), structure=structure, dtype=dtype).trace() * 16
        for dtype in (torch.float32, torch.float64)
    )
    assert single == 2**24
    assert double == pytest.approx(2**24 + 15, rel=1e-12)


@each_structure
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["text", "device"])
def test_the_device_of_the_sums_may_be_named(structure, device):
    case = SCENARIOS["cnn_with_norms"]()
    found = estimate(case, structure=structure, device=device)
    assert same(found.to_dense(), estimate(case, structure=structure).to_dense())


class OneDevice(TorchDispatchMode):
    """Refuse operations on tensors of several devices, but for copies from one to the other."""

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        assert func in self.COPIES or len({t.device for t in tensors if t.dim()}) < 2, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "lowrank"])
@pytest.mark.parametrize("name", ["cnn_with_norms", "custom_function"])
def test_sums_are_kept_where_they_are_asked_for(name, structure):
    """A low rank has to look at its values, which the device without memory does not have."""
    case = SCENARIOS[name]()
    with OneDevice():
        found = estimate(case, structure=structure, device="meta").diagonal()
    assert {values.device.type for values in found.values()} == {"meta"}
    assert {n: v.shape for n, v in found.items()} == {
        n: p.shape for n, p in case.model.named_parameters()
    }


# Refusals


@pytest.mark.parametrize(
    ("structure", "names"),
    [
        ("dense", "'weight', 'bias'"),
        ("block", "'weight'"),
        ("module", "'weight', 'bias'"),
        ("kronecker", "'weight', 'bias'"),
        ("eigenkronecker", "'weight', 'bias'"),
    ],
)
def test_matrices_that_nobody_means_to_ask_for_are_refused_by_name(structure, names):
    model = nn.Linear(100_000, 1)
    data = [(torch.ones(2, 100_000), torch.zeros(2, 1))]
    message = f"10000[01] × 10000[01] for {names} takes 37 GiB; .*MatrixFree"
    with pytest.raises(ValueError, match=message):
        fisher_information(model, data, Gaussian(), structure=structure)


class ComplexMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.w) @ self.w.mT).abs()


@pytest.mark.parametrize("structure", [*STRUCTURES[1:], "matrix-free"])
def test_a_complex_parameter_has_no_matrix(structure):
    model, data = ComplexMatrix(), (torch.ones(4, 3), torch.arange(4) % 2)
    made = MatrixFree if structure == "matrix-free" else fisher_information
    options = {} if structure == "matrix-free" else {"structure": structure}
    with pytest.raises(ValueError, match="'w' is complex: it has a diagonal only"):
        made(model, data, **options)


def test_the_refusal_names_some_of_many_parameters():
    case = SCENARIOS["attention"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "MAX_BYTES", 0)
        with pytest.raises(
            ValueError, match=r"for 'query.weight', 'query.bias', 'key.weight' \.{3}"
        ):
            estimate(case, structure="dense")


def test_a_matrix_that_just_fits_is_not_refused(monkeypatch):
    case = SCENARIOS[FEW]()
    monkeypatch.setattr(base, "MAX_BYTES", 43 * 43 * 8)
    assert estimate(case, structure="dense").to_dense().shape == (43, 43)
    monkeypatch.setattr(base, "MAX_BYTES", 43 * 43 * 8 - 1)
    with pytest.raises(ValueError, match="43 × 43"):
        estimate(case, structure="dense")


def test_a_diagonal_is_never_refused(monkeypatch):
    """It is as large as the model."""
    monkeypatch.setattr(base, "MAX_BYTES", 0)
    case = SCENARIOS[FEW]()
    assert estimate(case).to_dense().shape == (43, 43)


@pytest.mark.parametrize("bad", [False, True], ids=["success", "exception in the second batch"])
@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s not in ("diagonal", "dense")])
def test_leaves_no_trace(structure, bad):
    case = SCENARIOS["cnn_with_norms"]()
    case.model.train()
    y = case.y.clone()
    y[-1] = 9 if bad else 0
    batches = [(case.x[:4], y[:4]), (case.x[4:], y[4:])]
    before = trace_of(case.model)
    if bad:
        with pytest.raises(ValueError, match="observation 7"):
            fisher_information(case.model, batches, structure=structure)
    else:
        fisher_information(case.model, batches, structure=structure)
    assert same(trace_of(case.model), before)
