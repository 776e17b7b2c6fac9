"""What every Fisher information can do, whatever the form in which it is kept."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib import files
from ewc_lib._arguments import check_damping, is_number
from ewc_lib._foreach import inner
from ewc_lib._identity import names_in
from ewc_lib._names import plain_names
from ewc_lib._parameters import Vector
from ewc_lib._sharded import total, whole
from ewc_lib.fisher.structures.states import decode, encode
from ewc_lib.fisher.structures.vectors import V, check_shapes, in_form_of, named

Join: TypeAlias = Callable[[Any, Any], Any]
"""How two Fisher informations of the same parameters become one: their sum, or pooled."""

PATHS = ("unused", "rule", "generic", "loop")
"""How a parameter can be computed; where several apply, the last is the one that is told."""


class NotKept(ValueError):  # noqa: N818
    """A structure cannot hold a part of what it holds."""


class ReportRow(NamedTuple):
    """How the Fisher information of one parameter was computed, and what there is of it.

    Attributes
    ----------
    parameter
        Name of the parameter.
    path
        How it was computed, as in :attr:`Fisher.paths`.
    keeps
        What is kept of it, as in :attr:`Fisher.keeps`.
    share
        Its share of the trace.
    """

    parameter: str
    path: str
    keeps: str
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Fisher(ABC):
    """A Fisher information, the mean over observations.

    Attributes
    ----------
    n_samples
        Number of observations it is the mean of; ``n_samples * F`` is the information in all.
    kind
        ``"exact"``, ``"sketch"``, ``"batched"``, ``"sampled"`` or ``"empirical"``; or
        ``"second moments"``, those of an optimizer.
    paths
        How each parameter was computed: ``"rule"``, from the operations that use it;
        ``"generic"``, by differentiating the model for each observation, which is slower;
        ``"loop"``, by running it on one observation after the other, which is slowest; or
        ``"unused"``, if no output depends on it and its information is zero.
    tolerance
        The certificate let a gradient pass if its difference from autograd's was at most this
        share of it: the root of the machine precision of the coarsest operation. 3.5e-4 for
        float32; 0.03 where products may be rounded to TF32, and for float16; 0.09 for bfloat16.
        None if it is not known. Where several are combined, the largest.
    likelihood
        The likelihood that read the outputs, in words: ``"Gaussian(sigma=0.5)"``. None if it is
        not known, or where several were combined.
    """

    n_samples: int
    kind: str
    paths: dict[str, str]
    tolerance: float | None = field(default=None, kw_only=True)
    likelihood: str | None = field(default=None, kw_only=True)

    _by_name: ClassVar[dict[str, type[Fisher]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Fisher._by_name[cls.__name__] = cls

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters, by name."""

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._numbers()[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the numbers; the widest, if that of the parameters differs."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self._numbers()))

    def __repr__(self) -> str:
        size = sum(shape.numel() for shape in self.shapes.values())
        return (
            f"{self._form()}(kind={self.kind!r}, n_samples={self.n_samples}, parameters={size}, "
            f"dtype={self.dtype}, device={str(self.device)!r}"
            + ("" if self.tolerance is None else f", tolerance={self.tolerance:.1e}")
            + ")"
        )

    @property
    def keeps(self) -> dict[str, str]:
        """What is kept of each parameter, by the name of a structure.

        ``"diagonal"``, ``"block"``, ``"dense"``, ``"kronecker"``, ``"eigenkronecker"`` or
        ``"lowrank"``. A block is the whole matrix of the parameter, or of those of its module.
        """
        return dict.fromkeys(self.shapes, type(self).__name__.lower())

    @abstractmethod
    def diagonal(self) -> Vector:
        """Return the diagonal, in the shapes of the parameters."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return the whole matrix, parameters in the order of :attr:`shapes`."""

    def __matmul__(self, v: V) -> V:
        """Return the product with a vector.

        It is a dict of tensors with the names and shapes of the parameters, or one flat tensor
        ``[P]`` with all of them in the order of :attr:`shapes`; the product has the same form.
        """
        return in_form_of(v, self._product(named(v, self.shapes)), self.shapes)

    def quadratic(self, v: Vector | Tensor) -> Float[Tensor, ""]:
        r"""Return :math:`v^\top F v`, differentiable in ``v``, named or flat.

        Of complex entries the squared sizes count.
        """
        v = named(v, self.shapes)
        return inner(self._product(v), v)

    def solve(self, v: V, damping: float = 0.0) -> V:
        r"""Return :math:`(F + \text{damping} \cdot I)^{-1} v`, in the form of ``v``, named or flat.

        Without damping, directions of zero information are left out: the pseudo-inverse.

        Raises
        ------
        ValueError
            If the damping is negative, or if ``v`` does not have the names and shapes of the
            parameters.
        """
        check_damping(damping)
        return in_form_of(v, self._solve(named(v, self.shapes), damping), self.shapes)

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal."""
        return total([d.sum() for d in self.diagonal().values()])

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        r"""Return :math:`\log\det(F + \text{damping} \cdot I)`; minus infinity if singular."""
        check_damping(damping)
        return self._logdet(damping)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move or convert all tensors."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def report(self) -> list[ReportRow]:
        """Return, for each parameter, the path taken, what is kept, and its share of the trace."""
        shares = {name: float(whole(d.sum())) for name, d in self.diagonal().items()}
        trace, keeps = sum(shares.values()), self.keeps
        return [
            ReportRow(name, self.paths[name], keeps[name], share / trace if trace else 0.0)
            for name, share in shares.items()
        ]

    def __add__(self, other: Self) -> Self:
        """Add two Fisher informations of the same parameters, kind and structure."""
        if not isinstance(other, Fisher):
            return NotImplemented
        self._check_like(other)
        return self._over_both(self._plus(other), other)

    def __sub__(self, other: Self) -> Self:
        """Return the difference of two Fisher informations, where the structure can hold it.

        Diagonals, blocks, dense and low-rank matrices can, and eigen-Kronecker factors with the
        same eigenvectors; the difference of two Kronecker products is none, a TypeError. It may
        be indefinite, and is no Fisher information then: :meth:`solve` inverts what is not zero,
        :meth:`logdet` is NaN where a negative eigenvalue is left. ``n_samples`` counts the
        observations of both, as that of a sum.
        """
        if not isinstance(other, Fisher):
            return NotImplemented
        return self + -1 * other

    def __mul__(self, factor: float) -> Self:
        """Scale by a number."""
        if not is_number(factor):
            return NotImplemented
        return self._times(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Divide by a number."""
        if not is_number(divisor):
            return NotImplemented
        return self._times(1 / divisor)

    def pool(self, other: Self) -> Self:
        r"""Return the Fisher information of the data of both together.

        .. math:: \frac{n_F F + n_G G}{n_F + n_G}

        This is the mean over all :math:`n_F + n_G` observations, where ``F + G`` adds the
        matrices themselves. It resumes a computation and merges those of several processes,
        for one model with one set of values of its parameters.

        Parameters
        ----------
        other
            A Fisher information of the same parameters, kind and structure.

        Raises
        ------
        TypeError
            If the structures differ.
        ValueError
            If the kinds, the names, shapes or order of the parameters, or the bases differ.

        Examples
        --------
        >>> import torch
        >>> from ewc_lib import Fisher, fisher_information
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(10, 3), torch.arange(10) % 2
        >>> state = fisher_information(model, (x[:6], y[:6])).state_dict()  # torch.save this
        >>> first, second = Fisher.from_state_dict(state), fisher_information(model, (x[6:], y[6:]))
        >>> F, at_once = first.pool(second), fisher_information(model, (x, y))
        >>> F.n_samples, torch.allclose(F.to_dense(), at_once.to_dense())
        (10, True)
        """
        self._check_like(other)
        weight = self.n_samples / (self.n_samples + other.n_samples)
        return self._over_both(self._pooled(other, weight), other)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as plain tensors, which ``torch.save`` and safetensors can store."""
        return {
            "structure": encode(type(self).__name__),
            "kind": encode(self.kind),
            "n_samples": torch.tensor(self.n_samples),
            "parameters": encode("\n".join(self.shapes)),  # in order, which files do not keep
            **{f"path.{name}": encode(self.paths[name]) for name in self.shapes},
            **({"tolerance": encode(repr(self.tolerance))} if self.tolerance else {}),
            **({"likelihood": encode(self.likelihood)} if self.likelihood else {}),
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
        structure = decode(state["structure"])
        if structure not in Fisher._by_name:
            raise ValueError(f"unknown structure {structure!r} in the state of a Fisher")
        names = decode(state["parameters"]).split("\n")
        try:
            paths = {name: decode(state[f"path.{name}"]) for name in names}
            found = Fisher._by_name[structure]._from_tensors(
                state, int(state["n_samples"]), decode(state["kind"]), paths
            )
        except KeyError as error:
            raise ValueError(f"the state of a Fisher has no {error}") from None
        known = float(decode(state["tolerance"])) if "tolerance" in state else None
        likelihood = decode(state["likelihood"]) if "likelihood" in state else None
        return replace(found, tolerance=known, likelihood=likelihood)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        data: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        """Write a file of safetensors, with a card that says what it is.

        Anybody who loads the same checkpoint can take it from there. Parameters have their names
        without those of wrappers. If the Fisher information is sharded, every process has to call
        this, and the first one writes. :func:`ewc_lib.files.card` reads the card alone.

        Parameters
        ----------
        path
            Of the file; one that is there is replaced when the new one is whole.
        data
            What the data were, in your words: text, or anything that JSON holds.
        model
            The network, with the values at which this was computed. Their hashes go into the card,
            so that :meth:`load` can refuse another one.

        Raises
        ------
        ImportError
            If safetensors is not installed, the extra ``files``.
        ValueError
            If the model has no parameters of these names and shapes, or if ``data`` holds numbers
            that JSON has not.
        TypeError
            If ``data`` is nothing that JSON holds.
        """
        card = files.card_of_fisher(self, data, model)
        files.write(path, self._renamed(plain_names(self.shapes)).state_dict(), card)

    @staticmethod
    def load(
        path: str | os.PathLike[str], model: nn.Module | None = None, *, check_values: bool = True
    ) -> Fisher:
        """Read what :meth:`save` has written, on the processor.

        Parameters
        ----------
        path
            Of the file.
        model
            The network that it is to be used for, at the values at which it was computed: the
            checkpoint before any training. It may be in another precision: a copy in half
            precision passes if it was rounded from what was saved, or what was saved from it. It
            may be wrapped, and have other parameters besides. Names in the result are the model's.
        check_values
            Whether to compare values, or names and shapes only.

        Raises
        ------
        ImportError
            If safetensors is not installed, the extra ``files``.
        ValueError
            If it is no such file, or if the model has other names, shapes or values; the message
            says which.

        Warns
        -----
        RuntimeWarning
            If values cannot be compared, because it was saved without a model.

        Examples
        --------
        >>> import tempfile, torch
        >>> from ewc_lib import EWC, Fisher, fisher_information
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> path = f"{tempfile.mkdtemp()}/fisher.safetensors"
        >>> fisher_information(model, (x, y)).save(path, model=model, data="noise")
        >>> ewc = EWC(model, strength=10.0)
        >>> ewc.remember(Fisher.load(path, model))
        >>> ewc.n_tasks
        1
        """
        state, card = files.read(path, "Fisher")
        found = Fisher.from_state_dict(state)
        return found if model is None else found._renamed(names_in(model, card, path, check_values))

    @abstractmethod
    def _product(self, v: Vector) -> Vector: ...

    @abstractmethod
    def _solve(self, v: Vector, damping: float) -> Vector: ...

    @abstractmethod
    def _logdet(self, damping: float) -> Float[Tensor, ""]: ...

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""

    @abstractmethod
    def _times(self, factor: float) -> Self: ...

    @abstractmethod
    def _plus(self, other: Self) -> Self: ...

    @abstractmethod
    def _renamed(self, names: Mapping[str, str]) -> Self:
        """Give the parameters other names."""

    @abstractmethod
    def _embedded(self, shapes: dict[str, torch.Size]) -> Self:
        """Return the same in a larger space: zero for what is new in it.

        A parameter that is larger there has its old entries first along each axis.
        """

    @abstractmethod
    def _congruent(self, scales: Mapping[str, float]) -> Fisher:
        """Return the block of some parameters, rows and columns of each times a number.

        Raise a :class:`NotKept` if that has another structure.
        """

    def _within(self, names: Iterable[str]) -> Fisher:
        """Return the block of some parameters."""
        kept = dict.fromkeys(names, 1.0)
        return self if kept.keys() == self.shapes.keys() else self._congruent(kept)

    def _united(
        self, other: Self, shapes: dict[str, torch.Size], join: Join = operator.add
    ) -> Self:
        """Join two of which each may hold parameters that the other does not, in this order."""
        found: Self = join(self._embedded(shapes), other._embedded(shapes))
        return found

    def _paths_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the paths of parameters; of those that are not held, nothing was computed."""
        return {name: self.paths.get(name, "unused") for name in names}

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    @abstractmethod
    def _from_tensors(
        cls, state: dict[str, Tensor], n_samples: int, kind: str, paths: dict[str, str]
    ) -> Self: ...

    def _numbers(self) -> list[Tensor]:
        """Return every tensor, in the order in which :meth:`_map` visits them."""
        found: list[Tensor] = []

        def visit(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(visit)
        return found

    def _form(self) -> str:
        """Say in which form it is kept."""
        return type(self).__name__

    def _pooled(self, other: Self, weight: float) -> Self:
        return self._times(weight)._plus(other._times(1 - weight))

    def _check_like(self, other: Self) -> None:
        """Raise an error that names the difference, if these two cannot be combined."""
        self._check_kind(other)
        check_shapes(self.shapes, other.shapes)

    def _check_kind(self, other: Self) -> None:
        if type(other) is not type(self):
            raise TypeError(f"cannot add a {type(other).__name__} to a {type(self).__name__}")
        if other.kind != self.kind:
            raise ValueError(f"cannot add a Fisher of kind {other.kind!r} to one of {self.kind!r}")

    def _over_both(self, combined: Self, other: Self) -> Self:
        ours, theirs = (F._paths_of(combined.shapes) for F in (self, other))
        paths = {name: max(path, theirs[name], key=PATHS.index) for name, path in ours.items()}
        known = [F.tolerance for F in (self, other) if F.tolerance is not None]
        return replace(
            combined,
            n_samples=self.n_samples + other.n_samples,
            paths=paths,
            tolerance=max(known, default=None),
            likelihood=self.likelihood if self.likelihood == other.likelihood else None,
        )
