r"""The parameters of one layer, through the sizes of its outputs and inputs only.

The weight of a linear map or of a convolution, reshaped to :math:`[O, I]`, and its bias as one
more column (the weight of a constant input 1) are one matrix :math:`V`. The gradient of one
output column is :math:`G = g a^\top`, summed over positions. A grouped convolution is one such
matrix for each group of channels, and nothing is kept between groups. All tensors of such a layer
have the groups as an axis in front.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_lib._parameters import Vector
from ewc_lib.fisher.structures.base import NotKept
from ewc_lib.fisher.structures.dense import Dense
from ewc_lib.fisher.structures.spectral import Spectral, without_rounding
from ewc_lib.fisher.structures.vectors import leading


def matrix_size(shape: torch.Size, groups: int, transposed: bool) -> tuple[int, int]:
    """Return the outputs and inputs that the weight of a layer has in each group."""
    rows, columns = shape[0] // groups, shape[1:].numel()
    return (columns, rows) if transposed else (rows, columns)


class Layer(Spectral):
    """A matrix over one weight and perhaps its bias, whose eigenvectors are products."""

    transposed: bool

    def __post_init__(self) -> None:
        (weight, shape), *biases = self.parameter_shapes.items()
        groups = self.size[:-2]
        outputs, inputs = matrix_size(shape, groups.numel(), self.transposed)
        expected = (*groups, outputs, inputs + len(biases))
        bias = (groups.numel() * outputs,)
        if len(biases) > 1 or any(s != bias for _, s in biases):
            raise ValueError(f"one bias of shape {bias} at most, got {dict(biases)}")
        if self.size != expected:
            size = tuple(self.size)
            raise ValueError(f"the factors of {weight!r} are of {size} instead of {expected}")
        if len({getattr(self, name).shape[:-2] for name in self._TENSORS}) > 1:
            raise ValueError(f"the factors of {weight!r} are of different numbers of groups")

    @property
    @abstractmethod
    def size(self) -> torch.Size:
        """Outputs O and inputs I, the constant 1 of the bias among them; groups in front."""

    @property
    @abstractmethod
    def bases(self) -> tuple[Float[Tensor, "*groups O O"], Float[Tensor, "*groups I I"]]:
        """Eigenvectors of the output side and of the input side, in columns."""

    def _pack(self, v: Vector) -> Float[Tensor, "*groups O I"]:
        weight, *biases = (v[name] for name in self.shapes)
        *groups, outputs, inputs = self.size
        inputs -= len(biases)
        if self.transposed:
            matrix = weight.reshape(*groups, inputs, outputs).mT
        else:
            matrix = weight.reshape(*groups, outputs, inputs)
        return torch.cat([matrix, *(bias.reshape(*groups, outputs, 1) for bias in biases)], -1)

    def _unpack(self, x: Float[Tensor, "*groups O I"]) -> Vector:
        (weight, shape), *biases = self.shapes.items()
        matrix = x[..., : x.shape[-1] - len(biases)]
        matrix = matrix.mT if self.transposed else matrix
        return {weight: matrix.reshape(shape)} | {name: x[..., -1].reshape(s) for name, s in biases}

    def _to_basis(self, x: Float[Tensor, "*groups O I"]) -> Float[Tensor, "*groups O I"]:
        outputs, inputs = self.bases
        return outputs.mT @ x @ inputs

    def _from_basis(self, x: Float[Tensor, "*groups O I"]) -> Float[Tensor, "*groups O I"]:
        outputs, inputs = self.bases
        return outputs @ x @ inputs.mT

    def _places(self, shapes: dict[str, torch.Size]) -> tuple[Tensor, Tensor, torch.Size]:
        """Return where outputs and inputs are in a layer that has grown, and its size."""
        (weight, old), *biases = self.shapes.items()
        new, groups = shapes[weight], self.size[:-2].numel()
        if groups > 1 and new[0] != old[0]:
            raise NotKept(
                f"{weight!r} has grown from {tuple(old)} to {tuple(new)}, and with it which "
                f"channels share one of its {groups} pairs of factors: forget it, or choose a "
                "structure such as 'diagonal'"
            )
        first = torch.arange(old[0] // groups)
        rest = torch.arange(new[1:].numel()).reshape(new[1:])[leading(old[1:])].reshape(-1)
        rows, columns = (rest, first) if self.transposed else (first, rest)
        outputs, inputs = matrix_size(new, groups, self.transposed)
        if biases:
            columns = torch.cat([columns, torch.tensor([inputs])])
        size = torch.Size([*self.size[:-2], outputs, inputs + len(shapes) - 1])
        return rows.to(self.device), columns.to(self.device), size

    def _of_bias(self, matrices: Float[Tensor, "*groups O O"], scale: float) -> Dense:
        """Return the block of the bias alone."""
        _, (bias, shape) = self.shapes.items()
        matrix = scale**2 * torch.block_diag(*matrices.reshape(-1, *matrices.shape[-2:]))
        about = self.n_samples, self.kind, self._paths_of([bias])
        return Dense(*about, matrix, {bias: shape}, tolerance=self.tolerance)

    def _in_order(self, matrices: Float[Tensor, "*groups OI OI"]) -> Float[Tensor, "P P"]:
        """Bring rows and columns from the order of :meth:`_pack` to that of the shapes."""
        matrix: Tensor = torch.block_diag(*matrices.reshape(-1, *matrices.shape[-2:]))
        place = self._unpack(torch.arange(len(matrix), device=matrix.device).reshape(self.size))
        order = torch.cat([place[name].reshape(-1) for name in self.shapes])
        return matrix[order[:, None], order]

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {"transposed": torch.tensor(self.transposed)}

    @classmethod
    def _read(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        return super()._read(state) | {"transposed": bool(state["transposed"])}

    def _check_like(self, other: Self) -> None:
        super()._check_like(other)
        if self.transposed != other.transposed:
            raise ValueError("cannot add weights of which one is transposed and one is not")
        if self.size != other.size:
            raise ValueError("cannot add weights with different numbers of groups")


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(Layer):
    r"""Two small factors for one layer, as if outputs and inputs were independent (KFAC).

    .. math:: F \approx B \otimes A, \qquad F v = B V A

    with :math:`B` from the gradients :math:`g` at the outputs of the layer and :math:`A` from
    its inputs :math:`a` (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions;
    Eschenhagen et al. 2023 for weights shared over positions). A grouped convolution has one pair
    for each group of channels, ``[groups, O, O]`` and ``[groups, I, I]``.

    A transposed convolution is a matrix from the ``I`` input channels of a group, at each
    *input* position, to the window of outputs that this position reaches, ``O`` output channels
    times kernel entries. The bias is added to every output once, however many windows reach it:
    it is not in the block, unless the windows are the single positions.

    :meth:`solve` and :meth:`logdet` are exact for :math:`B \otimes A + \delta I`, by the
    eigenvectors of both factors; the damping is *not* split between them, as optimisers do.
    :meth:`pool` averages the factors one by one, as one run over all data would. ``F + G`` is
    refused: the sum of two Kronecker products is none.

    Attributes
    ----------
    output_factor : Tensor
        :math:`B`, ``[O, O]``: mean over observations of the sum over output columns and
        positions of :math:`g g^\top`.
    input_factor : Tensor
        :math:`A`, ``[I, I]``: mean over observations, and over the positions of each, of
        :math:`a a^\top`. With a bias in the block, the constant input 1 is the last.
    parameter_shapes
        Name and shape of the weight, then of the bias if it is in the block.
    transposed
        Whether the weight is stored ``[I, O]``, as ``torch.addmm`` and transposed convolutions
        take it.

    Raises
    ------
    ValueError
        If the sizes of the factors are not those of the parameters.

    Examples
    --------
    >>> import torch
    >>> shapes = {"weight": torch.Size([2, 3]), "bias": torch.Size([2])}
    >>> B, A = torch.eye(2), 2 * torch.eye(4)
    >>> F = Kronecker(10, "exact", dict.fromkeys(shapes, "rule"), B, A, shapes)
    >>> F.trace()  # tr A tr B
    tensor(16.)
    >>> F.solve({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, damping=2.0)["bias"]
    tensor([0.2500, 0.2500])
    """

    output_factor: Float[Tensor, "*groups O O"]
    input_factor: Float[Tensor, "*groups I I"]
    parameter_shapes: dict[str, torch.Size]
    transposed: bool = False

    _TENSORS = ("output_factor", "input_factor")

    @property
    def size(self) -> torch.Size:
        return torch.Size([*self.output_factor.shape[:-1], self.input_factor.shape[-1]])

    def diagonal(self) -> Vector:
        factors = self.output_factor, self.input_factor
        return self._unpack(_outer(*(factor.diagonal(dim1=-2, dim2=-1) for factor in factors)))

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self._in_order(kron(self.output_factor, self.input_factor))

    @cached_property
    def _eigen(self) -> tuple[Any, Any]:
        return torch.linalg.eigh(self.output_factor), torch.linalg.eigh(self.input_factor)

    @property
    def bases(self) -> tuple[Float[Tensor, "*groups O O"], Float[Tensor, "*groups I I"]]:
        outputs, inputs = self._eigen
        return outputs.eigenvectors.contiguous(), inputs.eigenvectors.contiguous()

    @property
    def _spectrum(self) -> Float[Tensor, "*groups O I"]:
        return _outer(*(without_rounding(factor.eigenvalues) for factor in self._eigen))

    def _product(self, v: Vector) -> Vector:
        return self._unpack(self.output_factor @ self._packed(v) @ self.input_factor)

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        if list(shapes.items()) == list(self.shapes.items()):
            return self
        rows, columns, size = self._places(shapes)
        outputs = _placed(self.output_factor, rows, rows, size[-2], size[-2])
        inputs = _placed(self.input_factor, columns, columns, size[-1], size[-1])
        return self._over(shapes, output_factor=outputs, input_factor=inputs)

    def _congruent(self, scales: Mapping[str, float]) -> Self | Dense:
        weight, *biases = self.shapes
        if weight not in scales:
            constant = self.input_factor[..., -1:, -1:]
            return self._of_bias(self.output_factor * constant, scales[biases[0]])
        kept = {name: shape for name, shape in self.shapes.items() if name in scales}
        numbers = torch.tensor([scales[name] for name in kept], dtype=torch.float64)
        widths = [self.size[-1] - len(biases), 1][: len(kept)]
        factor = numbers.repeat_interleave(torch.tensor(widths)).to(self.input_factor)
        n = len(factor)
        inputs = factor[:, None] * self.input_factor[..., :n, :n] * factor
        return self._over(kept, input_factor=inputs)

    def _times(self, factor: float) -> Self:
        return replace(self, output_factor=factor * self.output_factor)

    def _plus(self, other: Self) -> Self:
        raise TypeError(
            "the sum or difference of two Kronecker products is not a Kronecker product; for the "
            "information of the data of both together use F.pool(G)"
        )

    def _pooled(self, other: Self, weight: float) -> Self:
        return replace(
            self,
            output_factor=weight * self.output_factor + (1 - weight) * other.output_factor,
            input_factor=weight * self.input_factor + (1 - weight) * other.input_factor,
        )


@dataclass(frozen=True, eq=False, repr=False)
class EigenKronecker(Layer):
    r"""The second moments of one layer's gradients in a Kronecker product's eigenvectors (EKFAC).

    .. math:: F \approx (U_B \otimes U_A) \, \mathrm{diag}(S) \, (U_B \otimes U_A)^\top,
              \qquad S = \frac1N \sum_n \sum_k (U_B^\top G_{nk} U_A)^2

    Of all matrices with these eigenvectors it is the closest to the Fisher information
    (George et al. 2018). ``F + G`` and :meth:`pool` need the same eigenvectors, bit by bit:
    choose them once, then take the moments of all data in them. Groups and transposed
    convolutions are as in :class:`Kronecker`.

    Attributes
    ----------
    second_moments : Tensor
        :math:`S`, ``[O, I]``: mean over observations, sum over output columns.
    output_basis : Tensor
        :math:`U_B`, ``[O, O]``, orthonormal columns, as in :attr:`Kronecker.bases`.
    input_basis : Tensor
        :math:`U_A`, ``[I, I]``, orthonormal columns.
    parameter_shapes
        Name and shape of the weight, then of the bias if it is in the block.
    transposed
        Whether the weight is stored ``[I, O]``, as ``torch.addmm`` and transposed convolutions
        take it.

    Raises
    ------
    ValueError
        If the sizes of the moments are not those of the parameters.

    Examples
    --------
    >>> import torch
    >>> shapes = {"weight": torch.Size([2, 3])}
    >>> S = torch.arange(6.0).reshape(2, 3)
    >>> bases = torch.eye(2), torch.eye(3)
    >>> F = EigenKronecker(10, "exact", {"weight": "rule"}, S, *bases, shapes)
    >>> F.diagonal()["weight"]
    tensor([[0., 1., 2.],
            [3., 4., 5.]])
    """

    second_moments: Float[Tensor, "*groups O I"]
    output_basis: Float[Tensor, "*groups O O"]
    input_basis: Float[Tensor, "*groups I I"]
    parameter_shapes: dict[str, torch.Size]
    transposed: bool = False

    _TENSORS = ("second_moments", "output_basis", "input_basis")

    @property
    def size(self) -> torch.Size:
        return self.second_moments.shape

    @property
    def bases(self) -> tuple[Float[Tensor, "*groups O O"], Float[Tensor, "*groups I I"]]:
        return self.output_basis, self.input_basis

    @property
    def _spectrum(self) -> Float[Tensor, "*groups O I"]:
        return without_rounding(self.second_moments, axes=(-2, -1))

    def diagonal(self) -> Vector:
        outputs, inputs = (basis.square() for basis in self.bases)
        return self._unpack(outputs @ self.second_moments @ inputs.mT)

    def to_dense(self) -> Float[Tensor, "P P"]:
        basis = kron(*self.bases)
        return self._in_order(basis * self.second_moments.flatten(-2).unsqueeze(-2) @ basis.mT)

    def _product(self, v: Vector) -> Vector:
        return self._in_basis(v, lambda along: self.second_moments * along)

    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        if list(shapes.items()) == list(self.shapes.items()):
            return self
        rows, columns, size = self._places(shapes)
        return self._over(
            shapes,
            second_moments=_placed(self.second_moments, rows, columns, size[-2], size[-1]),
            output_basis=_completed(self.output_basis, rows, size[-2]),
            input_basis=_completed(self.input_basis, columns, size[-1]),
        )

    def _congruent(self, scales: Mapping[str, float]) -> Self | Dense:
        weight, *biases = self.shapes
        if weight not in scales:
            moments = self.second_moments @ self.input_basis[..., -1, :, None].square()
            matrices = self.output_basis * moments.mT @ self.output_basis.mT
            return self._of_bias(matrices, scales[biases[0]])
        if any(scales.get(bias) != scales[weight] for bias in biases):
            raise NotKept(
                f"{weight!r} and {biases[0]!r} share their eigenvectors, and the part of one "
                "has others: take both, or choose structure='kronecker'"
            )
        return scales[weight] ** 2 * self

    def _times(self, factor: float) -> Self:
        return replace(self, second_moments=factor * self.second_moments)

    def _plus(self, other: Self) -> Self:
        return replace(self, second_moments=self.second_moments + other.second_moments)

    def _check_like(self, other: Self) -> None:
        super()._check_like(other)
        if not all(map(torch.equal, self.bases, other.bases)):
            raise ValueError(
                f"cannot add second moments of {next(iter(self.shapes))!r} in different "
                "eigenvectors: take those of all data in the same ones"
            )


def kron(
    B: Float[Tensor, "*groups O O"], A: Float[Tensor, "*groups I I"]
) -> Float[Tensor, "*groups OI OI"]:
    """Return the Kronecker product, that of each group."""
    return torch.einsum("...op,...ij->...oipj", B, A).flatten(-4, -3).flatten(-2)


def _placed(values: Tensor, rows: Tensor, columns: Tensor, *size: int) -> Tensor:
    """Return matrices in larger ones of zeros."""
    larger = values.new_zeros(*values.shape[:-2], *size)
    larger[..., rows[:, None], columns] = values
    return larger


def _completed(basis: Tensor, places: Tensor, size: int) -> Tensor:
    """Return bases with a unit vector for each coordinate that is new."""
    larger = torch.eye(size, dtype=basis.dtype, device=basis.device)
    larger = larger.repeat(*basis.shape[:-2], 1, 1)
    larger[..., places[:, None], places] = basis
    return larger


def _outer(x: Float[Tensor, "*groups O"], y: Float[Tensor, "*groups I"]) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)
