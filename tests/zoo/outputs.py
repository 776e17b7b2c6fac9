"""Inputs, outputs and likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ewc_lib import Gaussian
from tests.scenarios import N, Scenario
from tests.zoo.registry import animal, read


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
