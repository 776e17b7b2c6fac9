"""A Trainer of Lightning with the callback, against loops by hand and against itself."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC
from ewc_lib.regularizers import SI
from tests.scenarios import same

PACKAGES = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
if not PACKAGES:
    pytest.skip("Lightning is not installed", allow_module_level=True)

from ewc_lib.integrations.lightning import EWCCallback  # noqa: E402

pl = importlib.import_module("lightning.pytorch" if PACKAGES[0] == "lightning" else PACKAGES[0])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:.*lightning.*")
RATE = 0.2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def task(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


def loader(data, size=8, **options):
    return DataLoader(TensorDataset(*data), size, **options)


class Automatic(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


class Manual(Automatic):
    automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, number))
        optimizer.step()


def fit(module, data, callback, folder, *, ckpt_path=None, val=False, callbacks=(), **options):
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(**settings | options, callbacks=[callback, *callbacks])
    data = loader(data) if isinstance(data, tuple) else data
    trainer.fit(module, data, data if val else None, ckpt_path=ckpt_path)
    return trainer


def parameters(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def by_hand(net, regularizer, data, form, steps=3, autocast=None):
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(net(data[0]), data[1])
        loss.backward()
        regularizer.before_step()
        if form == "gradient":
            regularizer.add_gradient_()
        optimizer.step()
        if form == "proximal":
            regularizer.proximal_step_(optimizer)
        regularizer.after_step()
    regularizer.consolidate(data)


def after_task_a(make=EWC, strength=50.0):
    net = network()
    regularizer = make(net, strength)
    by_hand(net, regularizer, task(0), "gradient", steps=6)
    return net, regularizer


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def wanted(form, make=EWC, strength=50.0, **options):
    net, regularizer = after_task_a(make, strength)
    by_hand(net, regularizer, task(1), form, **options)
    return net, regularizer


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize(("make", "strength"), [(EWC, 50.0), (SI, 200.0)])
def test_it_does_what_the_calls_by_hand_do(make, strength, form, kind, tmp_path):
    one, first = wanted(form, make, strength)
    other, second = after_task_a(make, strength)
    fit(kind(other), task(1), EWCCallback(second, form=form, consolidate_with=True), tmp_path)
    close(parameters(one), parameters(other))
    close(first.state_dict(), second.state_dict())
    assert second.n_tasks == 2
    free, third = after_task_a(make, strength)
    third.strength = 0.0
    fit(kind(free), task(1), EWCCallback(third), tmp_path)
    drift = {n: (parameters(free)[n] - p).abs().max() for n, p in parameters(one).items()}
    assert max(drift.values()) > 1e-3  # without it, it goes elsewhere


@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_under_accumulation_it_acts_once_a_step(form, tmp_path):
    one, _ = wanted(form)
    other, ewc = after_task_a()
    callback = EWCCallback(ewc, form=form)
    fit(Automatic(other), loader(task(1), 2), callback, tmp_path, accumulate_grad_batches=4)
    close(parameters(one), parameters(other))


def test_clipping_clips_the_gradient_of_the_loss_alone(tmp_path):
    net, ewc = after_task_a()
    with torch.no_grad():
        net[0].weight += 1.0
    before = ewc.penalty().item()
    callback = EWCCallback(ewc, form="gradient")
    fit(Automatic(net), task(1), callback, tmp_path, gradient_clip_val=1e-9, max_epochs=1)
    assert ewc.penalty().item() < 0.9 * before


@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "64-true"])
def test_mixed_precision_and_its_scaler_change_no_more_than_they_round(precision, form, tmp_path):
    autocast = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    one, _ = wanted(form, autocast=autocast)
    other, ewc = after_task_a()
    fit(Automatic(other), task(1), EWCCallback(ewc, form=form), tmp_path, precision=precision)
    for name, value in parameters(one).items():
        torch.testing.assert_close(parameters(other)[name].float(), value, rtol=2e-2, atol=2e-3)


class Two(Automatic):
    """Two optimizers that take turns; the penalty holds what one of them moves."""

    automatic_optimization = False

    def __init__(self, net):
        super().__init__(net)
        self.other = nn.Linear(3, 2)

    def training_step(self, batch, number):
        for optimizer, net in zip(self.optimizers(), (self.other, self.net), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), RATE) for m in (self.other, self.net)]


@pytest.mark.parametrize("form", ["proximal", "gradient"])
def test_of_several_optimizers_the_one_that_moves_what_is_held_is_found(form, tmp_path):
    one, _ = wanted(form)
    other, ewc = after_task_a()
    fit(Two(other), task(1), EWCCallback(ewc, form=form), tmp_path)
    close(parameters(one), parameters(other))


class Split(Automatic):
    """Two optimizers, each of which moves a part of what is held."""

    automatic_optimization = False

    def training_step(self, batch, number):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), RATE) for i in (0, 2)]


@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize(("make", "strength"), [(EWC, 50.0), (SI, 200.0)])
def test_several_optimizers_count_the_penalty_once(make, strength, form, tmp_path):
    one, first = wanted(form, make, strength)
    other, second = after_task_a(make, strength)
    fit(Split(other), task(1), EWCCallback(second, form=form, consolidate_with=True), tmp_path)
    close(parameters(one), parameters(other))
    close(first.precision.diagonal(), second.precision.diagonal())


def test_the_log_has_the_penalty_and_the_distance(tmp_path):
    net, ewc = after_task_a()
    trainer = fit(Automatic(net), task(1), EWCCallback(ewc), tmp_path)
    moved = [(p - ewc.anchor[n]).square().sum() for n, p in net.named_parameters()]
    logged = trainer.logged_metrics
    assert logged["ewc/penalty"].item() == pytest.approx(ewc.penalty().item(), rel=1e-5)
    assert logged["ewc/distance"].item() == pytest.approx(sum(moved).sqrt().item(), rel=1e-5)


def test_two_fits_are_two_tasks(tmp_path):
    net = network()
    ewc = EWC(net, 50.0)
    callback = EWCCallback(ewc, consolidate_with=True)
    one = fit(Automatic(net), task(0), callback, tmp_path, max_epochs=6)
    assert ewc.n_tasks == 1
    assert not one.optimizers[0]._optimizer_step_post_hooks
    fit(Automatic(net), task(1), callback, tmp_path)
    by_hand_net, by_hand_ewc = wanted("proximal")
    close(parameters(by_hand_net), parameters(net))
    close(by_hand_ewc.state_dict(), ewc.state_dict())


def test_without_data_for_its_end_a_task_may_be_learned_in_two_fits(tmp_path):
    one, other = network(), network()
    first, second = SI(one, 1.0), SI(other, 1.0)
    fit(Automatic(one), task(0), EWCCallback(first), tmp_path, max_epochs=4)
    for _ in range(2):
        fit(Automatic(other), task(0), EWCCallback(second), tmp_path, max_epochs=2)
    close(first.consolidate(None).values, second.consolidate(None).values)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(task(0))


@pytest.mark.parametrize("kind", ["loader", "module", "tuple", "own"])
def test_the_data_of_a_task_may_come_in_several_forms(kind, tmp_path):
    data = {"loader": loader(task(0), 3), "module": Data(), "tuple": task(0), "own": True}[kind]
    net = network()
    ewc = EWC(net, 1.0)
    fit(Automatic(net), task(0), EWCCallback(ewc, consolidate_with=data), tmp_path)
    close(EWC(net, 1.0).consolidate(task(0)).diagonal(), ewc.precision.diagonal())


class Grouped(EWC):
    """An EWC that notes whether processes are to share the data."""

    def consolidate(self, data, *, group=None, **options):
        self.group = group
        return super().consolidate(data, group=group, **options)


@pytest.mark.parametrize(("kind", "group"), [("own", False), ("loader", None)])
def test_the_own_data_are_read_by_every_process_and_others_as_they_are(kind, group, tmp_path):
    ewc = Grouped(network(), 1.0)
    data = {"loader": loader(task(0), 3), "own": True}[kind]
    fit(Automatic(ewc.model), task(0), EWCCallback(ewc, consolidate_with=data), tmp_path)
    assert ewc.group is group


def test_the_own_data_are_read_once_each_however_they_are_drawn(tmp_path):
    net = network()
    ewc = EWC(net, 1.0)
    weights = torch.arange(8.0)
    sampler = torch.utils.data.WeightedRandomSampler(weights, 32)
    data = loader(task(0), 3, sampler=sampler, drop_last=True)
    fit(Automatic(net), data, EWCCallback(ewc, consolidate_with=True), tmp_path)
    close(EWC(net, 1.0).consolidate(task(0)).diagonal(), ewc.precision.diagonal())


# Checkpoints


def saver(folder, **options):
    return pl.callbacks.ModelCheckpoint(folder, save_last=True, **options)


class Stop(pl.Callback):
    """Ends a training early, at a validation or after a batch."""

    def __init__(self, event, step=2):
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, trainer, *_):
        trainer.should_stop |= trainer.global_step >= self.step


@pytest.mark.parametrize(
    ("saving", "options", "event"),
    [
        ({}, {}, None),
        ({}, {"val": True}, None),
        ({"every_n_train_steps": 2}, {}, None),
        ({"every_n_train_steps": 1}, {"max_steps": 4, "max_epochs": -1}, None),
        ({"monitor": "val"}, {"val": True}, None),
        ({}, {"val": True}, "on_validation_end"),
        ({}, {"val": True, "min_epochs": 2}, "on_validation_end"),
        ({}, {}, "on_train_epoch_end"),
        ({"every_n_train_steps": 1}, {}, "on_train_batch_end"),
        ({"every_n_epochs": 5}, {}, None),
        ({"save_on_train_epoch_end": True}, {"val": True}, None),
    ],
)
def test_the_last_checkpoint_holds_the_task_and_the_others_do_not(saving, options, event, tmp_path):
    net = network()
    ewc = EWC(net, 1.0)
    callbacks = [saver(tmp_path, **{"save_top_k": -1, "monitor": None} | saving)]
    if event:
        callbacks.insert(0, Stop(event))
    fit(Automatic(net), loader(task(0), 4), EWCCallback(ewc, consolidate_with=True), tmp_path,
        enable_checkpointing=True, callbacks=callbacks, **options)  # fmt: skip
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(last["callbacks"]["EWCCallback"]["ewc"], ewc.state_dict())
    assert ewc.n_tasks == 1
    for file in tmp_path.glob("epoch*.ckpt"):
        stored = torch.load(file, weights_only=True)
        state = stored["callbacks"]["EWCCallback"]["ewc"]
        assert state["n_tasks"] == (stored["global_step"] == last["global_step"])


class Fail(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 2:
            raise ZeroDivisionError


def second_task(folder, make=EWC, *, held=True, callbacks=(), **options):
    """Learn task B; a training that resumes knows of task A from the checkpoint alone."""
    if held:
        net, regularizer = after_task_a(make)
    else:
        net = network()
        regularizer = make(net, 50.0)
    callback = EWCCallback(regularizer, consolidate_with=True)
    fit(Automatic(net), loader(task(1), 4), callback, folder,
        **{"max_epochs": 5, "enable_checkpointing": True} | options,
        callbacks=[saver(folder), *callbacks])  # fmt: skip
    return net, regularizer


@pytest.mark.parametrize("make", [EWC, SI])
def test_a_training_that_resumes_ends_bit_by_bit_as_one_that_was_not_interrupted(make, tmp_path):
    net, regularizer = second_task(tmp_path / "whole", make)
    with pytest.raises(ZeroDivisionError):
        second_task(tmp_path / "failed", make, callbacks=[Fail()])
    last = tmp_path / "failed" / "last.ckpt"
    found, restored = second_task(tmp_path / "other", make, held=False, ckpt_path=last)
    assert same(parameters(net), parameters(found))
    assert same(regularizer.state_dict(), restored.state_dict())
    assert restored.n_tasks == 2


def test_what_follows_the_end_of_a_task_is_the_next_one_and_that_is_said(tmp_path):
    second_task(tmp_path)
    last = tmp_path / "last.ckpt"
    _, done = second_task(tmp_path / "done", held=False, ckpt_path=last)
    assert done.n_tasks == 2  # nothing was left to do
    with pytest.warns(RuntimeWarning, match="counts as the next one"):
        _, ewc = second_task(tmp_path / "more", held=False, ckpt_path=last, max_epochs=7)
    assert ewc.n_tasks == 3


@pytest.mark.skipif(len(PACKAGES) < 2, reason="the other package of Lightning is not installed")
def test_the_callback_serves_both_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "pl", importlib.import_module("pytorch_lightning"))
    net = network()
    ewc = EWC(net, 1.0)

    class Other(pl.LightningModule):
        __init__, training_step = Automatic.__init__, Automatic.training_step
        configure_optimizers = Automatic.configure_optimizers

    Other.__init__ = lambda self: (pl.LightningModule.__init__(self), setattr(self, "net", net))[0]
    fit(Other(), task(0), EWCCallback(ewc, consolidate_with=True), tmp_path,
        enable_checkpointing=True, callbacks=[saver(tmp_path)])  # fmt: skip
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(last["callbacks"]["EWCCallback"]["ewc"], ewc.state_dict())
