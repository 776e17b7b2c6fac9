"""How well a network does on a task."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ewc_lib._model import evaluating

__all__ = ["accuracy"]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]) -> float:
    """Return the share of inputs whose most likely class is the right one.

    Parameters
    ----------
    model
        A classifier; it is run in eval mode and gets its own modes back.
    data
        Inputs ``[N, D]`` and labels ``[N]``.

    Returns
    -------
    float
        Between 0 and 1.

    Examples
    --------
    >>> import torch
    >>> accuracy(torch.nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))
    0.75
    """
    x, y = data
    with evaluating(model):
        return float((model(x).argmax(-1) == y).double().mean())
