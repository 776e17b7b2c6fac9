"""The diagonal Fisher information as this package and others compute it.

Each contestant is a small function of a model and its batches. It returns the mean over
observations by the name of the parameter. A library is imported where it is used, because the
package needs none of them: ``pip install 'ewc_lib[peers]'`` brings them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ewc_lib.experiments.cost.benchmarks import Batches, Benchmark
from ewc_lib.fisher.estimate import fisher_information
from ewc_lib.fisher.output import Kind

__all__ = [
    "CONTESTANTS",
    "PEERS",
    "Contestant",
    "Contestants",
    "Diagonal",
    "answer",
    "error",
    "plain_pass",
]

Diagonal: TypeAlias = dict[str, Tensor]

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Size of the gradients of single observations that torch.func holds at a time, by device."""

JACOBIAN_BATCH = 8
"""Laplace's Jacobian costs the square of the batch size, in time and in memory."""


CHECKED = 16
"""Observations on which answers are compared."""


class Contestant(Protocol):
    """What is measured."""

    def __call__(self, model: nn.Module, batches: Batches, /) -> Diagonal: ...


Contestants: TypeAlias = Mapping[str, Mapping[str, Contestant]]
"""By library and kind."""


def plain_pass(model: nn.Module, batches: Batches) -> Diagonal:
    """Run the unit of cost: forward, mean cross-entropy, gradients of all parameters."""
    for x, y in batches:
        model.zero_grad()
        (cross_entropy(model(x), y) / y.numel()).backward()
    return {}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood, summed over observations and their tokens."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


class ClassesSecond(nn.Module):
    """A network with the classes on the second axis of its output, as ``nn.CrossEntropyLoss`` asks.

    Networks for text have them on the last one, and the libraries call that loss by themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x)
        return output.movedim(-1, 1)


def _mean_of(parts: Callable[..., Iterator[Diagonal]]) -> Callable[..., Diagonal]:
    """Turn a generator of sums over some observations into their mean over all of them."""

    @wraps(parts)
    def mean(model: nn.Module, batches: Batches, **options: Any) -> Diagonal:
        total = {name: torch.zeros_like(p).detach() for name, p in model.named_parameters()}
        for part in parts(model, batches, **options):
            for name, value in part.items():
                total[name] += value
        n = sum(len(target) for _, target in batches)
        return {name: value / n for name, value in total.items()}

    return mean


def _cut(batches: Batches, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield from zip(x.split(size), y.split(size), strict=True)


def _by_name(model: nn.Module, flat: Tensor) -> Diagonal:
    parameters = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in parameters.values()])
    pairs = zip(parameters.items(), parts, strict=True)
    return {name: part.view_as(p) for (name, p), part in pairs}


def ours(model: nn.Module, batches: Batches, *, kind: Kind) -> Diagonal:
    """Run this package."""
    return fisher_information(model, batches, kind=kind, progress=False).diagonal()


@_mean_of
def loop_empirical(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """One observation at a time: the square of the gradient of its log-likelihood."""
    for x, y in _cut(batches, 1):
        yield _squared_gradient(model, cross_entropy(model(x), y))


@_mean_of
def loop_exact(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """One observation at a time: the expected square over the model's own labels."""
    for x, _ in _cut(batches, 1):
        log_p = model(x).log_softmax(-1)[0]
        for value in log_p:
            yield _squared_gradient(model, value, weight=value.detach().exp())


def _squared_gradient(model: nn.Module, value: Tensor, weight: Tensor | float = 1.0) -> Diagonal:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
    return {name: weight * g.square() for name, g in zip(parameters, found, strict=True)}


