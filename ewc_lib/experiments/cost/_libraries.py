"""The diagonal Fisher information as other libraries compute it.

A library is imported where it is used, because the package needs none of them:
``pip install 'ewc_lib[peers]'`` brings them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ewc_lib.experiments.cost._plain import Diagonal, cross_entropy, cut, mean_of
from ewc_lib.experiments.cost.benchmarks import Batches

JACOBIAN_BATCH = 8
"""Laplace's Jacobian costs the square of the batch size, in time and in memory."""


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


def _by_name(model: nn.Module, flat: Tensor) -> Diagonal:
    parameters = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in parameters.values()])
    pairs = zip(parameters.items(), parts, strict=True)
    return {name: part.view_as(p) for (name, p), part in pairs}


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


@mean_of
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


@mean_of
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


@mean_of
def opacus(model: nn.Module, batches: Batches) -> Iterator[Diagonal]:
    """Opacus' gradients of single observations; its hooks do nothing in eval mode."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    for x, y in batches:
        wrapped.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        parameters: dict[str, Any] = dict(model.named_parameters())
        yield {name: p.grad_sample.square().sum(0) for name, p in parameters.items()}


@mean_of
def laplace(
    model: nn.Module, batches: Batches, *, backend: str, batch_size: int | None = None
) -> Iterator[Diagonal]:
    """Run one of the curvature backends of laplace-torch; that of BackPACK moves axes itself."""
    from laplace import curvature

    network = ClassesSecond(model) if backend.startswith("Curvlinops") else model
    interface = getattr(curvature, backend)(network, "classification")
    for x, y in cut(batches, batch_size or len(batches[0][1])):
        model.zero_grad()
        yield _by_name(model, interface.diag(x, y, N=len(x))[1])


@mean_of
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
