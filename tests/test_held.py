"""The parameters that a penalty holds, found again in the model."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC
from ewc_lib.regularizers import L2
from tests.regularizers.cases import after_one_task, move, task


@pytest.mark.parametrize("wrong", ["nothing", "net.0", "net.0.wieght", []])
def test_a_pattern_that_matches_nothing_is_named_and_nothing_is_forgotten(wrong):
    _, regularizer = after_one_task("EWC")
    held = list(regularizer.anchor)
    hint = {"net.0": r"'net\.0\.\*'", "net.0.wieght": r"did you mean 'net\.0\.weight'"}
    if wrong == []:
        regularizer.forget(wrong)
    else:
        with pytest.raises(ValueError, match=f"no parameter '{wrong}'.*{hint.get(wrong, '')}"):
            regularizer.forget(["net.2.*", wrong])
    assert list(regularizer.anchor) == held


def test_two_held_parameters_that_are_tied_since_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    ewc = L2(model, 1.0)
    ewc.consolidate()
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1\.weight' is the same parameter as '0\.weight' now"):
        ewc.penalty()
    ewc.forget("1.weight")
    ewc.penalty().backward()


def test_parts_of_the_gradient_are_added_one_after_the_other():
    """As by optimizers that hold a part each."""
    for structure in ("diagonal", "dense"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        ewc = EWC(model, 2.0, structure=structure)
        ewc.consolidate(task(classes=3))
        move(model)
        names, own = zip(*model.named_parameters(), strict=True)
        whole = dict(zip(names, torch.autograd.grad(ewc.penalty(), own), strict=True))
        for part in (["0.weight", "2.bias"], ["2.weight"], []):
            model.zero_grad()
            ewc._add_gradient(part)
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            torch.testing.assert_close(found, {n: whole[n] for n in part})
        head = torch.optim.SGD([*model[2].parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
        assert ewc._held_by(head) == ["2.weight", "2.bias"]
