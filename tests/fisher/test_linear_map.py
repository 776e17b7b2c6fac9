"""What is asked of a map by products alone, named or flat."""

import pytest
import torch

from ewc_lib._parameters import ravel, unravel
from ewc_lib.fisher import MatrixFree
from ewc_lib.fisher.linear_map import LinearMap
from ewc_lib.fisher.structures.vectors import in_form_of, named

SHAPES = {"weight": torch.Size([3, 4]), "scale": torch.Size([]), "bias": torch.Size([3])}
P = 16


class Matrix(LinearMap):
    """A matrix that is only ever multiplied."""

    shapes, dtype, device = SHAPES, torch.float64, torch.device("cpu")
    _rounding = torch.finfo(torch.float64).eps

    def __init__(self, rank=P):
        root = torch.randn(P, rank, generator=torch.Generator().manual_seed(0), dtype=self.dtype)
        self.matrix = root @ root.mT

    def __matmul__(self, v):
        flat, _ = ravel(named(v, self.shapes))
        return in_form_of(v, unravel(self.matrix @ flat, self.shapes), self.shapes)


def row(seed=1):
    return torch.randn(P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tolerance=1e-10):
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_a_form_is_asked_for_flat_and_named_vectors_in_any_order_and_precision():
    F, v = Matrix(), row()
    backwards = dict(reversed(unravel(v, SHAPES).items()))
    close(F.quadratic(v), v @ F.matrix @ v)
    assert F.quadratic(v) == F.quadratic(backwards)
    close(F.quadratic(v.float()), v @ F.matrix @ v, 1e-5)
    assert not F.quadratic(v.requires_grad_()).requires_grad


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_solution_has_the_form_of_what_it_is_asked_for(damping):
    F, v = Matrix(), row()
    expected = torch.linalg.solve(F.matrix + damping * torch.eye(P, dtype=F.dtype), v)
    flat = F.solve(v, damping, tolerance=1e-12)
    close(flat, expected, 1e-8)
    found = F.solve(unravel(v, SHAPES), damping, tolerance=1e-12)
    assert {name: t.shape for name, t in found.items()} == SHAPES
    assert torch.equal(ravel(found)[0], flat)


def test_a_system_that_is_not_solved_warns_where_it_was_asked():
    F = Matrix(rank=4)
    with pytest.warns(RuntimeWarning, match=r"after \d+ products the residual .* damping") as found:
        stopped = F.solve(row(), 1e-9, tolerance=1e-12, max_products=3)
    assert found[0].filename == __file__
    assert stopped.isfinite().all()
    with pytest.warns(RuntimeWarning, match="more damping"):
        F.solve(row())  # not in the range


@pytest.mark.parametrize("k", [1, 5, P])
def test_the_largest_eigenvalues_come_in_their_order(k):
    F = Matrix()
    close(F.eigenvalues(k), torch.linalg.eigvalsh(F.matrix).flip(0)[:k], 1e-8)


def test_eigenvalues_that_are_not_found_warn_where_they_were_asked():
    with pytest.warns(RuntimeWarning, match=r"instead of 1\.0e-14; try a larger tol") as found:
        Matrix().eigenvalues(2, tolerance=1e-14, max_products=5)
    assert found[0].filename == __file__


def test_there_are_no_more_eigenvalues_than_parameters():
    with pytest.raises(ValueError, match=f"k={P + 1}, but {P} parameters have {P} eigenvalues"):
        Matrix().eigenvalues(P + 1)


def test_trace_and_diagonal_come_with_an_error_each():
    F = Matrix()
    trace, diagonal = F.trace(100), F.diagonal(100)
    assert abs(float(trace.value - F.matrix.trace())) < 4 * float(trace.standard_error)
    assert {name: t.shape for name, t in diagonal.value.items()} == SHAPES
    off = ravel(diagonal.value)[0] - F.matrix.diagonal()
    assert (off.abs() < 5 * ravel(diagonal.standard_error)[0]).all()
    close(sum(t.sum() for t in diagonal.value.values()), trace.value)


def test_probes_and_first_vectors_are_drawn_by_the_generator_alone():
    F = Matrix()
    before = torch.get_rng_state()

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    one, again, other, zero = (F.trace(2, generator=seeded(s)) for s in (3, 3, 4, 0))
    assert one == again != other
    assert zero == F.trace(2)
    assert torch.equal(F.eigenvalues(2), F.eigenvalues(2, generator=seeded(0)))
    assert torch.equal(torch.get_rng_state(), before)


REFUSED = {
    "one probe": (lambda F: F.trace(1), "n_probes=2 at least"),
    "no probe": (lambda F: F.diagonal(0), "n_probes must be at least 1, got 0"),
    "no eigenvalue": (lambda F: F.eigenvalues(0), "k must be at least 1"),
    "a seed": (lambda F: F.eigenvalues(generator=0), "generator must be a torch.Generator, got 0"),
    "a negative damping": (lambda F: F.solve(row(), -1.0), "damping must not be negative"),
    "no tolerance": (lambda F: F.solve(row(), tolerance=0.0), "tolerance must be positive, got 0"),
    "no product": (lambda F: F.solve(row(), max_products=0), "max_products must be at least 1"),
    "another length": (lambda F: F.solve(row()[1:]), r"must have shape \(16,\), got \(15,\)"),
    "a list": (lambda F: F.quadratic(list(row())), "one flat tensor; got list"),
}


@pytest.mark.parametrize(("ask", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(Matrix())


def test_a_vector_that_is_not_finite_has_no_solution():
    data = torch.randn(9, 3), torch.arange(9) % 3
    with pytest.raises(ValueError, match="finite"):
        MatrixFree(torch.nn.Linear(3, 3), data).solve(torch.full((12,), torch.nan), 1.0)


def test_no_more_products_are_made_than_asked_for(monkeypatch):
    made, times = [], MatrixFree.__matmul__
    monkeypatch.setattr(MatrixFree, "__matmul__", lambda F, v: made.append(1) or times(F, v))
    F = MatrixFree(torch.nn.Linear(3, 3), (torch.randn(9, 3), torch.arange(9) % 3))
    with pytest.warns(RuntimeWarning, match="after 3 products"):
        F.solve(torch.ones(12), 1e-6, max_products=3, tolerance=1e-12)
    assert len(made) == 3
