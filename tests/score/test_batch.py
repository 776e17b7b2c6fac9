"""The gradients of one batch, by every way together."""

import pytest
import torch

from tests.score.cases import batch, three_paths


def test_both_paths_together_bring_back_the_gradient_of_the_batch():
    network = three_paths()
    scores = network.run(batch(5))
    column = torch.randn(scores.output.shape, generator=torch.Generator().manual_seed(1)).double()
    names = ["by_rule.weight", "by_rule.bias", "by_generic"]
    parameters = dict(network.model.named_parameters())
    expected = torch.autograd.grad(
        scores.forward.output, [parameters[name] for name in names], column, retain_graph=True
    )
    found = {
        name: gradients.gradients().sum(0)
        for name, gradients in scores.by_rule(column[None]).items()
    }
    for _, generic in scores.by_function(column[None]):
        found |= {name: g.sum((0, 1)) for name, g in generic.items()}
    assert set(found) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("part", [slice(None), slice(1, 4)])
def test_gradients_are_written_out_for_a_part_of_the_batch(part):
    network = three_paths()
    scores = network.run(batch(5))
    column = torch.randn(scores.output.shape, generator=torch.Generator().manual_seed(1)).double()
    found = scores.gradients(scores.by_rule(column[None]), column[None], part)
    parameters = dict(network.model.named_parameters())
    assert list(found) == list(parameters)
    for row, n in enumerate(range(5)[part]):
        expected = torch.autograd.grad(
            scores.forward.output[n],
            [*parameters.values()],
            column[n],
            retain_graph=True,
            allow_unused=True,
        )
        for (name, parameter), g in zip(parameters.items(), expected, strict=True):
            own = torch.zeros_like(parameter) if g is None else g
            torch.testing.assert_close(found[name][row], own)
