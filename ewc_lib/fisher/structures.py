r"""What a Fisher information can do, and the forms in which it is kept.

Every form answers the same questions: :meth:`Fisher.diagonal`, ``F @ v``,
:meth:`Fisher.quadratic`, :meth:`Fisher.solve`, :meth:`Fisher.trace`, :meth:`Fisher.logdet`,
:meth:`Fisher.to_dense`, ``F + G``, ``2 * F``, :meth:`Fisher.to`, :meth:`Fisher.state_dict`.
Vectors are dicts of tensors with the names and shapes of the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import ravel, unravel

Vector: TypeAlias = dict[str, Tensor]
"""One tensor for each parameter, by name."""


class ReportRow(NamedTuple):
    """How the Fisher information of one parameter was computed, and how much of it there is."""

    parameter: str
    path: str
    share: float


@dataclass(frozen=True, eq=False)
class Fisher(ABC):
    """A Fisher information, the mean over observations.

    Attributes
    ----------
    n_samples
        Number of observations it is the mean of; ``n_samples * F`` is the information in all.
    kind
        ``"exact"``, ``"sketch"``, ``"sampled"`` or ``"empirical"``.
    paths
        How each parameter was computed: ``"rule"``, ``"generic"``, ``"loop"`` or ``"unused"``.
    """

    n_samples: int
    kind: str
    paths: dict[str, str]

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""

    @abstractmethod
    def diagonal(self) -> Vector:
        """Return the diagonal, in the shapes of the parameters."""

    @abstractmethod
    def __matmul__(self, v: Vector) -> Vector:
        """Return the product with a vector."""

    @abstractmethod
    def solve(self, v: Vector, damping: float = 0.0) -> Vector:
        r"""Return :math:`(F + \text{damping} \cdot I)^{-1} v`.

        Without damping, directions of zero information are left out: the pseudo-inverse.
        """

    @abstractmethod
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        r"""Return :math:`\log\det(F + \text{damping} \cdot I)`; minus infinity if singular."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return the whole matrix, parameters in the order of :attr:`shapes`."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move or convert all tensors."""

    @abstractmethod
    def _plus(self, other: Self) -> Self: ...

    @abstractmethod
    def _times(self, factor: float) -> Self: ...

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    @abstractmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self: ...

    def quadratic(self, v: Vector) -> Float[Tensor, ""]:
        r"""Return :math:`v^\top F v`, differentiable in ``v``."""
        product = self @ v
        return torch.stack([(v[name] * product[name]).sum() for name in product]).sum()

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def report(self) -> list[ReportRow]:
        """Return, for each parameter, the path taken and its share of the trace."""
        trace = float(self.trace())
        return [
            ReportRow(name, self.paths[name], float(d.sum()) / trace if trace else 0.0)
            for name, d in self.diagonal().items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as plain tensors, which ``torch.save`` and safetensors can store."""
        return {
            "structure": _encode(type(self).__name__),
            "kind": _encode(self.kind),
            "n_samples": torch.tensor(self.n_samples),
            "parameters": _encode("\n".join(self.shapes)),  # in order, which files do not keep
            **{f"path.{name}": _encode(path) for name, path in self.paths.items()},
            **{key: tensor.clone().contiguous() for key, tensor in self._tensors().items()},
        }

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> Fisher:
        """Rebuild what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If the state is not that of a Fisher information.
        """
        missing = {"structure", "kind", "n_samples", "parameters"} - state.keys()
        if missing:
            raise ValueError(f"this is not the state of a Fisher: it has no {sorted(missing)}")
        by_name: dict[str, type[Fisher]] = {"Diagonal": Diagonal, "Dense": Dense}
        structure = _decode(state["structure"])
        if structure not in by_name:
            raise ValueError(f"unknown structure {structure!r} in the state of a Fisher")
        names = _decode(state["parameters"]).split("\n")
        try:
            paths = {name: _decode(state[f"path.{name}"]) for name in names}
            return by_name[structure]._from_tensors(
                state, int(state["n_samples"]), _decode(state["kind"]), paths
            )
        except KeyError as error:
            raise ValueError(f"the state of a Fisher has no {error}") from None

    def __add__(self, other: Self) -> Self:
        """Add two Fisher informations of the same parameters, kind and structure."""
        if type(other) is not type(self):
            return NotImplemented
        if other.kind != self.kind:
            raise ValueError(f"cannot add a Fisher of kind {other.kind!r} to one of {self.kind!r}")
        check_shapes(self.shapes, other.shapes)
        return replace(self._plus(other), n_samples=self.n_samples + other.n_samples)

    def __mul__(self, factor: float) -> Self:
        """Scale by a number."""
        return self._times(factor)

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Diagonal(Fisher):
    """Only the diagonal; everything off it is taken as zero.

    Attributes
    ----------
    values
        One tensor for each parameter, of its shape.
    """

    values: Vector

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.values.items()}

    def diagonal(self) -> Vector:
        return dict(self.values)

    def __matmul__(self, v: Vector) -> Vector:
        check_shapes(self.shapes, {name: t.shape for name, t in v.items()})
        return {name: value * v[name] for name, value in self.values.items()}

    def solve(self, v: Vector, damping: float = 0.0) -> Vector:
        check_shapes(self.shapes, {name: t.shape for name, t in v.items()})
        damped = {name: value + damping for name, value in self.values.items()}
        return {name: torch.where(d > 0, v[name] / d, 0.0) for name, d in damped.items()}

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        return torch.stack([(d + damping).log().sum() for d in self.values.values()]).sum()

    def to_dense(self) -> Float[Tensor, "P P"]:
        return ravel(self.values)[0].diag()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        moved = {name: d.to(device=device, dtype=dtype) for name, d in self.values.items()}
        return replace(self, values=moved)

    def _plus(self, other: Self) -> Self:
        return replace(self, values={k: d + other.values[k] for k, d in self.values.items()})

    def _times(self, factor: float) -> Self:
        return replace(self, values={name: factor * d for name, d in self.values.items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f"diagonal.{name}": d for name, d in self.values.items()}

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        values = {name: state[f"diagonal.{name}"].clone() for name in paths}
        return cls(n_samples, kind, paths, values)


@dataclass(frozen=True, eq=False)
class Dense(Fisher):
    """The whole matrix: exact, and only for small models.

    Attributes
    ----------
    matrix
        ``[P, P]``, parameters in the order of ``parameter_shapes``.
    parameter_shapes
        Shapes of the parameters, by name.
    """

    matrix: Float[Tensor, "P P"]
    parameter_shapes: dict[str, torch.Size]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.parameter_shapes

    def diagonal(self) -> Vector:
        return unravel(self.matrix.diagonal(), self.shapes)

    def __matmul__(self, v: Vector) -> Vector:
        return unravel(self.matrix @ self._flat(v), self.shapes)

    def solve(self, v: Vector, damping: float = 0.0) -> Vector:
        values, directions = torch.linalg.eigh(self.matrix)
        damped = _without_rounding(values) + damping
        along = torch.where(damped > 0, directions.mT @ self._flat(v) / damped, 0.0)
        return unravel(directions @ along, self.shapes)

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        damped = _without_rounding(torch.linalg.eigvalsh(self.matrix)) + damping
        return damped.log().sum()

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self.matrix

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return replace(self, matrix=self.matrix.to(device=device, dtype=dtype))

    def _flat(self, v: Vector) -> Float[Tensor, " P"]:
        check_shapes(self.shapes, {name: t.shape for name, t in v.items()})
        return torch.cat([v[name].reshape(-1) for name in self.shapes])

    def _plus(self, other: Self) -> Self:
        if list(self.shapes) != list(other.shapes):
            raise ValueError("cannot add matrices whose parameters are in another order")
        return replace(self, matrix=self.matrix + other.matrix)

    def _times(self, factor: float) -> Self:
        return replace(self, matrix=factor * self.matrix)

    def _tensors(self) -> dict[str, Tensor]:
        shapes = {f"shape.{name}": torch.tensor(tuple(s)) for name, s in self.shapes.items()}
        return {"matrix": self.matrix, **shapes}

    @classmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self:
        shapes = {name: torch.Size(state[f"shape.{name}"].tolist()) for name in paths}
        return cls(n_samples, kind, paths, state["matrix"].clone(), shapes)


def _without_rounding(eigenvalues: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Set those to zero that are no larger than the rounding error of a zero."""
    largest = eigenvalues.abs().max()
    floor = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * largest
    return eigenvalues.where(eigenvalues > floor, 0.0)


def check_shapes(expected: dict[str, torch.Size], given: dict[str, torch.Size]) -> None:
    """Raise a ValueError that lists every name or shape that differs."""
    problems = [f"{name!r} is missing" for name in expected if name not in given]
    problems += [f"{name!r} is not expected" for name in given if name not in expected]
    problems += [
        f"{name!r} has shape {tuple(given[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise ValueError("parameters do not match: " + "; ".join(problems))


def _encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _decode(codes: Tensor) -> str:
    return bytes(codes.tolist()).decode()
