r"""The Fisher information of any distribution of :mod:`torch.distributions`.

.. math:: H = \nabla_g^2 \, \mathrm{KL}(p_f \,\|\, p_g) \big|_{g = f}

The second derivative of the Kullback-Leibler divergence is the Fisher information, so two
derivatives by autograd give it wherever the divergence is known.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, StudentT, constraints
from torch.distributions.kl import _KL_REGISTRY, kl_divergence

from ewc_lib.likelihood.any_distribution import TorchDistribution
from ewc_lib.likelihood.base import per_observation_sum

__all__ = ["information"]

MAX_ENTRIES = 1024
"""Larger matrices of one position are refused."""

MAX_TERMS = 2**24
"""Log-probabilities in a sum over the support, for all positions of a batch together."""

Information = tuple[tuple[str, ...], Float[Tensor, "*batch P P"]]


@singledispatch
def information(distribution: Distribution) -> Information:
    """Return the Fisher information in the distribution's own parameters, in closed form.

    Most families need none: their Kullback-Leibler divergence is known to PyTorch, or their
    support is summed over, all of it if it is finite and all but a part of ``1e-10`` if it is
    0, 1, 2, ... Register a function for a family that has neither.

    Parameters
    ----------
    distribution
        One distribution for each position. The function is chosen by its type.

    Returns
    -------
    names : tuple of str
        The attributes that hold the parameters, each of the shape ``batch_shape``.
    matrix : Tensor
        ``[*batch_shape, P, P]``, in the order of the names.

    Examples
    --------
    >>> import torch
    >>> from torch.distributions import StudentT
    >>> names, matrix = information(StudentT(torch.tensor(3.0), 0.0, 2.0))
    >>> names, matrix[1, 1]  # (3 + 1) / (3 + 3) / 2²
    (('df', 'loc', 'scale'), tensor(0.1667))

    >>> class Logistic(torch.distributions.Distribution):
    ...     arg_constraints = {}
    ...     def __init__(self, loc):
    ...         self.loc = loc
    ...         super().__init__(loc.shape)
    >>> @information.register(Logistic)
    ... def _(distribution):
    ...     return ("loc",), torch.full_like(distribution.loc, 1 / 3)[..., None, None]
    """
    raise NotImplementedError


@information.register
def _(distribution: StudentT) -> Information:
    df, scale = distribution.df, distribution.scale
    of_df = (torch.polygamma(1, df / 2) - torch.polygamma(1, (df + 1) / 2)) / 4
    of_df = of_df - (df + 5) / (2 * df * (df + 1) * (df + 3))
    both = -2 / (scale * (df + 1) * (df + 3))
    none = torch.zeros_like(df)
    rows = [
        [of_df, none, both],
        [none, (df + 1) / ((df + 3) * scale.square()), none],
        [both, none, 2 * df / ((df + 3) * scale.square())],
    ]
    return ("df", "loc", "scale"), torch.stack([torch.stack(row, -1) for row in rows], -2)


@information.register
def _(distribution: Laplace) -> Information:
    # the divergence has a kink where the locations meet, whose derivative autograd takes for 0
    both = distribution.scale.pow(-2)
    return ("loc", "scale"), torch.stack([both, both], -1).diag_embed()


def divergence(p: Distribution, q: Distribution, device: torch.device) -> Float[Tensor, " *batch"]:
    """Return a function of ``q`` with the second derivative of the divergence at ``q = p``."""
    if isinstance(p, Independent) and isinstance(q, Independent):
        inner = divergence(p.base_dist, q.base_dist, device)
        n_batch = inner.dim() - p.reinterpreted_batch_ndims
        return inner.reshape(*inner.shape[:n_batch], -1).sum(-1)
    if any(_is_about(family, p) for family in information.registry.keys() - {object}):
        names, matrix = information(p)
        step = torch.stack([getattr(q, name) - getattr(p, name) for name in names], -1)
        return torch.einsum("...i,...ij,...j->...", step, matrix, step) / 2
    try:
        if any(_is_about(family, p) for family, _ in _KL_REGISTRY):
            return kl_divergence(p, q)
    except NotImplementedError:  # for these parameters
        pass
    values = _support(p, device)
    weights = p.log_prob(values).exp()
    return -torch.where(weights > 0, weights * q.log_prob(values), 0).sum(0)


def _is_about(family: type, p: Distribution) -> bool:
    """Tell whether what holds for a family holds for ``p``: no class below has another density."""
    if not isinstance(p, family):
        return False
    owner = next(kind for kind in type(p).__mro__ if "log_prob" in vars(kind))
    return issubclass(family, owner) or owner.__module__.startswith("torch.distributions.")


def _support(p: Distribution, device: torch.device) -> Tensor:
    """List the values, ``[K, *batch, *event]``, of all but a negligible part of a distribution."""
    try:
        if p.has_enumerate_support:
            return p.enumerate_support()
        support = getattr(p.support, "base_constraint", p.support)  # that of a mixture's parts
    except NotImplementedError:
        support = None
    counts = isinstance(support, type(constraints.nonnegative_integer))
    if not counts or p.event_shape or getattr(support, "lower_bound", None) != 0:
        raise TypeError(
            f"no root of the Fisher information is known for a {type(p).__name__}: its "
            "Kullback-Leibler divergence has no closed form in PyTorch and its support cannot "
            "be summed over. Choose kind='sampled' or 'empirical', or register its Fisher "
            "information by ewc_lib.fisher.divergence.information.register"
        )
    k = 64
    while k * p.batch_shape.numel() <= MAX_TERMS:
        values = torch.arange(k, dtype=torch.float64, device=device)
        values = values.reshape(-1, *[1] * len(p.batch_shape)).expand(k, *p.batch_shape)
        if (p.log_prob(values).exp().sum(0) > 1 - 1e-10).all():
            return values
        k *= 2
    raise ValueError(
        f"a {type(p).__name__} has too large a part beyond {k // 2}, so the sum over its values "
        "would be too long; choose kind='sampled'"
    )


class Curvature:
    """The second derivative of the divergence at one batch of outputs, in double precision."""

    def __init__(self, distribution: TorchDistribution, output: Float[Tensor, "N ..."]) -> None:
        self.output = output.detach().double().requires_grad_()
        self._make = distribution.of
        self._at = distribution.of(self.output.detach())
        with torch.enable_grad():
            self._divergence = self._from(self.output)
            total = self._divergence.sum() + 0 * self.output.sum()  # it may not depend on it
            (slope,) = torch.autograd.grad(total, self.output, create_graph=True)
        self._slope = slope
        self._check_smooth()

    def times(self, v: Tensor) -> Tensor:
        """Multiply by a vector with one entry for each entry of the output."""
        if not self._slope.requires_grad:
            return torch.zeros_like(self._slope)
        (found,) = torch.autograd.grad(
            self._slope,
            self.output,
            v.double(),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return found

    def root(self) -> Float[Tensor, "N *positions E E"]:
        """Return a root of the matrix of each position; one position if they are not separate."""
        values, vectors = torch.linalg.eigh(self._matrices())
        largest = values.abs().amax(-1, keepdim=True)
        if (bad := (values < -1e-8 * largest).reshape(len(values), -1).any(1)).any():
            raise ValueError(self._named(bad, "is not positive semi-definite"))
        root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return root

    def _matrices(self) -> Tensor:
        shape, positions = self.output.shape, self._divergence.shape[1:]
        probe = _signs(self.output)
        expected = self.times(probe)
        separate = shape[1 : 1 + len(positions)] == positions
        for where in [positions, torch.Size()] if separate else [torch.Size()]:
            n_entries = shape[1 + len(where) :].numel()
            if n_entries > MAX_ENTRIES:
                raise ValueError(
                    f"a distribution of {n_entries} outputs that are not separate has too large "
                    "a Fisher information; choose kind='sampled', or MatrixFree"
                )
            cut = (shape[0], *where, n_entries)
            unit = torch.eye(n_entries, dtype=torch.float64, device=self.output.device)
            rows = [self.times(e.expand(cut).reshape(shape)).reshape(cut) for e in unit]
            matrices = torch.stack(rows, -1)
            found = (matrices @ probe.reshape(*cut, 1)).reshape(shape)
            if torch.allclose(found, expected, rtol=1e-6, atol=1e-9 * _largest(matrices)):
                return (matrices + matrices.mT) / 2
        raise ValueError("the function that makes the distribution mixes observations")

    def _from(self, output: Tensor) -> Tensor:
        found = divergence(self._at, self._make(output), output.device)
        if found.shape[:1] != output.shape[:1]:
            raise ValueError(
                "batch_shape of the distribution must begin with the number of observations, "
                f"{len(output)}, got {tuple(found.shape)}"
            )
        return found

    def _check_smooth(self) -> None:
        """Compare with differences along one direction: a kink has other ones."""
        size = self.output.detach().abs()
        size = torch.where(size > 0, size, 1.0)
        bad = self._differs(1e-3 * size)
        if bad.any():  # one step is not the right one for all families
            bad &= self._differs(1e-3 * size.clamp_max(10))
        if bad.any():
            raise ValueError(
                self._named(
                    bad,
                    "is not the one that autograd finds (it has a kink, the support moves, or "
                    "the function mixes observations)",
                )
            )

    def _differs(self, size: Tensor) -> Tensor:
        """Mark the observations whose second difference is not the second derivative."""
        v = size * _signs(size)
        told = per_observation_sum(v * self.times(v))
        try:
            with torch.no_grad():
                ends = self._from(self.output + v) + self._from(self.output - v)
        except (NotImplementedError, TypeError, ValueError):
            return torch.ones_like(told, dtype=torch.bool)
        seen = per_observation_sum(ends - 2 * self._divergence.detach())
        largest = torch.maximum(seen.abs(), told.abs())
        return ~seen.isfinite() | ((seen - told).abs() > 0.05 * largest + 1e-12)

    def _named(self, bad: Tensor, what: str) -> str:
        return (
            f"the second derivative of the divergence of a {type(self._at).__name__} {what} at "
            f"observation {int(bad.nonzero()[0])} of the batch. Choose kind='sampled' or "
            "'empirical', or register its Fisher information by "
            "ewc_lib.fisher.divergence.information.register"
        )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _signs(like: Tensor) -> Tensor:
    """Random signs, the same for every observation, so that the batch size does not matter."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, like.shape[1:], generator=generator) - 1
    return signs.to(like).expand_as(like)
