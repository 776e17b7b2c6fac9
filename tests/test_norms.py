"""Running statistics: what moves though a penalty holds every weight, and how it is kept."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from ewc_lib import EWC, fisher_information, freeze_norms
from ewc_lib.continual import train
from ewc_lib.data import digits
from ewc_lib.regularizers import L2, KroneckerLaplace
from tests.scenarios import same

WARNING = "the running statistics of .* will follow the data of the next task"


def network(*norms, seed=0):
    """A network with some norms of four features, on inputs of three."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), *norms, nn.Tanh(), nn.Linear(4, 3))


def task(n=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 3


def images(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(16, 3))


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers()}


class Renormalisation(nn.BatchNorm1d):
    """A subclass with a forward pass of its own, which reads its own mode."""

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.running_mean


class Observed(nn.Module):
    """A layer of another family that counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += len(x)
            self.running_mean += (x.detach() - self.running_mean).sum(0) / self.count
        return x - self.running_mean


class Frozen(nn.Module):
    """As in libraries for detection: statistics that nothing ever moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        return (x - self.running_mean) * self.running_var.rsqrt()


MOVING = {
    "batch": lambda: network(nn.BatchNorm1d(4)),
    "without weights": lambda: network(nn.BatchNorm1d(4, affine=False)),
    "cumulative": lambda: network(nn.BatchNorm1d(4, momentum=None)),
    "nested": lambda: network(nn.Sequential(nn.Sequential(nn.BatchNorm1d(4)), nn.ReLU())),
    "subclass": lambda: network(Renormalisation(4)),
    "of another family": lambda: network(Observed()),
    "lazy": lambda: network(nn.LazyBatchNorm1d()),
    "compiled": lambda: torch.compile(network(nn.BatchNorm1d(4)), backend="eager"),
    "wrapped": lambda: nn.DataParallel(network(nn.BatchNorm1d(4))),
}
STILL = {
    "layer": lambda: network(nn.LayerNorm(4)),
    "group": lambda: network(nn.GroupNorm(2, 4)),
    "RMS": lambda: network(nn.RMSNorm(4)),
    "no momentum": lambda: network(nn.BatchNorm1d(4, momentum=0.0)),
    "frozen elsewhere": lambda: network(Frozen()),
    "none": lambda: network(),
}


# What it is for


@pytest.fixture(scope="module")
def learned():
    """Real digits, the same in negative, and a network with batch norms that learned the first."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    train(model, data.train, steps=300, seed=0)
    return data, model


def accuracy(model, x, y):
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def after_the_negative(learned, method, freeze):
    """Return the model, and how far its weights have gone, each as far as it counts."""
    data, model = learned
    model = copy.deepcopy(model)
    if freeze:
        freeze_norms(model)
    penalty = method(model, 1e9)
    with warnings.catch_warnings():
        if not freeze:
            warnings.filterwarnings("ignore", WARNING)
        penalty.consolidate(data.train)
    negative = data.x_train.max() - data.x_train
    train(model, (negative, data.y_train), steps=100, seed=0, regularizer=penalty, proximal=True)
    return model, penalty.penalty().item() / penalty.strength


@pytest.mark.parametrize("method", [EWC, L2])
def test_a_task_is_lost_with_every_weight_in_its_place_unless_the_norms_are_frozen(learned, method):
    (data, first), found = learned, {}
    for freeze in (False, True):
        model, moved = after_the_negative(learned, method, freeze)
        assert moved < 1e-6
        found[freeze] = accuracy(model, *data.test)
    assert accuracy(first, *data.test) > 0.9
    assert found[False] < 0.6
    assert found[True] == pytest.approx(accuracy(first, *data.test), abs=0.01)


# The warning


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_will_move_are_named_with_the_way_out_once(name, training):
    model = MOVING[name]()
    model(task()[0])  # gives a lazy layer its shape
    model.train(training)
    ewc = EWC(model, 1.0, "online")
    with pytest.warns(RuntimeWarning, match=WARNING) as warned:
        ewc.consolidate(task())
    assert [w.filename for w in warned] == [__file__]
    assert "ewc_lib.freeze_norms(model)" in str(warned[0].message)
    assert (
        "'1.0.0'" in str(warned[0].message) if name == "nested" else "'1'" in str(warned[0].message)
    )
    ewc.consolidate(task())


@pytest.mark.parametrize("method", [L2, KroneckerLaplace])
def test_other_penalties_warn_as_well(method):
    with pytest.warns(RuntimeWarning, match=WARNING) as warned:
        method(network(nn.BatchNorm1d(4)), 1.0).consolidate(task())
    assert warned[0].filename == __file__


def test_a_fisher_information_from_elsewhere_warns_as_well():
    model = network(nn.BatchNorm1d(4))
    F = fisher_information(model, task())
    with pytest.warns(RuntimeWarning, match=WARNING):
        EWC(model, 1.0).remember(F)


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_move_does_not_warn(name):
    EWC(STILL[name](), 1.0).consolidate(task())


def test_instance_norms_warn_where_they_track_statistics_only():
    data = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    EWC(images(nn.InstanceNorm2d(4)), 1.0).consolidate(data)
    with pytest.warns(RuntimeWarning, match=WARNING):
        EWC(images(nn.InstanceNorm2d(4, track_running_stats=True)), 1.0).consolidate(data)


class KeepsNorms(nn.Sequential):
    """A model that keeps its norms in eval mode itself."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_norms_that_are_kept_in_eval_mode_do_not_warn():
    by_hand = network(nn.BatchNorm1d(4))
    by_hand[1].eval()
    by_itself = KeepsNorms(*network(nn.BatchNorm1d(4)))
    for model in (by_hand, by_itself.train(), copy.deepcopy(by_itself).eval()):
        modes = [module.training for module in model.modules()]
        EWC(model, 1.0).consolidate(task())
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", MOVING)
def test_frozen_norms_do_not_warn(name):
    model = MOVING[name]()
    model(task()[0])
    freeze_norms(model)
    EWC(model, 1.0).consolidate(task())
    EWC(model.eval(), 1.0).consolidate(task())


