"""A network of which each parameter goes another way, and batches for it."""

import torch
from torch import nn

from ewc_lib._batches import Batch
from ewc_lib.likelihood.outputs import Categorical
from ewc_lib.score.network import NetworkScores


class ThreePaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_rule = nn.Linear(3, 4)
        self.by_generic = nn.Parameter(torch.ones(4, 4))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.by_rule(x)
        return torch.einsum("ni,oi,i->no", h, self.by_generic, torch.ones_like(h[0]))


def three_paths():
    """Return the scores of the network."""
    torch.manual_seed(0)
    return of(ThreePaths().double().eval())


def of(model):
    return NetworkScores(model, dict(model.named_parameters()), Categorical())


def batch(n, first=0):
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return Batch(x, torch.zeros(n, dtype=torch.long), first)
