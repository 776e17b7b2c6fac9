"""A strategy of Avalanche with the plugin, against the same loop by hand.

Avalanche needs torchvision; where that does not import, nothing is run.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC
from ewc_lib.integrations.avalanche import EWCPlugin
from ewc_lib.regularizers import SI

try:
    from avalanche.benchmarks import dataset_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.models import IncrementalClassifier
    from avalanche.training import Naive
except Exception as error:  # torchvision for another version of PyTorch raises a RuntimeError
    pytest.skip(f"Avalanche does not import: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:avalanche.*")
RATE = 0.2
N, BATCH = 16, 16


class Labelled(TensorDataset):
    """Tensors whose targets Avalanche finds."""

    def __init__(self, seed, classes):
        generator = torch.Generator().manual_seed(seed)
        y = torch.tensor(classes)[torch.arange(N) % len(classes)]
        super().__init__(torch.randn(N, 3, generator=generator) + y[:, None], y)
        self.targets = y.tolist()


def experiences(*classes):
    data = [as_classification_dataset(Labelled(i, own)) for i, own in enumerate(classes)]
    return dataset_benchmark(data, data).train_stream


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def strategy(model, plugin, epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    return Naive(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(),
                 train_mb_size=BATCH, train_epochs=epochs, plugins=[plugin])  # fmt: skip


def by_hand(model, regularizer, stream, form, epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for experience in stream:
        x, y = next(iter(DataLoader(experience.dataset, N)))[:2]
        for _ in range(epochs):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            regularizer.before_step()
            if form == "gradient":
                regularizer.add_gradient_()
            optimizer.step()
            if form == "proximal":
                regularizer.proximal_step_(optimizer)
            regularizer.after_step()
        regularizer.consolidate((x, y))


@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize(("make", "strength"), [(EWC, 10.0), (SI, 10.0)])
def test_it_does_what_the_calls_by_hand_do(make, strength, form):
    stream = experiences([0, 1], [0, 1], [0, 1])
    one, other = network(), network()
    first, second = make(one, strength), make(other, strength)
    by_hand(one, first, stream, form)
    learner = strategy(other, EWCPlugin(second, form=form))
    for experience in stream:
        learner.train(experience)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)
    assert second.n_tasks == 3
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=1e-3, atol=1e-5)
    assert not learner.optimizer._optimizer_step_post_hooks


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.head = IncrementalClassifier(5, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def test_a_classifier_that_grows_keeps_what_it_knew():
    torch.manual_seed(0)
    model = Growing()
    ewc = EWC(model, 1e6)
    learner = strategy(model, EWCPlugin(ewc))
    first, second = experiences([0, 1], [2, 3])
    learner.train(first)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner.train(second)
    assert ewc.n_tasks == 2
    assert model.head.classifier.out_features == 4
    old = model.head.classifier.weight[:2]
    torch.testing.assert_close(old, before["head.classifier.weight"], rtol=0, atol=1e-3)
    assert (model.head.classifier.weight[2:]).abs().max() > 0.01
