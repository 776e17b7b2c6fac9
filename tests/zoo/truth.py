"""The slow answer, one observation at a time by plain autograd, and what is compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ewc_lib import Fisher, fisher_information
from ewc_lib.likelihood.outputs import output_distribution
from tests.scenarios import Scenario, slow_path_allowed


class Truth(NamedTuple):
    """Per observation: Jacobians of the output, its Fisher information, its score."""

    jacobian: Tensor
    information: Tensor
    score: Tensor
    shapes: dict[str, torch.Size]

    def dense(self, kind: str) -> Tensor:
        """Return the whole matrix; complex parameters make it Hermitian."""
        if kind == "empirical":
            scores = torch.einsum("no,nop->np", self.score.to(self.jacobian), self.jacobian)
            return scores.mT @ scores.conj() / len(scores)
        left = (self.information.to(self.jacobian) @ self.jacobian).flatten(0, 1)
        return self.jacobian.flatten(0, 1).mT @ left.conj() / len(self.jacobian)

    def diagonal(self, kind: str) -> dict[str, Tensor]:
        """Return the diagonal, in the shapes of the parameters, of absolute squares."""
        pieces = self.dense(kind).diagonal().real.split([s.numel() for s in self.shapes.values()])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


def truth(case: Scenario) -> Truth:
    """Run one observation after the other, and differentiate one output after the other.

    The log-probability's Hessian in the output is minus the Fisher information of the output
    distribution, whatever the target, since all four have natural parameters for outputs.
    """
    model, mode = case.model, case.model.training
    distribution = output_distribution(case.likelihood)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    set_mode(model, False)
    for n in range(len(case.y)):
        x, y = tree_map(lambda t, n=n: t[n : n + 1].clone(), (case.x, case.y))
        output = call(model, x)
        jacobian = torch.stack([_gradient(entry, parameters) for entry in output.reshape(-1)])

        def log_prob(f: Tensor, y: Tensor = y) -> Tensor:
            return distribution.log_prob(f, y).sum()

        f = output.detach()
        score = torch.autograd.functional.jacobian(log_prob, f).reshape(-1)
        hessian = torch.autograd.functional.hessian(log_prob, f)
        rows.append((jacobian, -hessian.reshape(len(score), -1), score))
    set_mode(model, mode)
    stacked = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    return Truth(*stacked, {name: p.shape for name, p in parameters.items()})


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the mode of a model, unless it was fixed when the model was exported."""
    with suppress(NotImplementedError):
        model.train(training)


def call(model: nn.Module, x: Any) -> Tensor:
    """Call a model with inputs of any form, and return its output tensor."""
    if isinstance(x, dict):
        output = model(**x)
    elif isinstance(x, tuple):
        output = model(*x)
    else:
        output = model(x)
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def _gradient(entry: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(
        entry, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else g.to_dense().reshape(-1)
            for p, g in zip(parameters.values(), gradients, strict=True)
        ]
    )


def cut(case: Scenario, *sizes: int) -> Iterator[tuple[Any, Tensor]]:
    """Cut data of any form into batches of the given sizes, the last of which is repeated."""
    start = number = 0
    while start < len(case.y):
        part = slice(start, start + sizes[min(number, len(sizes) - 1)])
        yield tree_map(lambda t, part=part: t[part], (case.x, case.y))
        start, number = part.stop, number + 1


def measure(case: Scenario, *sizes: int, **options: Any) -> Fisher:
    """Run the engine on a model, by default in batches that hold all data of an entry."""
    with slow_path_allowed():
        batches = cut(case, *sizes or (len(case.y),))
        return fisher_information(case.model, batches, case.likelihood, **options)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the worst relative error of any parameter.

    It is relative to the largest entry of the same parameter, so that a mistake about one with
    little information shows, unless it has next to none.
    """
    assert list(found) == list(expected)
    largest = max(float(values.max()) for values in expected.values())
    return max(
        float((found[name] - values).abs().max() / (values.max() + 1e-9 * largest))
        for name, values in expected.items()
    )