@_mean_of
def func_empirical(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """``vmap`` of ``grad`` over observations."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(x: Tensor, y: Tensor) -> Diagonal:
        def loss(parameters: Diagonal) -> Tensor:
            return cross_entropy(functional_call(model, parameters, (x[None],)), y)

        found: Diagonal = grad(loss)(parameters)
        return found

    for x, y in _cut(batches, _chunk(model, 1)):
        yield {name: g.square().sum(0) for name, g in vmap(gradient)(x, y).items()}


@_mean_of
def func_exact(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """``vmap`` over observations of ``vmap`` of ``vjp`` over columns of a root."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(x: Tensor) -> Diagonal:
        output, pull, *_ = vjp(lambda p: functional_call(model, p, (x[None],))[0], parameters)
        p = output.softmax(-1)
        identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
        root = p.sqrt().unsqueeze(-1) * (identity - p)
        found: Diagonal = vmap(lambda column: pull(column)[0])(root)
        return found

    classes = model(batches[0][0][:1]).shape[-1]
    for x, _ in _cut(batches, _chunk(model, classes)):
        yield {name: g.square().sum((0, 1)) for name, g in vmap(gradients)(x).items()}


def _chunk(model: nn.Module, columns: int) -> int:
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    budget = CHUNK_BYTES.get(parameters[0].device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (columns * size))


def nngeometry_empirical(model: nn.Module, batches: Batches) -> Diagonal:
    """Nngeometry's Jacobian backend with the loss of each observation as the function."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none").unsqueeze(-1)

    layers = LayerCollection.from_model(model)
    backend = TorchHooksJacobianBackend(layer_collection=layers, model=model, function=losses)
    return _from_layers(layers, PMatDiag(generator=backend, examples=_loader(batches)))


def nngeometry_exact(model: nn.Module, batches: Batches) -> Diagonal:
    """``nngeometry.metrics.FIM``."""
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    layers, device = LayerCollection.from_model(model), batches[0][0].device
    matrix = FIM(model, _loader(batches), PMatDiag, device=device, layer_collection=layers)
    return _from_layers(layers, matrix)


def _from_layers(layers: Any, matrix: Any) -> Diagonal:
    from nngeometry.object import PVector

    found = PVector(layers, vector_repr=matrix.get_diag()).to_dict()
    return {
        f"{layer}.{name}": value
        for layer, values in found.items()
        for name, value in zip(("weight", "bias"), values, strict=False)
    }


class _Slices(Dataset[Any]):
    """Data that a loader takes batch by batch, without collating single observations."""

    def __init__(self, batches: Batches) -> None:
        self.tensors = [torch.cat(parts) for parts in zip(*batches, strict=True)]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[index] for tensor in self.tensors]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [tensor[indices] for tensor in self.tensors]


def _loader(batches: Batches) -> DataLoader[Any]:
    return DataLoader(_Slices(batches), batch_size=len(batches[0][1]), collate_fn=list)


@_mean_of
def backpack(model: nn.Module, batches: Batches, *, extension: str) -> Iterator[Diagonal]:
    """Run one of the extensions of BackPACK."""
    import backpack
    from backpack import extensions

    rule = getattr(extensions, extension)()
    model = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    for x, y in batches:
        model.zero_grad()
        with backpack.backpack(rule):
            loss(model(x).movedim(-1, 1), y).backward()
        yield {name: getattr(p, rule.savefield) for name, p in model.named_parameters()}


@_mean_of
def asdl(model: nn.Module, batches: Batches, *, fisher_type: str) -> Iterator[Diagonal]:
    """ASDL's Fisher maker (asdfghjkl on PyPI)."""
    from asdl import LOSS_CROSS_ENTROPY, SHAPE_DIAG, FisherConfig, get_fisher_maker

    config = FisherConfig(fisher_type, [SHAPE_DIAG], loss_type=LOSS_CROSS_ENTROPY, data_size=1)
    maker, loss = get_fisher_maker(model, config), nn.CrossEntropyLoss(reduction="sum")
    names = {id(p): name for name, p in model.named_parameters()}
    for x, y in batches:
        output = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, output.flatten(0, -2), y.flatten())
        maker.forward_and_backward()
        for module in model.modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for which in ("weight", "bias"):
                value = getattr(diagonal, which, None)
                if value is not None:
                    yield {names[id(getattr(module, which))]: value}


