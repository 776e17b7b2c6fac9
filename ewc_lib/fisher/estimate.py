"""The front door: the Fisher information of any network, at the price of a backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib._batches import Batch, batches
from ewc_lib._model import Selection, check_finite_parameters, forward, select_parameters, untouched
from ewc_lib._progress import progress as show_progress
from ewc_lib.distributions import OutputDistribution, output_distribution
from ewc_lib.fisher.capture import Pulled, Recorder, Use, gradients, squares, sum_dtype
from ewc_lib.fisher.certificate import Challenge, check_alone
from ewc_lib.fisher.generic import GenericPath
from ewc_lib.fisher.output import KINDS, Kind, columns
from ewc_lib.fisher.structures import Dense, Diagonal, Fisher, Vector

Structure: TypeAlias = Literal["diagonal", "dense"]
STRUCTURES: tuple[str, ...] = get_args(Structure)

COLUMNS_AT_ONCE = 16
"""Output columns that the generic path takes with one forward pass."""


def fisher_information(
    model: nn.Module,
    data: Any,
    likelihood: str | OutputDistribution = "categorical",
    *,
    kind: Kind = "exact",
    structure: Structure = "diagonal",
    params: Selection = None,
    n_samples: int | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Fisher:
    r"""Return the Fisher information of a network, the mean over observations.

    .. math:: F = \frac1N \sum_{n=1}^N J_n^\top H_n J_n
              = \frac1N \sum_{n=1}^N \sum_k (J_n^\top s_{nk})(J_n^\top s_{nk})^\top

    This is :eq:`eq-fisher-network` with the Jacobian :math:`J_n` of the outputs in the
    parameters and a root :math:`H_n = \sum_k s_{nk} s_{nk}^\top` of the Fisher information of
    the output distribution: one backward pass without weight gradients for each column
    :math:`k`. The model is run in eval mode and left exactly as it was: modes, gradients,
    buffers and random state. The result does not depend on how the data are batched.

    Parameters
    ----------
    model
        Any module that maps a batch of inputs to a tensor ``[N, ...]``, or to an object with
        such ``.logits``. One entry of the first axis is one observation.
    data
        A DataLoader or any iterable of batches ``(inputs, targets)``, or of dicts with
        ``"labels"``; or one tuple of tensors ``(inputs, targets)``.
    likelihood
        How to read the output: ``"categorical"`` (logits), ``"bernoulli"`` (logits),
        ``"gaussian"`` (means), ``"poisson"`` (log rates), or an object such as
        ``Gaussian(sigma=0.5)``.
    kind
        Which expectation over labels :math:`y`.

        ``"exact"`` sums over the model's own distribution in closed form: ``C - 1`` backward
        passes for ``C`` classes, one for each real output. It is the default because it is the
        definition. More than 1,024 passes are refused.

        ``"sketch"`` replaces the columns by ``draws`` random sign combinations of them
        (Martens, Sutskever and Swersky 2012): unbiased, one backward pass each.

        ``"sampled"`` draws ``draws`` labels from the model: unbiased, one pass each, but with
        a large variance where the model is confident.

        ``"empirical"`` uses the observed labels. That is *not* the Fisher information unless
        the model is the truth (Kunstner et al. 2019).
    structure
        ``"diagonal"``, or ``"dense"`` for the whole matrix of a small model.
    params
        Names, glob patterns, or a predicate of ``(name, parameter)``. By default all parameters
        that require grad.
    n_samples
        Use exactly that many observations, then stop. By default all.
    draws
        Random columns for each observation, for ``"sketch"`` and ``"sampled"``.
    generator
        The source of randomness, on the model's device. By default a fresh one with seed 0, so
        that results repeat and the global random state is not used.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.
    dtype
        Precision of the sums. By default float32 for half-precision parameters, whose squares
        would underflow, else the dtype of the parameters.

    Returns
    -------
    Fisher
        In nats per squared unit of the parameters and per observation.

    Raises
    ------
    ValueError
        If the data are empty, of unequal lengths or hold NaN; a target is outside the support;
        an output or a parameter is not finite; no parameter is trainable or a name is unknown;
        a batch normalisation has no running statistics; or the model mixes observations.

    Warns
    -----
    RuntimeWarning
        If the model can only be run one observation at a time, which is slow.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    >>> F = fisher_information(model, (x, y))
    >>> F.n_samples, {name: tuple(f.shape) for name, f in F.diagonal().items()}
    (8, {'weight': (2, 3), 'bias': (2,)})
    >>> p = model(x).softmax(-1)[0]  # closed form of softmax regression at x = 1
    >>> torch.allclose(F.diagonal()["bias"], p * (1 - p))
    True
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("structure", structure, STRUCTURES)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    distribution = output_distribution(likelihood)
    parameters = select_parameters(model, params)
    check_finite_parameters(dict(model.named_parameters()))
    _check_batch_statistics(model)
    device = next(iter(parameters.values())).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with untouched(model):
        total = _SUMS[structure](parameters, dtype)
        passes = _Passes(model, parameters)
        for batch in show_progress(batches(data, device, n_samples), "Fisher", progress):
            output = passes.run(batch, distribution)
            found = columns(kind, distribution, output, batch.target, draws, generator)
            total.add(passes, found, len(batch))
        return total.mean(kind, passes.paths())


