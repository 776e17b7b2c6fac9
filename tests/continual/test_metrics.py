import torch
from torch import nn

from ewc_lib.continual import accuracy


def test_accuracy_is_the_share_of_right_answers():
    logits = torch.eye(4)
    assert accuracy(nn.Identity(), (logits, torch.tensor([0, 1, 2, 3]))) == 1
    assert accuracy(nn.Identity(), (logits, torch.tensor([0, 1, 0, 0]))) == 0.5


def test_accuracy_runs_in_eval_mode_and_gives_the_modes_back():
    model = nn.Sequential(nn.Dropout(0.999), nn.Identity())
    model[1].eval()
    assert accuracy(model, (torch.eye(8), torch.arange(8))) == 1
    assert [m.training for m in model.modules()] == [True, True, False]