# Freezing


@pytest.mark.parametrize("name", MOVING)
def test_frozen_statistics_stay_in_training_until_the_handle_ends_it(name):
    model, (x, y) = MOVING[name](), task()
    model(x)
    keys, before = list(model.state_dict()), statistics(model)
    frozen = freeze_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert model.training
    assert same(statistics(model), before)
    assert list(model.state_dict()) == keys
    frozen.remove()
    model(x)
    assert not same(statistics(model), before)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)),
    ],
)
def test_norms_of_images_are_frozen_as_well(norm):
    model, x = images(copy.deepcopy(norm)), torch.randn(6, 1, 4, 4)
    before = statistics(model)
    expected = model.eval()(x)
    with freeze_norms(model.train()) as frozen:
        assert frozen.names == ["1"]
        assert torch.equal(model.train()(x), expected)
    assert same(statistics(model), before)
    assert model[1].training


def test_a_lazy_norm_is_frozen_before_it_has_a_shape():
    model = network(nn.LazyBatchNorm1d())
    freeze_norms(model)
    model.train()(task()[0])
    assert isinstance(model[1], nn.BatchNorm1d)
    assert model[1].num_batches_tracked == 0


class SetsModes(nn.Sequential):
    """A model that sets the modes of its modules without asking them."""

    def train(self, mode=True):
        for module in self.modules():
            module.training = mode
        return self


def test_a_replaced_train_method_does_not_move_them():
    x = task()[0]
    by_class = SetsModes(*network(nn.BatchNorm1d(4)))
    by_attribute, of_the_norm = network(nn.BatchNorm1d(4)), network(nn.BatchNorm1d(4))
    by_attribute.train = lambda mode=True: SetsModes.train(by_attribute, mode)
    own = of_the_norm[1].train = lambda mode=True: setattr(of_the_norm[1], "training", mode)
    for model in (by_class, by_attribute, of_the_norm):
        before, frozen = statistics(model), freeze_norms(model)
        model.train()
        model(x)
        assert same(statistics(model), before)
        frozen.remove()
        model.train()
        model(x)
        assert not same(statistics(model), before)
    assert of_the_norm[1].train is own


def test_a_copy_is_frozen_and_independent():
    model = network(nn.BatchNorm1d(4))
    frozen = freeze_norms(model)
    twin = copy.deepcopy(model)
    frozen.remove()
    assert model.train()[1].training
    before = statistics(twin)
    twin.train()(task()[0])
    assert not twin[1].training
    assert same(statistics(twin), before)


def test_a_handle_that_is_copied_with_its_model_is_that_of_the_copy():
    model = network(nn.BatchNorm1d(4))
    twin, handle = copy.deepcopy((model, freeze_norms(model)))
    handle.remove()
    assert twin.train()[1].training
    assert not model.train()[1].training


def test_a_model_that_was_pickled_whole_stays_frozen():
    model, file = network(nn.BatchNorm1d(4)), io.BytesIO()
    freeze_norms(model)
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    before = statistics(again)
    again.train()(task()[0])
    assert same(statistics(again), before)


def test_states_load_into_frozen_and_free_models_alike():
    model, frozen = network(nn.BatchNorm1d(4)), network(nn.BatchNorm1d(4), seed=1)
    model(task()[0])
    freeze_norms(frozen)
    frozen.load_state_dict(model.state_dict())
    frozen.train()(task()[0])
    assert same(frozen.state_dict(), model.state_dict())
    model.load_state_dict(frozen.state_dict())
    assert model[1].training


def test_freezing_twice_needs_both_handles_to_end():
    model = network(nn.BatchNorm1d(4))
    first = freeze_norms(model)
    with freeze_norms(model):
        pass
    assert not model.train()[1].training
    first.remove()
    first.remove()
    assert model[1].training


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_handles_end_in_any_order_and_the_last_gives_back_what_was_there(order):
    model = network(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    own = model[2].train = lambda mode=True: setattr(model[2], "training", mode)
    before = [set(vars(layer)) for layer in model]
    handles = [freeze_norms(model) for _ in range(3)]
    for i in order:
        model.train()
        assert not model[1].training
        assert not model[2].training
        handles[i].remove()
    assert model[1].training
    model.eval()
    assert not model[1].training
    assert [set(vars(layer)) for layer in model] == before
    assert model[2].train is own


def test_the_end_gives_each_norm_the_mode_that_it_would_have():
    model = network(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[2].eval()
    freeze_norms(model).remove()
    assert (model[1].training, model[2].training) == (True, False)
    frozen = freeze_norms(model.eval())
    model.train()
    frozen.remove()
    assert (model[1].training, model[2].training) == (True, True)


def test_an_error_within_the_block_ends_it():
    model = network(nn.BatchNorm1d(4))
    with pytest.raises(KeyError), freeze_norms(model):
        raise KeyError
    assert model[1].training


def test_a_frozen_norm_costs_no_second_compilation():
    model, graphs = network(nn.BatchNorm1d(4)), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    freeze_norms(model)
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    for _ in range(3):
        compiled.train()
        compiled(task()[0])
    assert len(graphs) == 1


def test_a_program_of_torchscript_is_refused_by_name_and_nothing_changes():
    model = network(nn.BatchNorm1d(4), torch.jit.script(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"\['2'\] are programs of TorchScript"):
        freeze_norms(model)
    assert model.train()[1].training
