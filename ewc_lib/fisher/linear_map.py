"""What can be asked of a Fisher information that does nothing but multiply a vector."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._arguments import check_damping, check_whole, random_source
from ewc_lib._parameters import Vector, ravel, unravel
from ewc_lib.fisher.iterative import (
    Estimate,
    Found,
    conjugate_gradients,
    mean_and_error,
    quadratic_probes,
    top_eigenvalues,
)
from ewc_lib.fisher.structures.vectors import V, in_form_of, named


class LinearMap(ABC):
    """A symmetric positive semi-definite map of vectors of parameters, asked by products alone."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision of a flat product."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where products are."""

    @abstractmethod
    def __matmul__(self, v: V) -> V:
        """Return the product with a vector, named or flat."""

    def quadratic(self, v: Vector | Tensor) -> Float[Tensor, ""]:
        r"""Return :math:`v^\top F v`, a number without a graph: its gradient is :math:`2 F v`."""
        flat = self._flat(named(v, self.shapes))
        return flat.dot(self @ flat)

    def trace(
        self, n_probes: int = 32, *, generator: torch.Generator | None = None
    ) -> Estimate[Float[Tensor, ""]]:
        r"""Estimate the trace by :math:`z^\top F z` for random signs :math:`z` (Hutchinson 1990).

        The sum of ``fisher_information(...)``'s diagonal is exact and takes one pass over data;
        this asks nothing but the map itself.

        Parameters
        ----------
        n_probes
            Products, two at least.
        generator
            Of the signs, on the device of the products; by default a fresh one with seed 0.

        Returns
        -------
        Estimate
            Value and standard error, which falls with the root of ``n_probes``.
        """
        probes = self._probes(n_probes, generator)
        return Estimate(*mean_and_error(probe.sum() for probe in probes))

    def diagonal(
        self, n_probes: int = 32, *, generator: torch.Generator | None = None
    ) -> Estimate[Vector]:
        r"""Estimate the diagonal by :math:`z \odot F z` for random signs (Bekas et al. 2007).

        Parameters
        ----------
        n_probes, generator
            As for :meth:`trace`.

        Returns
        -------
        Estimate
            Value and standard error of each entry, in the shapes of the parameters. A value may
            be negative, where the entries beside the diagonal are larger.
        """
        found = mean_and_error(self._probes(n_probes, generator))
        return Estimate(*(unravel(part, self.shapes) for part in found))

    def solve(
        self,
        v: V,
        damping: float = 0.0,
        *,
        tolerance: float | None = None,
        max_products: int = 1000,
    ) -> V:
        r"""Return :math:`(F + \text{damping} \cdot I)^{-1} v`, named or flat as ``v``.

        By conjugate gradients (Hestenes and Stiefel 1952). Without damping it converges only
        where ``v`` is in the range of :math:`F`, to the pseudo-inverse.

        Parameters
        ----------
        v
            Named tensors, or one flat tensor ``[P]``.
        damping
            Zero or positive. The larger, the fewer products.
        tolerance
            Of the length of the residual, relative to that of ``v``. By default the root of the
            rounding error of the model's parameters: 3e-4 in single precision.
        max_products
            Most products with :math:`F`.

        Raises
        ------
        ValueError
            If the damping is negative, or if ``v`` is not finite or does not fit the parameters.

        Warns
        -----
        RuntimeWarning
            If the residual is larger than it should be, with its size; what was found is
            returned all the same.
        """
        check_damping(damping)
        check_whole(max_products=max_products)
        shapes = self.shapes
        b = self._flat(named(v, shapes))
        if not b.isfinite().all():
            raise ValueError("v must be finite")
        tolerance = self._tolerance(tolerance)
        found = conjugate_gradients(lambda x: self @ x + damping * x, b, tolerance, max_products)
        _warn(found, tolerance, "more damping")
        return in_form_of(v, unravel(found.value, shapes), shapes)

    def eigenvalues(
        self,
        k: int = 1,
        *,
        tolerance: float | None = None,
        max_products: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " k"]:
        """Return the ``k`` largest eigenvalues, the largest first, each as often as it is there.

        By a block Lanczos method with full orthogonalisation (Golub and Van Loan 2013, section
        10.3), which holds up to ``8 * k + 40`` vectors.

        Parameters
        ----------
        k
            How many, at most as many as there are parameters.
        tolerance
            Of the residuals, relative to the largest eigenvalue: so far an eigenvalue may be off
            at most, and by the square of it usually. By default as for :meth:`solve`.
        max_products
            Most products with :math:`F`.
        generator
            Of the vectors to begin with, as for :meth:`trace`.

        Raises
        ------
        ValueError
            If there are fewer parameters than ``k``.

        Warns
        -----
        RuntimeWarning
            If a residual is larger than it should be.
        """
        check_whole(k=k, max_products=max_products)
        if k > (size := self._size):
            raise ValueError(f"k={k}, but {size} parameters have {size} eigenvalues")
        generator = random_source(generator, self.device)
        columns = min(k + 2, size), size
        start = torch.randn(columns, generator=generator, dtype=self.dtype, device=self.device)
        tolerance = self._tolerance(tolerance)
        found = top_eigenvalues(self.__matmul__, start.mT, k, tolerance, max_products)
        _warn(found, tolerance, "a larger tolerance")
        return found.value

    def _probes(self, n_probes: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        check_whole(n_probes=n_probes)
        if n_probes < 2:
            raise ValueError("a standard error takes n_probes=2 at least, got 1")
        generator = random_source(generator, self.device)
        like = torch.empty(self._size, dtype=self.dtype, device=self.device)
        return quadratic_probes(self.__matmul__, n_probes, like, generator)

    @property
    @abstractmethod
    def _rounding(self) -> float:
        """Relative rounding error of a product."""

    @property
    def _size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def _flat(self, v: Vector) -> Float[Tensor, " P"]:
        """Return a vector in one row, where products are and in their precision."""
        flat, _ = ravel({name: v[name].detach() for name in self.shapes})
        return flat.to(self.device, self.dtype)

    def _tolerance(self, tolerance: float | None) -> float:
        """Check a tolerance; half of the digits by default."""
        if tolerance is None:
            return float(self._rounding**0.5)
        if not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        return tolerance


def _warn(found: Found, tolerance: float, remedy: str) -> None:
    """Warn the caller of the caller if an iteration has not come to its end."""
    if not found.residual <= tolerance:
        warnings.warn(
            f"after {found.products} products the residual is {found.residual:.1e} instead of "
            f"{tolerance:.1e}; try {remedy}, more max_products, or a model in double precision",
            RuntimeWarning,
            stacklevel=3,
        )