@_mean_of
def opacus(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """Opacus' gradients of single observations; its hooks do nothing in eval mode."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    for x, y in batches:
        wrapped.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        parameters: dict[str, Any] = dict(model.named_parameters())
        yield {name: p.grad_sample.square().sum(0) for name, p in parameters.items()}


@_mean_of
def laplace(
    model: nn.Module, batches: Batches, *, backend: str, batch_size: int | None = None
) -> Iterator[Diagonal]:
    """Run one of the curvature backends of laplace-torch; that of BackPACK moves axes itself."""
    from laplace import curvature

    network = ClassesSecond(model) if backend.startswith("Curvlinops") else model
    interface = getattr(curvature, backend)(network, "classification")
    for x, y in _cut(batches, batch_size or len(batches[0][1])):
        model.zero_grad()
        yield _by_name(model, interface.diag(x, y, N=len(x))[1])


@_mean_of
def curvlinops(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """One Hutchinson probe: releases of curvlinops have no diagonal, only estimates of it.

    It differentiates forwards, which the fused kernels of attention cannot.
    """
    from curvlinops import GGNLinearOperator, hutchinson_diag

    loss, parameters = nn.CrossEntropyLoss(reduction="sum"), list(model.parameters())
    network = ClassesSecond(model)
    with sdpa_kernel(SDPBackend.MATH):
        matrix = GGNLinearOperator(network, loss, parameters, batches, check_deterministic=False)
        found = hutchinson_diag(matrix, num_matvecs=1)
    yield _by_name(model, found)


PEERS: dict[str, dict[str, Contestant]] = {
    "nngeometry": {"empirical": nngeometry_empirical, "exact": nngeometry_exact},
    "BackPACK": {
        "empirical": partial(backpack, extension="SumGradSquared"),
        "exact": partial(backpack, extension="DiagGGNExact"),
    },
    "curvlinops": {"sketch": curvlinops},
    "laplace": {
        "empirical": partial(laplace, backend="CurvlinopsEF"),
        "exact": partial(laplace, backend="CurvlinopsGGN", batch_size=JACOBIAN_BATCH),
    },
    "laplace (BackPACK)": {
        "empirical": partial(laplace, backend="BackPackEF"),
        "exact": partial(laplace, backend="BackPackGGN"),
    },
    "ASDL": {
        "empirical": partial(asdl, fisher_type="fisher_emp"),
        "exact": partial(asdl, fisher_type="fisher_exact"),
    },
    "opacus": {"empirical": opacus},
    "torch.func": {"empirical": func_empirical, "exact": func_exact},
    "loop": {"empirical": loop_empirical, "exact": loop_exact},
}
"""What other libraries and plain PyTorch offer."""

CONTESTANTS: Contestants = {
    "ewc_lib": {kind: partial(ours, kind=kind) for kind in get_args(Kind)},
    **PEERS,
}
"""All that are measured."""


def answer(contestant: Contestant, benchmark: Benchmark) -> Diagonal:
    """Run a contestant on a few observations in two batches, in double precision.

    Parameters
    ----------
    contestant
        What to run; its warnings are not shown.
    benchmark
        The model and its data.
    """
    batches = benchmark._replace(batch_size=CHECKED // 2).batches(CHECKED)
    double = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    model = benchmark.model().double()
    with _double_precision(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return contestant(model, double)


def error(contestant: Contestant, kind: str, benchmark: Benchmark) -> float | None:
    """Compare the answer of a contestant with the loop over single observations.

    Parameters
    ----------
    contestant
        What to judge.
    kind
        All but ``"empirical"`` are compared with the exact Fisher information.
    benchmark
        The model and its data.

    Returns
    -------
    float or None
        The largest error of any entry, relative to the largest entry of its parameter. A
        parameter that is missing counts as zero. None if the truth is out of reach.

    Raises
    ------
    ValueError
        If the answer is not finite.

    Examples
    --------
    >>> from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
    >>> error(PEERS["torch.func"]["empirical"], "empirical", BENCHMARKS["mlp"]) < 1e-12
    True
    """
    found = answer(contestant, benchmark)
    if not all(f.isfinite().all() for f in found.values()):
        raise ValueError("the answer is not finite")
    expected = "empirical" if kind == "empirical" else "exact"
    if expected == "exact" and not benchmark.exact:
        return None
    truth = _truth(benchmark, expected)
    # Some entries are zero by symmetry, up to rounding: the bias of the keys of attention.
    tiny = 1e-12 * max(float(f.abs().max()) for f in truth.values())
    errors = (
        float((found.get(name, torch.zeros_like(f)) - f).abs().max())
        / max(float(f.abs().max()), tiny)
        for name, f in truth.items()
    )
    return max(errors)


@cache
def _truth(benchmark: Benchmark, kind: str) -> Diagonal:
    return answer(PEERS["loop"][kind], benchmark)


@contextmanager
def _double_precision() -> Iterator[None]:
    """Change the default: some libraries make buffers in it, whatever the model has."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
