"""The low-rank update of this package, and the layers that have one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ewc_lib._adapted._twin import twin_of, wide
from ewc_lib._arguments import random_source
from ewc_lib._parameters import Vector


class LowRankUpdate(nn.Module):
    r"""A weight plus a product of two small matrices, a parametrization of PyTorch.

    .. math:: W = W_0 + B A

    Parameters
    ----------
    weight
        :math:`W_0`, of shape ``[O, D]``.
    rank
        Number of columns of :math:`B` and of rows of :math:`A`.
    generator
        For the first :math:`A`, uniform in :math:`\pm 1/\sqrt D`. The first :math:`B` is zero, so
        that the weight begins as it was.

    References
    ----------
    Hu et al. 2022, section 4.1, without their constant factor.
    """

    def __init__(self, weight: Float[Tensor, "O D"], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        drawn = 2 * torch.rand(rank, n_in, generator=generator) - 1
        self.A = nn.Parameter(drawn.to(weight) / math.sqrt(n_in))
        self.B = nn.Parameter(weight.new_zeros(n_out, rank))

    def forward(self, weight: Float[Tensor, "O D"]) -> Float[Tensor, "O D"]:
        return weight + self.B @ self.A


def add_adapters(
    model: nn.Module,
    layers: Iterable[str],
    rank: int,
    *,
    generator: torch.Generator | None = None,
) -> None:
    r"""Freeze a network and put a trainable low-rank update beside the weight of some layers.

    The network computes what it did, because the update begins at zero. To make the updates part
    of the weights, call ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``. A
    layer that has an update already gets another one beside it, and keeps the first as it is.

    Parameters
    ----------
    model
        Changed in place.
    layers
        Names of modules with a ``weight`` of two dimensions, as linear layers.
    rank
        Of each update.
    generator
        Of the first values, on the processor. By default a fresh one with seed 0; the global
        random state is not used.

    Raises
    ------
    ValueError
        If the rank is not positive, if there is no layer, or if a weight has not two dimensions.
    AttributeError
        If the model has no such layer.

    References
    ----------
    Hu et al. 2022.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    >>> add_adapters(model, ["0", "2"], rank=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2 * (8 + 6 + 6 + 4)
    48
    """
    modules = {name: model.get_submodule(name) for name in layers}
    if rank < 1 or not modules:
        raise ValueError(f"adapters need layers and a positive rank, got {list(modules)}, {rank}")
    if wrong := [name for name, module in modules.items() if _weight(module).dim() != 2]:
        raise ValueError(f"the weights of {wrong} have not two dimensions")
    generator = random_source(generator, torch.device("cpu"))
    model.requires_grad_(False)
    for module in modules.values():
        update = LowRankUpdate(_weight(module), rank, generator)
        parametrize.register_parametrization(module, "weight", update)


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise AttributeError(f"{type(module).__name__} has no weight")
    return weight


class UpdatedLayer:
    """A layer whose weight has low-rank updates of this package."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Tell whether a module is such a layer."""
        if not parametrize.is_parametrized(module, "weight"):
            return False
        chains: Any = module.parametrizations
        return len(chains) == 1 and all(isinstance(u, LowRankUpdate) for u in chains["weight"])

    def tensors(self) -> Vector:
        """Return the weight and the bias that the layer uses, differentiable."""
        chain: Any = self.module.parametrizations
        weight = wide(chain["weight"].original)
        for update in chain["weight"]:
            weight = weight + wide(update.B) @ wide(update.A)
        bias = getattr(self.module, "bias", None)
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the layer."""
        weight: Tensor = self.module.get_parameter("parametrizations.weight.original")
        return weight.dtype

    def check(self) -> None:
        """Do nothing: the layer computes with this weight."""

    def plain(self, parameters: Vector) -> nn.Module:
        """Return a layer without adapters that has these parameters."""
        kind = parametrize.type_before_parametrizations(self.module)
        twin = twin_of(self.module, parameters, kind)
        del twin._modules["parametrizations"]
        return twin