class _Passes:
    """Forward and backward passes over batches, and which path each parameter takes."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self.generic = GenericPath(model, parameters)
        self.by_generic: set[str] = set()
        self.used: set[str] = set()
        self._certified: set[tuple[Any, ...]] = set()

    def run(self, batch: Batch, distribution: OutputDistribution) -> Tensor:
        """Run the model on one batch, check its output, and decide the paths."""
        self.batch = batch
        with Recorder(dict(self.parameters), len(batch)) as recorder:
            self.output = forward(self.model, batch.inputs)
        output = self.output.detach()
        if output.shape[:1] != (len(batch),):
            raise ValueError(
                f"the model must return one row per observation, got {tuple(output.shape)} for "
                f"a batch of {len(batch)}"
            )
        distribution.check(output, batch.target, batch.first)
        _check_output(output, distribution, batch)
        self.uses = []
        if self.output.requires_grad:  # else it was detached from all of them
            self.uses = recorder.uses
            self.by_generic |= recorder.unknown
        self._certify()
        self.uses = [use for use in self.uses if use.name not in self.by_generic]
        self.used |= {use.name for use in self.uses} | self.by_generic
        return output.to(sum_dtype(output))

    def _certify(self) -> None:
        """Put every parameter whose rules fail on the generic path, and check that too.

        A decision is kept for later batches in which the same operations use the parameters.
        With a single observation every layout looks right, and with a gradient of zero every
        rule does, so such a batch does not count.
        """
        signature = tuple(use.signature for use in self.uses), frozenset(self.by_generic)
        if signature in self._certified:
            return
        challenge = Challenge.pose(self.output, self.parameters)
        by_rule = [use for use in self.uses if use.name not in self.by_generic]
        failed = challenge.failed_rules(self._pull(by_rule, challenge.direction))
        self.by_generic |= failed
        names = sorted(self.by_generic)
        sums: Vector = defaultdict(lambda: torch.zeros(()))
        for part, found in self._generic(challenge.direction.unsqueeze(0)):
            for name, g in found.items():
                g = g[0].to(sum_dtype(g))
                sums[name] = sums[name] + torch.tensordot(challenge.weights[part].to(g), g, dims=1)
        for name in names:
            challenge.check_generic(name, sums[name])
        if half := len(self.batch) // 2:
            inputs = tree_map(lambda leaf: leaf[:half], self.batch.inputs)
            check_alone(forward(self.model, inputs), self.output[:half])
            if challenge.conclusive:
                self._certified.add((signature[0], frozenset(self.by_generic)))

    def pull(self, column: Tensor) -> dict[str, list[Pulled]]:
        """Bring one output column back to every use that goes by rule."""
        return self._pull(self.uses, column)

    def _pull(self, uses: list[Use], column: Tensor) -> dict[str, list[Pulled]]:
        pulled: dict[str, list[Pulled]] = defaultdict(list)
        edges = [use.edge for use in uses]
        if edges:
            arrived = torch.autograd.grad(
                self.output, edges, column.to(self.output), retain_graph=True, allow_unused=True
            )
            for use, g in zip(uses, arrived, strict=True):
                if g is not None:
                    pulled[use.name].append(Pulled(use, g))
        return pulled

    def generic_gradients(self, block: Tensor) -> Iterator[tuple[slice, Vector]]:
        """Gradients ``[K, n, *shape]`` of the parameters on the generic path, part by part."""
        return self._generic(block.to(self.output))

    def _generic(self, block: Tensor) -> Iterator[tuple[slice, Vector]]:
        names = sorted(self.by_generic)
        return self.generic.gradients(names, self.batch.inputs, block) if names else iter(())

    def paths(self) -> dict[str, str]:
        """Say how each parameter was computed."""

        def path(name: str) -> str:
            if name in self.generic.looped:
                return "loop"
            if name in self.by_generic:
                return "generic"
            return "rule" if name in self.used else "unused"

        return {name: path(name) for name in self.parameters}


class _Sum(ABC):
    """The sum over observations of one structure."""

    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        self.n = 0
        self.dtypes = {name: dtype or sum_dtype(p) for name, p in parameters.items()}

    def add(self, passes: _Passes, found: Iterator[Tensor], n: int) -> None:
        """Add all columns of one batch."""
        self.n += n
        with torch.no_grad():
            while block := list(islice(found, COLUMNS_AT_ONCE)):
                self.add_block(passes, block)

    @abstractmethod
    def add_block(self, passes: _Passes, block: list[Tensor]) -> None:
        """Add some columns of one batch."""

    @abstractmethod
    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        """Divide by the number of observations."""


class _DiagonalSum(_Sum):
    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        super().__init__(parameters, dtype)
        self.sums = {
            name: torch.zeros_like(p, dtype=self.dtypes[name], requires_grad=False)
            for name, p in parameters.items()
        }

    def add_block(self, passes: _Passes, block: list[Tensor]) -> None:
        for column in block:
            for name, uses in passes.pull(column).items():
                self.sums[name] += squares([use.to(self.dtypes[name]) for use in uses])
        if passes.by_generic:
            for _, found in passes.generic_gradients(torch.stack(block)):
                for name, g in found.items():
                    self.sums[name] += g.to(self.dtypes[name]).square().sum((0, 1))

    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        values = {name: total / self.n for name, total in self.sums.items()}
        return Diagonal(self.n, kind, paths, values)


class _DenseSum(_Sum):
    def __init__(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype | None) -> None:
        super().__init__(parameters, dtype)
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.dtype = max(self.dtypes.values(), key=lambda d: d.itemsize)
        device = next(iter(parameters.values())).device
        size = sum(shape.numel() for shape in self.shapes.values())
        self.sum = torch.zeros(size, size, dtype=self.dtype, device=device)

    def add_block(self, passes: _Passes, block: list[Tensor]) -> None:
        generic: dict[str, list[Tensor]] = defaultdict(list)
        if passes.by_generic:
            for _, found in passes.generic_gradients(torch.stack(block)):
                for name, g in found.items():
                    generic[name].append(g.to(self.dtype))
        for k, column in enumerate(block):
            rows = {
                name: gradients([use.to(self.dtype) for use in uses])
                for name, uses in passes.pull(column).items()
            }
            rows |= {name: torch.cat([g[k] for g in parts]) for name, parts in generic.items()}
            matrix = self._matrix(rows, len(column))
            self.sum += matrix.mT @ matrix

    def _matrix(self, rows: Vector, n: int) -> Tensor:
        """Gradients of one column, ``[n, P]``; zero for unused parameters."""
        pieces = [
            rows[name].reshape(n, -1) if name in rows else self.sum.new_zeros(n, shape.numel())
            for name, shape in self.shapes.items()
        ]
        return torch.cat(pieces, 1)

    def mean(self, kind: str, paths: dict[str, str]) -> Fisher:
        return Dense(self.n, kind, paths, self.sum / self.n, self.shapes)


_SUMS: dict[str, type[_Sum]] = {"diagonal": _DiagonalSum, "dense": _DenseSum}


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{type(module).__name__} {name!r} has no running statistics, so it mixes "
                "observations: they have no scores of their own. Use track_running_stats=True"
            )


def _check_output(output: Tensor, distribution: OutputDistribution, batch: Batch) -> None:
    invalid = distribution.invalid(output)
    if invalid.any():
        bad = invalid.reshape(len(output), -1).any(1).nonzero()[0]
        raise ValueError(f"the output of observation {batch.first + int(bad)} is not finite")
