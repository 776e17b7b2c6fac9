"""Inputs, outputs and likelihoods."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ewc_lib import Gaussian
from tests.scenarios import N, Scenario
from tests.zoo.registry import animal, read, stir


class TwoInputs(nn.Module):
    """A sum of two maps of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.first(x) + self.second(z).mean(1)


animal(
    "two_inputs_as_a_tuple", lambda: read(TwoInputs(), (torch.randn(N, 4), torch.randn(N, N, 2)))
)
animal(
    "two_inputs_as_a_dict",
    lambda: read(TwoInputs(), {"z": torch.randn(N, 3, 2), "x": torch.randn(N, 4)}),
)


def _outputs(likelihood: Any, draw: Callable[[tuple[int, ...]], Tensor], *shape: int) -> Scenario:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Scenario(model, torch.randn(N, *shape, 4), likelihood, draw((N, *shape, 3)))


animal("gaussian_outputs", lambda: _outputs(Gaussian(sigma=0.5), torch.randn))
animal("bernoulli_outputs", lambda: _outputs("bernoulli", lambda s: torch.rand(s).round(), 2))
animal("poisson_outputs", lambda: _outputs("poisson", lambda s: torch.rand(s).mul(4).floor()))
animal(
    "a_class_for_each_position",
    lambda: _outputs("categorical", lambda s: torch.randint(0, 3, s[:-1]), N),
)


# Outputs of other forms


class Returns(nn.Module):
    """A classifier that returns its scores in a package."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.low = nn.Parameter(torch.randn(3, 3))
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.pack(torch.einsum("ni,ij,jk->nk", self.head(h), self.low, self.low), h)


class Pair(NamedTuple):
    """Scores and features."""

    scores: Tensor
    features: Tensor


@dataclass
class Result:
    """Features and scores."""

    features: Tensor
    logits: Tensor
    loss: Tensor | None = None


_PACKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a_dict": lambda scores, h: {"logits": scores},
    "a_dict_with_more": lambda scores, h: {"loss": None, "features": h, "logits": scores},
    "an_ordered_dict": lambda scores, h: OrderedDict(features=h, logits=scores),
    "a_tuple": lambda scores, h: (scores, h),
    "a_tuple_of_one": lambda scores, h: (scores,),
    "a_tuple_with_other_things": lambda scores, h: (scores, {"features": [h, None]}, "text", 3),
    "a_named_tuple": Pair,
    "a_dataclass": lambda scores, h: Result(h, scores),
    "a_namespace": lambda scores, h: SimpleNamespace(logits=scores, features=h),
}
for _name, _pack in _PACKS.items():
    animal(
        f"output_in_{_name}",
        lambda pack=_pack: Scenario(
            stir(Returns(pack)), torch.randn(N, 4), "categorical", torch.randint(0, 3, (N,))
        ),
    )
