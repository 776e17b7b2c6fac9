"""The low-rank update of this package, and the layers that have one."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ewc_lib._adapted.twin import twin_of, wide
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
