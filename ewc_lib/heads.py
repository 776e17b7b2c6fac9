"""Networks of which only some outputs are read at a time."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._calling import forward, output_tensor


class MultiHead(nn.Module):
    """A network of which only some outputs are read at a time, as one head of several.

    What is not read has no gradient and no Fisher information. So a loss, and any Fisher
    information, of this module are those of the outputs that are read now.

    Parameters
    ----------
    net
        Returns all outputs, ``[N, ..., C]``, as a network of this package may return them.

    Attributes
    ----------
    outputs
        The outputs that are read; None for all. Labels count from the first of them.

    Examples
    --------
    >>> import torch
    >>> model = MultiHead(torch.nn.Identity())
    >>> model.outputs = range(2, 4)
    >>> model(torch.arange(6).reshape(1, 6))
    tensor([[2, 3]])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.outputs: range | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "N ... K"]:
        return read(output_tensor(self.net(*args, **kwargs)), self.outputs)


def read(outputs: Float[Tensor, "N ... C"], which: range | None) -> Float[Tensor, "N ... K"]:
    """Return some of the outputs, or all for None."""
    return outputs if which is None else outputs[..., which.start : which.stop]


def all_outputs(model: nn.Module, inputs: Any) -> Float[Tensor, "N ..."]:
    """Return the outputs of all heads; a model without heads has one."""
    return forward(model.net if isinstance(model, MultiHead) else model, inputs)


def read_now(model: nn.Module, n_outputs: int) -> range:
    """Return which of all outputs are read now."""
    if isinstance(model, MultiHead) and model.outputs is not None:
        return model.outputs
    return range(n_outputs)


def contains(outer: range, inner: range) -> bool:
    """Tell whether all outputs of one range are in another."""
    return outer.start <= inner.start and inner.stop <= outer.stop
