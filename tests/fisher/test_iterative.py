"""Questions that are answered by products alone, against the whole matrix."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.sparse.linalg import LinearOperator, eigsh

from ewc_lib.fisher.iterative import (
    conjugate_gradients,
    mean_and_error,
    quadratic_probes,
    top_eigenvalues,
)
from tests.scenarios import PROPERTY

DOUBLE = torch.float64
P = 30


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(eigenvalues, seed=0, dtype=DOUBLE):
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=DOUBLE)).Q
    return (basis * torch.as_tensor(eigenvalues, dtype=DOUBLE) @ basis.mT).to(dtype)


SPECTRA = {
    "regular": torch.linspace(0.1, 5, P),
    "singular": torch.cat([torch.zeros(P // 2), torch.linspace(1, 2, P - P // 2)]),
    "of many sizes": torch.logspace(-6, 6, P, dtype=DOUBLE),
    "each three times": torch.linspace(1, 10, P // 3).repeat_interleave(3),
    "the identity": torch.ones(P),
    "one direction": torch.cat([torch.zeros(P - 1), torch.ones(1)]),
}
each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


class Counted:
    """A matrix that counts its products."""

    def __init__(self, A):
        self.A, self.n = A, 0

    def __call__(self, x):
        self.n += 1
        return self.A @ x


# Systems


@each_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_damped_system_is_solved_to_the_residual_that_is_told(spectrum, dtype):
    A = matrix(spectrum, dtype=dtype)
    b = torch.randn(P, generator=seeded(1), dtype=dtype)
    damped = Counted(A + 0.1 * A.diagonal().max() * torch.eye(P, dtype=dtype))
    tolerance = torch.finfo(dtype).eps ** 0.5
    found = conjugate_gradients(damped, b, tolerance, 1000)
    true = float((damped.A @ found.value - b).norm() / b.norm())
    assert true <= tolerance
    assert found.residual == pytest.approx(true, rel=1e-3)
    assert found.products == damped.n
    expected = torch.linalg.solve(damped.A, b)
    assert (found.value - expected).norm() <= 100 * tolerance * expected.norm()


def test_in_the_range_of_a_singular_matrix_the_solution_is_that_of_the_pseudo_inverse():
    A = matrix(SPECTRA["singular"])
    b = A @ torch.randn(P, generator=seeded(1), dtype=DOUBLE)
    found = conjugate_gradients(lambda x: A @ x, b, 1e-12, 1000)
    assert torch.allclose(found.value, torch.linalg.pinv(A, hermitian=True) @ b, atol=1e-9)


def test_outside_of_the_range_the_residual_says_that_there_is_no_solution():
    A = matrix(SPECTRA["one direction"])
    b = torch.randn(P, generator=seeded(1), dtype=DOUBLE)
    found = conjugate_gradients(lambda x: A @ x, b, 1e-8, 1000)
    assert found.residual > 0.5
    assert found.value.isfinite().all()
    assert found.products < 100


def test_no_more_products_are_made_than_allowed():
    product = Counted(matrix(SPECTRA["of many sizes"]))
    found = conjugate_gradients(product, torch.ones(P, dtype=DOUBLE), 1e-12, 5)
    assert product.n == found.products == 5
    assert found.residual > 1e-12


def test_nothing_is_solved_by_nothing():
    product = Counted(matrix(SPECTRA["regular"]))
    found = conjugate_gradients(product, torch.zeros(P, dtype=DOUBLE), 1e-8, 10)
    assert not found.value.any()
    assert (found.residual, product.n) == (0.0, 0)


# Eigenvalues


def largest(A, k, tolerance=1e-9, most=2000, seed=1):
    start = torch.randn(len(A), min(k + 2, len(A)), generator=seeded(seed), dtype=A.dtype)
    return top_eigenvalues(lambda x: A @ x, start, k, tolerance, most)


@each_spectrum
@pytest.mark.parametrize("k", [1, 3, 7, P])
def test_the_largest_eigenvalues_are_found_each_as_often_as_it_is_there(spectrum, k):
    A = matrix(spectrum)
    found = largest(A, k)
    expected = torch.linalg.eigvalsh(A).flip(0)[:k]
    assert found.residual <= 1e-9
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-8 * float(expected[0]))


def test_it_finds_what_arpack_finds_in_a_space_that_needs_restarts():
    size, k = 400, 4
    A = matrix(torch.linspace(0, 1, size, dtype=DOUBLE) ** 2)
    operator = LinearOperator((size, size), matvec=lambda x: A.numpy() @ x, dtype=np.float64)
    expected = np.sort(eigsh(operator, k, return_eigenvectors=False))[::-1]
    found = largest(A, k)
    assert found.residual <= 1e-9
    assert np.allclose(found.value.numpy(), expected, rtol=0, atol=1e-9)


def test_the_residual_bounds_how_far_an_eigenvalue_is_off():
    A = matrix(torch.linspace(0.9, 1, 300))
    found = largest(A, 3, most=40)
    true = torch.linalg.eigvalsh(A)
    assert found.residual > 1e-6
    for value in found.value:
        assert (true - value).abs().min() <= found.residual * found.value[0]


def test_no_information_has_eigenvalues_of_zero():
    found = largest(torch.zeros(P, P, dtype=DOUBLE), 3)
    assert found.value.tolist() == [0, 0, 0]
    assert found.residual == 0


@given(st.integers(1, 12), st.integers(0, 1000))
@PROPERTY
def test_small_matrices_have_all_their_eigenvalues(size, seed):
    A = matrix(torch.rand(size, generator=seeded(seed), dtype=DOUBLE), seed)
    found = largest(A, size, seed=seed)
    assert torch.allclose(found.value, torch.linalg.eigvalsh(A).flip(0), atol=1e-8)


# Probes


@pytest.mark.parametrize("kind", ["trace", "diagonal"])
def test_the_standard_error_is_the_spread_of_estimates_around_the_truth(kind):
    A = matrix(SPECTRA["regular"])
    like, source = torch.zeros(P, dtype=DOUBLE), seeded()

    def estimate():
        probes = quadratic_probes(lambda x: A @ x, 16, like, source)
        return mean_and_error(z.sum() if kind == "trace" else z for z in probes)

    truth = A.trace() if kind == "trace" else A.diagonal()
    scores = torch.stack(
        [(value - truth) / error for value, error in (estimate() for _ in range(500))]
    )
    assert scores.mean(0).abs().max() < 5 / 500**0.5 * (15 / 13) ** 0.5
    assert float(scores.square().mean()) == pytest.approx(15 / 13, rel=0.15)  # Student's t


def test_of_a_diagonal_matrix_every_probe_is_exact():
    values = torch.rand(P, generator=seeded(), dtype=DOUBLE)
    found = mean_and_error(quadratic_probes(lambda x: values * x, 4, values, seeded()))
    assert torch.allclose(found[0], values, rtol=1e-14, atol=0)
    assert not found[1].any()


def test_mean_and_error_are_those_of_all_draws_together():
    draws = torch.randn(9, 4, generator=seeded(), dtype=DOUBLE) + 1e6
    mean, error = mean_and_error(iter(draws))
    assert torch.allclose(mean, draws.mean(0), rtol=1e-14)
    assert torch.allclose(error, draws.std(0) / 3, rtol=1e-8)
