"""EWC with reversed logits, against its formula written out."""

import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib import EWC
from ewc_lib.regularizers import EWCDR
from tests.regularizers.cases import DOUBLE, TIGHT, copies, move, network, task


def squares(model, x, y):
    total = {name: torch.zeros_like(p) for name, p in copies(model).items()}
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(-model(one[None]), label[None])
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        for name, g in zip(total, gradients, strict=True):
            total[name] += g**2 / len(x)
    return total


def test_the_importance_is_the_mean_square_of_gradients_at_reversed_logits():
    model = network()
    for outputs in (None, range(0, 2), range(2, 4)):
        model.outputs = outputs
        x, y = task()
        found = EWCDR(model, 1.0).consolidate((x, y))
        expected = squares(model, x, y)
        assert found.kind == "logits reversal"
        assert list(found.values) == list(expected)
        for name, value in found.values.items():
            torch.testing.assert_close(value, expected[name], **TIGHT)


def test_the_penalty_is_the_sum_over_tasks_around_the_optimum_of_each():
    model = network(n_outputs=2)
    regularizer, tasks = EWCDR(model, strength=3.0), []
    for t in range(3):
        move(model, t)
        tasks.append((squares(model, *task(t)), copies(model)))
        regularizer.consolidate(task(t))
    move(model, 7)
    expected = sum(
        (importance[name] * (p - anchor[name]) ** 2).sum()
        for importance, anchor in tasks
        for name, p in copies(model).items()
    )
    torch.testing.assert_close(regularizer.penalty(), 3 / 2 * expected, **TIGHT)


def test_it_does_not_vanish_where_the_model_is_sure_and_the_fisher_information_does():
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([30.0, 0.0]))
    data = torch.ones(5, 1, dtype=DOUBLE), torch.zeros(5, dtype=torch.long)
    assert EWC(model, 1.0).consolidate(data).trace() < 1e-10
    assert EWCDR(model, 1.0).consolidate(data).trace() > 1


def test_the_model_may_have_a_parameter_of_any_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"model[0]*": nn.Linear(3, 2)}).double()

        def forward(self, x):
            return self.model["model[0]*"](x)

    model = Odd()
    found = EWCDR(model, 1.0).consolidate(task())
    assert list(found.values) == [name for name, _ in model.named_parameters()]
