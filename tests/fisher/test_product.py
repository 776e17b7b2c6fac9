"""Products with a matrix that is never written down."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.fisher import MatrixFree
from tests.scenarios import SCENARIOS, cut, estimate, same, slow_path_allowed, trace_of

KINDS = ("exact", "sketch", "sampled", "empirical")


def vector(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def free(case, size=5, **options):
    return MatrixFree(case.model, cut(case.x, case.y, size), case.likelihood, **options)


def times(F, v):
    with slow_path_allowed():
        return F @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - {"embedding_bag"}))
def test_the_product_is_that_of_the_whole_matrix(name, kind):
    case = SCENARIOS[name]()
    whole = estimate(case, 5, kind=kind, structure="dense")
    v = vector(whole.shapes)
    found, expected = times(free(case, kind=kind), v), whole @ v
    largest = max(float(t.abs().max()) for t in expected.values())
    for n, t in expected.items():
        torch.testing.assert_close(found[n], t, rtol=1e-9, atol=1e-10 * largest)


def test_an_operation_without_second_derivative_is_refused_by_torch():
    case = SCENARIOS["embedding_bag"]()
    F = free(case)
    with pytest.raises(NotImplementedError, match="embedding_bag"):
        F @ vector(F.shapes)


def test_it_is_symmetric_and_not_negative():
    F = free(SCENARIOS["attention"]())
    u, v = vector(F.shapes, 1), vector(F.shapes, 2)
    left, right = F @ u, F @ v
    a = sum((left[n] * v[n]).sum() for n in v)
    b = sum((right[n] * u[n]).sum() for n in v)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0.0)
    assert F.quadratic(u) > 0
    torch.testing.assert_close(F.quadratic(u), sum((left[n] * u[n]).sum() for n in u))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_change_no_number(size):
    case = SCENARIOS["sequence_of_labels"]()
    v = vector(free(case).shapes)
    a, b = free(case, 8) @ v, free(case, size) @ v
    for n, t in a.items():
        torch.testing.assert_close(b[n], t, rtol=1e-10, atol=1e-14)


def test_labels_that_do_not_count_are_left_out():
    case = SCENARIOS["sequence_of_labels"]()
    y = case.y.clone()
    y[:, 1] = -100
    masked = case._replace(y=y)
    v = vector(free(case).shapes)
    expected = estimate(masked, structure="dense") @ v
    for n, t in (free(masked) @ v).items():
        torch.testing.assert_close(t, expected[n], rtol=1e-9, atol=1e-13)


def test_a_vocabulary_is_no_obstacle_to_the_exact_product():
    model = nn.Linear(4, 50_000)
    x, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="49999 backward passes"):
        fisher_information(model, (x, y))
    F = MatrixFree(model, (x, y))
    v = {"weight": torch.randn(50_000, 4), "bias": torch.randn(50_000)}
    p = model(x).detach().softmax(-1)
    along = x @ v["weight"].mT + v["bias"]
    expected = (p * (along - (p * along).sum(1, keepdim=True))).mean(0)
    torch.testing.assert_close((F @ v)["bias"], expected, rtol=1e-3, atol=1e-8)


def test_the_model_is_taken_as_it_is_and_left_as_it_was():
    case = SCENARIOS["attention"]()
    F, v = free(case), vector(free(case).shapes)
    before, first = trace_of(case.model), F @ v
    assert same(trace_of(case.model), before)
    assert same(F @ v, first)
    with torch.no_grad():
        case.model.head.weight.mul_(2)
    assert not same(F @ v, first)


def test_only_so_many_observations_are_used():
    case = SCENARIOS["mlp_categorical"]()
    v = vector(free(case).shapes)
    some = free(case._replace(x=case.x[:3], y=case.y[:3]), 3) @ v
    for n, t in (free(case, n_samples=3) @ v).items():
        torch.testing.assert_close(t, some[n])


def test_what_cannot_be_right_is_refused():
    case = SCENARIOS["mlp_categorical"]()
    with pytest.raises(ValueError, match="iterator"):
        MatrixFree(case.model, iter(cut(case.x, case.y, 4)))
    with pytest.raises(ValueError, match="'elsewhere' is not expected"):
        free(case) @ {**vector(free(case).shapes), "elsewhere": torch.zeros(1)}
    with pytest.raises(ValueError, match="kind must be one of"):
        free(case, kind="guessed")


def test_conjugate_gradients_solve_with_it():
    scipy = pytest.importorskip("scipy.sparse.linalg")
    case = SCENARIOS["mlp_categorical"]()
    F, damping = free(case), 0.1
    shapes, sizes = F.shapes, [s.numel() for s in F.shapes.values()]

    def unpack(flat):
        pieces = torch.as_tensor(flat.copy()).split(sizes)
        return {n: t.reshape(shapes[n]) for n, t in zip(shapes, pieces, strict=True)}

    def pack(v):
        return torch.cat([v[n].reshape(-1) for n in shapes]).numpy()

    def apply(flat):
        return pack(F @ unpack(flat)) + damping * flat

    size = sum(sizes)
    operator = scipy.LinearOperator((size, size), matvec=apply, dtype="float64")
    v = vector(shapes)
    found, failed = scipy.cg(operator, pack(v), rtol=1e-12)
    assert failed == 0
    expected = estimate(case, structure="dense").solve(v, damping)
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(pack(expected)), rtol=1e-7, atol=1e-9
    )
