"""Every form of a Fisher information answers every question as its whole matrix does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ewc_lib.fisher import Dense, Diagonal, Fisher
from ewc_lib.fisher.structures import check_shapes
from tests.scenarios import SCENARIOS, estimate, same

SHAPES = {"layer.weight": (2, 3), "path.scale": (), "layer.bias": (3,)}
P = 10
PATHS = {"layer.weight": "rule", "path.scale": "generic", "layer.bias": "unused"}


def vector(seed=0, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(requires_grad)
        for name, shape in SHAPES.items()
    }


def flat(v):
    return torch.cat([v[name].reshape(-1) for name in SHAPES])


def diagonal(seed=0, rank=P, n_samples=20, kind="exact"):
    values = {name: t.square() + 0.1 for name, t in vector(seed).items()}
    if rank < P:
        values["layer.bias"].zero_()
        values["layer.weight"][0, : P - rank - 3] = 0
    return Diagonal(n_samples, kind, PATHS, values)


def dense(seed=0, rank=P, n_samples=20, kind="exact"):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(P, rank, generator=generator, dtype=torch.float64)
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    return Dense(n_samples, kind, PATHS, root @ root.mT, shapes)


def identity():
    return torch.eye(P, dtype=torch.float64)


STRUCTURES = pytest.mark.parametrize("make", [diagonal, dense], ids=["diagonal", "dense"])
DEFICIENT = P - 4


def close(found, expected, rtol=1e-10):
    assert torch.allclose(found, expected, rtol=rtol, atol=1e-12)


@STRUCTURES
def test_shapes_and_diagonal_are_those_of_the_parameters(make):
    F = make()
    assert {name: tuple(shape) for name, shape in F.shapes.items()} == SHAPES
    assert {name: tuple(d.shape) for name, d in F.diagonal().items()} == SHAPES
    close(flat(F.diagonal()), F.to_dense().diagonal())
    assert F.to_dense().shape == (P, P)


@STRUCTURES
def test_product_with_a_vector(make):
    F, v = make(), vector(1)
    product = F @ v
    close(flat(product), F.to_dense() @ flat(v))
    assert {name: tuple(t.shape) for name, t in product.items()} == SHAPES


@STRUCTURES
def test_names_and_not_the_order_of_a_vector_count(make):
    F, v = make(), vector(1)
    backwards = dict(reversed(v.items()))
    assert same(flat(F @ backwards), flat(F @ v))
    assert torch.equal(F.quadratic(backwards), F.quadratic(v))
    assert same(flat(F.solve(backwards, 0.1)), flat(F.solve(v, 0.1)))


@STRUCTURES
def test_quadratic_form_and_its_gradient(make):
    F, v = make(), vector(1, requires_grad=True)
    value = F.quadratic(v)
    close(value, flat(v) @ F.to_dense() @ flat(v))
    value.backward()
    close(flat({name: t.grad for name, t in v.items()}), 2 * F.to_dense() @ flat(v).detach())


@STRUCTURES
@pytest.mark.parametrize("rank", [P, DEFICIENT])
def test_a_damped_solution(make, rank):
    F, v = make(rank=rank), vector(1)
    expected = torch.linalg.solve(F.to_dense() + 0.3 * identity(), flat(v))
    close(flat(F.solve(v, damping=0.3)), expected)


@STRUCTURES
@pytest.mark.parametrize("rank", [P, DEFICIENT])
def test_a_solution_without_damping_is_the_pseudo_inverse(make, rank):
    F, v = make(rank=rank), vector(1)
    assert torch.linalg.matrix_rank(F.to_dense()) == rank
    close(flat(F.solve(v)), torch.linalg.pinv(F.to_dense()) @ flat(v), rtol=1e-8)


@STRUCTURES
def test_trace(make):
    close(make().trace(), make().to_dense().trace())


@STRUCTURES
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_log_determinant(make, damping):
    F = make()
    expected = torch.linalg.slogdet(F.to_dense() + damping * identity()).logabsdet
    close(F.logdet(damping), expected)


@STRUCTURES
@pytest.mark.parametrize("seed", range(5))
def test_the_log_determinant_of_a_singular_matrix_is_minus_infinity(make, seed):
    F = make(seed, rank=DEFICIENT)
    assert F.logdet() == -torch.inf
    expected = torch.linalg.slogdet(F.to_dense() + 0.3 * identity()).logabsdet
    close(F.logdet(damping=0.3), expected)


@STRUCTURES
def test_no_information_at_all(make):
    F, v = 0 * make(), vector(1)
    assert F.trace() == 0
    assert flat(F.solve(v)).tolist() == [0] * P
    close(flat(F.solve(v, damping=2.0)), flat(v) / 2)
    assert F.logdet() == -torch.inf
    assert [row.share for row in F.report()] == [0, 0, 0]


@STRUCTURES
def test_sums_and_multiples(make):
    F, G = make(0, n_samples=20), make(1, n_samples=5)
    close((F + G).to_dense(), F.to_dense() + G.to_dense())
    assert (F + G).n_samples == 25
    for multiple in (2 * F, F * 2):
        close(multiple.to_dense(), 2 * F.to_dense())
        assert (multiple.n_samples, multiple.kind, multiple.paths) == (20, "exact", PATHS)
    assert type(F + G) is type(F)


@STRUCTURES
def test_arithmetic_leaves_its_operands_alone(make):
    F, G, v = make(0), make(1), vector(1)
    before = F.to_dense().clone(), G.to_dense().clone(), flat(v).clone()
    F + G, 2 * F, F @ v, F.solve(v), F.quadratic(v), F.logdet(), F.to(dtype=torch.float32)
    assert same((F.to_dense(), G.to_dense(), flat(v)), before)


@STRUCTURES
def test_conversion(make):
    F = make()
    single = F.to("cpu", torch.float32)
    assert single.to_dense().dtype == torch.float32
    assert all(d.dtype == torch.float32 for d in single.diagonal().values())
    assert torch.allclose(single.to_dense().double(), F.to_dense(), rtol=1e-6, atol=1e-6)
    assert (single.n_samples, single.kind, single.paths) == (F.n_samples, F.kind, F.paths)
    assert F.to(device="meta").trace().device.type == "meta"


@STRUCTURES
def test_the_report_names_path_and_share(make):
    F = make()
    report = F.report()
    assert {row.parameter: row.path for row in report} == PATHS
    for row in report:
        assert row.share == pytest.approx(float(F.diagonal()[row.parameter].sum() / F.trace()))
    assert sum(row.share for row in report) == pytest.approx(1)


def check_restored(G, F):
    assert type(G) is type(F)
    assert torch.equal(G.to_dense(), F.to_dense())
    assert G.to_dense().dtype == F.to_dense().dtype
    assert (G.shapes, G.paths, G.kind, G.n_samples) == (F.shapes, F.paths, F.kind, F.n_samples)
    assert list(G.shapes) == list(F.shapes)


@STRUCTURES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_dict_holds_everything(make, dtype):
    F = make(kind="empirical").to(dtype=dtype)
    state = F.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    check_restored(Fisher.from_state_dict(state), F)


@STRUCTURES
def test_a_state_dict_goes_through_safetensors(make, tmp_path):
    F = make()
    save_file(F.state_dict(), tmp_path / "fisher.safetensors")
    state = load_file(tmp_path / "fisher.safetensors")
    assert list(state) != list(F.state_dict())  # the format does not keep the order
    check_restored(Fisher.from_state_dict(state), F)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_a_state_dict_of_a_network_goes_through_a_file(structure, tmp_path):
    F = estimate(SCENARIOS["tied_weights"](), structure=structure)
    torch.save(F.state_dict(), tmp_path / "fisher.pt")
    check_restored(Fisher.from_state_dict(torch.load(tmp_path / "fisher.pt")), F)


@STRUCTURES
def test_a_state_dict_shares_no_memory(make):
    F = make()
    before = F.to_dense().clone()
    state = F.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.zero_()
    assert torch.equal(F.to_dense(), before)


WRONG = {
    "missing": (lambda v: v.pop("layer.bias"), "'layer.bias' is missing"),
    "unexpected": (lambda v: v.update(head=torch.ones(1)), "'head' is not expected"),
    "shape": (
        lambda v: v.update({"layer.weight": torch.ones(3, 2)}),
        r"'layer.weight' has shape \(3, 2\) instead of \(2, 3\)",
    ),
}


@STRUCTURES
@pytest.mark.parametrize("method", ["__matmul__", "quadratic", "solve"])
@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_vector_that_does_not_match_is_named(make, method, spoil, message):
    v = vector()
    spoil(v)
    with pytest.raises(ValueError, match=f"parameters do not match: {message}"):
        getattr(make(), method)(v)


def test_every_mismatch_is_listed():
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([])}
    given = {"a": torch.Size([2]), "b": torch.Size([3, 1]), "d": torch.Size([])}
    message = r"'c' is missing; 'd' is not expected; 'b' has shape \(3, 1\) instead of \(3,\)"
    with pytest.raises(ValueError, match=message):
        check_shapes(expected, given)
    check_shapes(expected, dict(reversed(expected.items())))


@STRUCTURES
def test_only_like_can_be_added_to_like(make):
    other = {diagonal: dense, dense: diagonal}[make]
    with pytest.raises(TypeError):
        make() + other()
    with pytest.raises(TypeError):
        make() + 1
    with pytest.raises(ValueError, match="kind 'sketch' to one of 'exact'"):
        make() + make(kind="sketch")


def test_only_the_same_parameters_can_be_added():
    F = diagonal()
    G = Diagonal(20, "exact", {}, {"other": torch.ones(2)})
    message = "'layer.weight' is missing; .* 'other' is not expected"
    with pytest.raises(ValueError, match=message):
        F + G
    F = dense()
    backwards = dict(reversed(F.shapes.items()))
    with pytest.raises(ValueError, match="in another order"):
        F + Dense(20, "exact", PATHS, F.matrix, backwards)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"has no \['kind', 'n_samples', 'parameters', 'structure'\]"),
        (nn.Linear(2, 2).state_dict(), r"not the state of a Fisher: it has no \['kind'"),
        (
            {name: t for name, t in diagonal().state_dict().items() if name != "kind"},
            r"has no \['kind'\]",
        ),
        (
            {name: t for name, t in dense().state_dict().items() if name != "shape.path.scale"},
            "has no 'shape.path.scale'",
        ),
        (
            diagonal().state_dict() | {"structure": torch.tensor([66], dtype=torch.uint8)},
            "unknown structure 'B'",
        ),
    ],
    ids=["empty", "model", "incomplete", "incomplete matrix", "unknown structure"],
)
def test_a_foreign_state_dict_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Fisher.from_state_dict(state)
