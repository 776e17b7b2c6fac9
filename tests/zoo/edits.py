"""Models that edit their inputs in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import Functional, animal, function, layer, read, stir

function("edits_by_clamp", (4,), lambda p, x: x.clamp_(-1, 1) @ p.w, w=(4, 3))
function("edits_twice", (4,), lambda p, x: x.sub_(0.5).div_(2.0) @ p.w, w=(4, 3))
function("edits_by_a_mask", (4,), lambda p, x: x.masked_fill_(x > 1, 0.0) @ p.w, w=(4, 3))
function("edits_by_relu", (4,), lambda p, x: F.relu_(x) @ p.w, w=(4, 3))
layer("edits_by_a_module", lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), 4)
function("edits_a_view", (3, 4), lambda p, x: x.mT.mul_(2).mT @ p.w, w=(4, 3))


def _without_the_first(p: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return F.linear(x, p.w, p.b)


def _used_before(p: Any, x: Tensor) -> Tensor:
    h = torch.tanh((2 * x) @ p.w)
    return h + x.add_(1.0) @ p.v


def _of_three(p: Any, x: Tensor) -> Tensor:
    x += x.sign()
    return torch.einsum("ni,ij,jk->nk", x, p.u, p.v)


function("edits_a_column", (4,), _without_the_first, w=(3, 4), b=(3,))
function("edits_between", (4,), _used_before, w=(4, 3), v=(4, 3))
function("edits_for_what_no_rule_knows", (4,), _of_three, u=(4, 2), v=(2, 3))


class Nested(nn.Module):
    """A batch that is a dict in a dict, of which one entry is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any], scale: Tensor) -> Tensor:
        x = batch["views"]["x"]
        x[:, -1].clamp_(-0.5, 0.5)
        batch["views"]["x"] = x * scale.unsqueeze(1)
        return self.linear(batch["views"].pop("x"))


def _nested() -> Any:
    return {"batch": {"views": {"x": torch.randn(N, 4)}}, "scale": torch.rand(N)}


animal("edits_a_dict_in_a_dict", lambda: read(stir(Nested()), _nested()))


class Words(nn.Module):
    """Words that are replaced in place before they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        words[words > 3] = 0
        return self.table(words)


animal("edits_words", lambda: read(Words(), torch.randint(0, 5, (N, 3))))
animal(
    "edits_one_of_two_inputs",
    lambda: read(
        stir(Functional(lambda p, x, z: x @ p.w + z.neg_() @ p.v, w=(4, 3), v=(2, 3))),
        (torch.randn(N, 4), torch.randn(N, 2)),
    ),
)
