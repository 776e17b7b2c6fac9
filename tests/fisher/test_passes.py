import pytest
import torch
from torch import nn

from ewc_lib._batches import Batch
from ewc_lib.distributions import Categorical
from ewc_lib.fisher.passes import Passes


class ThreePaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_rule = nn.Linear(3, 4)
        self.by_generic = nn.Parameter(torch.ones(4))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.by_rule(x) * self.by_generic


@pytest.fixture
def passes():
    torch.manual_seed(0)
    model = ThreePaths().double().eval()
    return Passes(model, dict(model.named_parameters()))


def batch(n, first=0):
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return Batch(x, torch.zeros(n, dtype=torch.long), first)


def test_each_parameter_takes_the_path_that_its_operations_allow(passes):
    passes.run(batch(5), Categorical())
    assert passes.paths() == {
        "by_rule.weight": "rule",
        "by_rule.bias": "rule",
        "by_generic": "generic",
        "idle": "unused",
    }


def test_both_paths_together_bring_back_the_gradient_of_the_batch(passes):
    output = passes.run(batch(5), Categorical())
    column = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    names = ["by_rule.weight", "by_rule.bias", "by_generic"]
    parameters = dict(passes.model.named_parameters())
    expected = torch.autograd.grad(
        passes.output, [parameters[name] for name in names], column, retain_graph=True
    )
    found = {
        name: sum(use.gradients().sum(0) for use in uses)
        for name, uses in passes.pull(column).items()
    }
    for _, generic in passes.generic_gradients(column.unsqueeze(0)):
        found |= {name: g.sum((0, 1)) for name, g in generic.items()}
    assert set(found) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_an_output_without_one_row_per_observation_is_refused(passes):
    passes.model.forward = lambda x: x.sum(0)
    with pytest.raises(ValueError, match="one row per observation"):
        passes.run(batch(5), Categorical())
