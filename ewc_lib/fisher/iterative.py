"""Questions to a symmetric matrix that can do nothing but multiply a vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")

Product: TypeAlias = Callable[[Float[Tensor, " P"]], Float[Tensor, " P"]]


class Estimate(NamedTuple, Generic[T]):
    """What random probes say of a number or of a vector.

    Attributes
    ----------
    value : Tensor or dict of Tensor
        The mean of the probes, unbiased.
    standard_error : Tensor or dict of Tensor
        How far it typically is from the truth; of each entry where it is a vector.
    """

    value: T
    standard_error: T


class Found(NamedTuple):
    """What an iteration has found, and how good it is.

    Attributes
    ----------
    value
        The solution, or the eigenvalues from the largest down.
    residual
        What is left, relative to the right-hand side or to the largest eigenvalue.
    products
        Products that it took.
    """

    value: Tensor
    residual: float
    products: int


def conjugate_gradients(
    product: Product, b: Float[Tensor, " P"], tolerance: float, most: int
) -> Found:
    """Solve a positive semi-definite system (Hestenes and Stiefel 1952).

    The residual that the iteration keeps drifts away from the true one, so it starts anew from
    the true one until that is small, or is no longer halved.
    """
    x, r, limit, n = torch.zeros_like(b), b.clone(), tolerance * b.norm(), 0
    while r.norm() > limit and n < most - 1:  # the last one tells what is left
        before, p, rr = r.norm(), r.clone(), r.dot(r)
        while rr.sqrt() > limit and n < most - 1:
            along = product(p)
            n += 1
            curvature = p.dot(along)
            if not curvature > 0:  # a direction without information
                break
            x += rr / curvature * p
            r -= rr / curvature * along
            rr, last = r.dot(r), rr
            p = r + rr / last * p
        r = b - product(x)
        n += 1
        if r.norm() > before / 2:
            break
    return Found(x, float(r.norm() / b.norm()) if b.any() else 0.0, n)


def top_eigenvalues(
    product: Product, start: Float[Tensor, "P b"], k: int, tolerance: float, most: int
) -> Found:
    """Find the ``k`` largest eigenvalues by a block Lanczos method with restarts.

    As many vectors as there are eigenvalues to find, or more, see an eigenvalue as often as it
    is there, which one vector cannot. All of the basis is kept orthogonal, and the residuals of
    the best approximations extend it (Rayleigh and Ritz; Golub and Van Loan 2013, section 10.3).
    """
    basis = torch.linalg.qr(start).Q
    images, n = _images(product, basis), basis.shape[1]
    while True:
        inside = basis.mT @ images
        values, rotation = (t.flip(-1) for t in torch.linalg.eigh((inside + inside.mT) / 2))
        best = rotation[:, :k]
        left = images @ best - basis @ best * values[:k]
        sizes, scale = left.norm(dim=0), values.abs().max()
        open_ = sizes > tolerance * scale
        new = _orthogonal_to(basis, left[:, open_] / sizes[open_])
        if not open_.any() or n >= most or not new.shape[1]:
            return Found(values[:k], float(sizes.max() / scale) if scale > 0 else 0.0, n)
        if basis.shape[1] + new.shape[1] > 4 * k + 20:
            kept = rotation[:, : 2 * k]
            basis, images = basis @ kept, images @ kept
        basis, images = torch.cat([basis, new], 1), torch.cat([images, _images(product, new)], 1)
        n += new.shape[1]


def quadratic_probes(
    product: Product, n: int, like: Float[Tensor, " P"], generator: torch.Generator
) -> Iterator[Float[Tensor, " P"]]:
    r"""Yield :math:`z \odot F z` for vectors of random signs: the diagonal on average."""
    for _ in range(n):
        bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
        z = 2 * bits.to(like) - 1
        yield z * product(z)


def mean_and_error(draws: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of two draws or more, and its standard error (Welford 1962)."""
    mean, n = next(draws), 1
    squares = torch.zeros_like(mean)
    for draw in draws:
        step, n = draw - mean, n + 1
        mean = mean + step / n
        squares += step * (draw - mean)
    return mean, (squares / (n - 1) / n).sqrt()


def _images(product: Product, basis: Float[Tensor, "P b"]) -> Float[Tensor, "P b"]:
    return torch.stack([product(column) for column in basis.mT], 1)


def _orthogonal_to(basis: Float[Tensor, "P b"], new: Float[Tensor, "P c"]) -> Tensor:
    """Return orthonormal columns for what is new in some unit vectors."""
    for _ in range(2):  # once is not enough in floating point
        new = new - basis @ (basis.mT @ new)
    directions, sizes, _ = torch.linalg.svd(new, full_matrices=False)
    new = directions[:, sizes > torch.finfo(new.dtype).eps ** 0.5]
    new = new - basis @ (basis.mT @ new)
    orthonormal: Tensor = torch.linalg.qr(new).Q
    return orthonormal
