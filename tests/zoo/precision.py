"""One operation in lower precision in a model of double precision, which loses nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.hidden import Small
from tests.zoo.registry import function

for _name, _dtype in {"half": torch.bfloat16, "single": torch.float32}.items():

    def _masked(p: Any, x: Tensor, dtype: torch.dtype = _dtype) -> Tensor:
        return F.linear(x * (x > -0.5).to(dtype), p.w, p.b)

    def _scored(p: Any, x: Tensor, dtype: torch.dtype = _dtype) -> Tensor:
        """Attention where the mask is a number that is added to the scores."""
        absent = (1 - (x[..., 0] > -1).to(dtype)) * -1e4
        return ((x @ p.w) @ x.mT + absent.unsqueeze(1)).softmax(-1) @ x

    def _counted(p: Any, x: Tensor, dtype: torch.dtype = _dtype) -> Tensor:
        count = (x > 0).to(dtype).sum(1, keepdim=True)
        return torch.tanh(F.linear(x, p.w)) * count

    def _chosen(p: Any, x: Tensor, dtype: torch.dtype = _dtype) -> Tensor:
        """The largest channel is found in lower precision, and used in double precision."""
        best = F.one_hot(x.to(dtype).argmax(1), 4).to(dtype)
        return F.linear(x * best, p.w) + F.linear(x, p.w).square()

    def _scaled(p: Any, x: Tensor, dtype: torch.dtype = _dtype) -> Tensor:
        return torch.einsum("ni,ij,jk->nk", x, p.a, p.b) * torch.full((), 0.5, dtype=dtype)

    function(f"mask_in_{_name}_precision", (4,), _masked, w=(3, 4), b=(3,))
    function(f"mask_of_scores_in_{_name}_precision", (3, 4), _scored, w=(4, 4))
    function(f"count_in_{_name}_precision", (4,), _counted, w=(3, 4))
    function(f"choice_in_{_name}_precision", (4,), _chosen, w=(3, 4))
    function(f"factor_in_{_name}_precision", (4,), _scaled, a=(4, 2), b=(2, 3))
    function(
        f"hidden_small_use_beside_a_mask_in_{_name}_precision",
        (4,),
        lambda p, x, dtype=_dtype: (
            F.linear(x, p.w) * (x > -1).to(dtype) + Small.apply(x, p.w, 1e-4)
        ),
        w=(4, 4),
    )
