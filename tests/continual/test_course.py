"""Tasks of one's own, in the forms that people have them, are learned one after another."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ewc_lib import EWC, data
from ewc_lib.continual import (
    MultiHead,
    Task,
    accuracy,
    average_accuracy,
    forgetting,
    learn,
    mlp,
    permuted,
    split,
)
from ewc_lib.regularizers import MAS, SI, LwF, Replay

QUICK = {"steps": 20, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def equal(a, b):
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def learned(tasks, make, method=lambda model: EWC(model, 30.0), **options):
    model = make()
    return learn(tasks, model, method(model), **QUICK | options), weights(model)


def network():
    return mlp((64, 16, 10), seed=0)


@pytest.mark.parametrize("n_samples", [None, 50])
@pytest.mark.parametrize("form", [tuple, lambda pair: TensorDataset(*pair)], ids=["tuple", "set"])
def test_tasks_in_a_list_are_learned_as_a_stream_is(digits, form, n_samples):
    stream = permuted(digits, 3, seed=0)
    tasks = [(task.name, form(task.train), form(task.test)) for task in stream]
    expected, same = learned(stream, network, n_samples=n_samples)
    found, own = learned(tasks, network, n_samples=n_samples)
    assert torch.equal(own, same)
    assert equal(found.accuracies, expected.accuracies)
    assert equal(found.initial, expected.initial)
    assert found.names == expected.names == list(stream.names)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_tasks_that_say_their_outputs_are_learned_as_in_their_scenario(digits, scenario):
    stream = split(digits, scenario=scenario)
    make = lambda: MultiHead(mlp((64, 16, stream.n_outputs), seed=0))  # noqa: E731
    expected, same = learned(stream, make)
    found, own = learned(list(stream), make)
    assert torch.equal(own, same)
    assert equal(found.accuracies, expected.accuracies)
    assert equal(found.initial, expected.initial)


def test_a_generator_is_read_once_and_keeps_one_training_set_at_a_time(digits):
    stream, made, alive = permuted(digits, 4, seed=0), [], []

    def tasks():
        for task in stream:
            gc.collect()
            x, y = task.train[0].clone(), task.train[1]
            alive.append(sum(old() is not None for old in made))
            made.append(weakref.ref(x))
            yield task.name, (x, y), task.test
            del x

    expected, same = learned(stream, network)
    found, own = learned(tasks(), network)
    assert torch.equal(own, same)
    assert equal(found.accuracies, expected.accuracies)
    assert found.initial[0] == expected.initial[0]
    assert found.initial[1:].isnan().all()
    assert alive == [0, 0, 0, 0]


class Disk(Dataset):
    """Images on a disk, that counts how many are in memory."""

    def __init__(self, x, y):
        self.x, self.y, self.alive, self.most, self.read = x, y, 0, 0, 0

    def __len__(self):
        return len(self.y)

    def _gone(self):
        self.alive -= 1

    def __getitem__(self, i):
        x = self.x[i].clone()
        self.read += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(x, self._gone)
        return x, int(self.y[i])


@pytest.mark.parametrize("method", [lambda m: EWC(m, 30.0), lambda m: SI(m, 1.0), LwF])
def test_images_on_a_disk_are_never_in_memory_at_once(digits, method):
    parts = [Disk(*part) for task in permuted(digits, 2, seed=0) for part in task[1:3]]
    loaders = [DataLoader(part, batch_size=16, shuffle=True, num_workers=0) for part in parts]
    found, _ = learned(
        [("a", *loaders[:2]), ("b", *loaders[2:])], network, method, epochs=1, steps=None
    )
    assert average_accuracy(found.accuracies) > 0.3
    assert parts[0].read >= len(parts[0])
    assert all(part.most <= 2 * 16 for part in parts)


class Endless(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def test_a_data_set_that_is_read_from_end_to_end_is_learned(digits):
    x, y = digits.train
    stream, test = Endless(x, y), Endless(*digits.test)
    found, _ = learned([("one", stream, test)], network, steps=300)
    assert found.accuracies[0, 0] > 0.8


# Other targets than classes


def straight(shift):
    """Return one task of each kind of target, for a linear model."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(int(shift)))
    line = x @ torch.tensor([[1.0, -1.0], [0.5, shift], [0.0, 1.0]])
    noise = torch.rand(line.shape, generator=torch.Generator().manual_seed(7))
    return x, {
        "gaussian": line,
        "bernoulli": (noise < line.sigmoid()).float(),
        "poisson": torch.poisson(line.clamp(max=2).exp(), torch.Generator().manual_seed(1)),
    }


LOSSES = {
    "gaussian": lambda f, y: 0.5 * (f - y).square() + 0.5 * math.log(2 * math.pi),
    "bernoulli": partial(nn.functional.binary_cross_entropy_with_logits, reduction="none"),
    "poisson": lambda f, y: f.exp() - y * f + torch.lgamma(y + 1),
}


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("likelihood", LOSSES)
def test_ewc_holds_the_first_task_whatever_the_targets_are(likelihood, loader):
    tasks = []
    for shift in (0.0, 2.0):
        x, targets = straight(shift)
        pair = (x, targets[likelihood])
        batches = DataLoader(TensorDataset(*pair), batch_size=25) if loader else pair
        tasks.append((f"shift {shift}", batches, pair))
    kept = {}
    for strength in (0.0, 100.0):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        ewc = EWC(model, strength, likelihood=likelihood)
        sgd = partial(torch.optim.SGD, lr=0.1)
        found = learn(tasks, model, ewc, steps=120, optimizer=sgd, proximal=True, batch_size=25)
        kept[strength] = found.accuracies
        x, y = tasks[1][2]
        value = -LOSSES[likelihood](model(x), y).sum(1).mean()
        assert found.accuracies[1, 1] == pytest.approx(float(value.detach()), rel=1e-4)
    assert found.accuracies[0, 0] > found.initial[0]
    assert forgetting(kept[100.0]) < 0.3 * forgetting(kept[0.0])
    assert forgetting(kept[0.0]) > 0.05


def test_numbers_without_a_likelihood_or_a_criterion_are_refused_before_training():
    x, targets = straight(0.0)
    tasks = [("one", (x, targets["gaussian"]), (x, targets["gaussian"]))]
    model = nn.Linear(3, 2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"criterion=torch\.nn\.MSELoss\(\)"):
        learn(tasks, model, MAS(model, 1.0), steps=1)
    assert torch.equal(weights(model), before)
    found = learn(tasks, model, MAS(model, 1.0), epochs=20, criterion=nn.MSELoss())
    error = (model(x) - targets["gaussian"]).square().mean()
    assert found.accuracies[0, 0] == pytest.approx(-float(error.detach()), rel=1e-5)


def test_pixels_are_learned_and_judged_one_by_one():
    x = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    y[:, 0, 0] = -100
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    found = learn([("pixels", (x, y), (x, y))], model, steps=300, batch_size=32)
    assert found.accuracies[0, 0] == accuracy(model, (x, y)) > 0.9


# Models and batches of other libraries


def words(seed, n=24):
    ids = torch.randint(2, 13, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]


def test_a_classifier_of_texts_is_learned_from_dicts_by_its_own_loss():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 13}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, num_labels=2))
    tasks = []
    for t in (0, 1):
        part = [{**b, "labels": (b["input_ids"][:, 0] > 7).long()} for b in words(t)]
        tasks.append((f"texts {t}", part, part))
    adam = partial(torch.optim.AdamW, lr=1e-2)
    found = learn(tasks, model, EWC(model, 1.0), epochs=30, optimizer=adam)
    assert found.accuracies[1, 1] > 0.9


def test_a_language_model_is_judged_by_the_loss_that_it_is_trained_by():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=6)
    model = GPT2LMHeadModel(config)
    tasks = []
    for t in (0, 1):
        part = [{**b, "labels": b["input_ids"]} for b in words(t)]
        tasks.append((f"texts {t}", part, part))
    adam = partial(torch.optim.AdamW, lr=1e-2)
    found = learn(tasks, model, EWC(model, 1.0), epochs=10, optimizer=adam)
    assert -2.6 < found.initial[0] < -2.5  # minus log 13: it knows nothing
    model.eval()
    losses = [float(model(**batch).loss.detach()) for batch in tasks[0][1]]
    assert found.accuracies[1, 0] == pytest.approx(-sum(losses) / 3, rel=1e-5)


def test_a_function_picks_from_longer_batches_for_training_tests_and_regularizer(digits):
    x, y = digits.train
    short = [("one", (x, y), digits.test), ("two", (x.flip(1), y), digits.test)]
    longer = [
        (name, TensorDataset(a, torch.zeros(len(b)), b), (c, torch.zeros(len(d)), d))
        for name, (a, b), (c, d) in short
    ]
    for method in (lambda m: EWC(m, 30.0), lambda m: Replay(m, capacity=3)):
        expected, same = learned(short, network, method)
        found, own = learned(longer, network, method, batch=lambda b: (b[0], b[2]))
        assert torch.equal(own, same)
        assert equal(found.accuracies, expected.accuracies)


# Options


def test_what_evaluate_returns_is_what_is_held(digits):
    stream = permuted(digits, 2, seed=0)
    tasks = [(task.name, task.train, t) for t, task in enumerate(stream)]
    seen = []

    def evaluate(model, test):
        seen.append((test, model.training))
        return 10 * len(seen) + test

    model = network()
    found = learn(tasks, model, evaluate=evaluate, **QUICK)
    assert [test for test, _ in seen] == [0, 1, 0, 1, 0, 1]
    assert not any(training for _, training in seen)
    assert found.initial.tolist() == [10, 21]
    assert found.accuracies.tolist() == [[30, 41], [50, 61]]


def test_a_task_without_test_data_is_learned_and_not_measured(digits):
    found, _ = learned([("one", digits.train, None), ("two", digits.train, digits.test)], network)
    assert found.accuracies.isnan().tolist() == [[True, False], [True, False]]


def test_each_task_begins_at_the_rate_of_the_optimizer(digits):
    rates = []

    def watched(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=21)

    stream = permuted(digits, 3, seed=0)
    sgd = partial(torch.optim.SGD, lr=0.25, momentum=0.5)
    learned(stream, network, scheduler=watched, optimizer=sgd)
    assert rates == [[0.25]] * 3


@pytest.mark.parametrize("form", ["list", "generator"])
def test_learning_goes_on_from_a_checkpoint_with_the_same_bits(digits, tmp_path, form):
    class Noisy(Dataset):
        """A data set whose items draw from the global random state."""

        def __init__(self, x, y):
            self.x, self.y = x, y

        def __len__(self):
            return len(self.y)

        def __getitem__(self, i):
            return self.x[i] + 0.1 * torch.randn(64), self.y[i]

    def tasks(n=3):
        for t, task in enumerate(permuted(digits, 3, seed=0)):
            if t == n:
                raise KeyboardInterrupt
            loader = DataLoader(Noisy(*task.train), batch_size=32, shuffle=True)
            yield f"task {t}", loader, DataLoader(Noisy(*task.test), batch_size=100, shuffle=True)

    make = lambda: nn.Sequential(*network(), nn.Dropout(0.2))  # noqa: E731
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20)
    options = {"scheduler": cosine, "checkpoint": tmp_path / "run.pt"}
    given = (lambda: list(tasks())) if form == "list" else tasks
    torch.manual_seed(5)
    expected, same = learned(given(), make, **options | {"checkpoint": None})
    if form == "list":
        model = make()
        stopped = EWC(model, 30.0)
        consolidate, done = stopped.consolidate, []

        def interrupted(part):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(consolidate(part))

        stopped.consolidate = interrupted
        with pytest.raises(KeyboardInterrupt):
            learn(given(), model, stopped, **QUICK | options)
    else:
        with pytest.raises(KeyboardInterrupt):
            learned(tasks(2), make, **options)
    torch.manual_seed(9)
    found, own = learned(given(), make, **options)
    assert torch.equal(own, same)
    assert equal(found.accuracies, expected.accuracies)
    assert equal(found.initial, expected.initial)


def test_a_checkpoint_of_other_tasks_or_another_loss_is_refused(digits, tmp_path):
    path = tmp_path / "run.pt"
    options = {"checkpoint": path, "criterion": nn.CrossEntropyLoss()}
    tasks = [("one", digits.train, digits.test)]
    learned(tasks, network, **options)
    other = [("one", (digits.x_train.flip(0), digits.y_train), digits.test)]
    with pytest.raises(ValueError, match=r"stream\.tasks was"):
        learned(other, network, **options)
    smooth = nn.CrossEntropyLoss(ignore_index=3)
    with pytest.raises(ValueError, match=r"training\.criterion was 'Cross.* is 'lambda|training"):
        learned(tasks, network, **options | {"criterion": lambda f, y: smooth(f, y)})
    path.unlink()
    learned(iter(tasks), network, **options)
    with pytest.raises(ValueError, match="another configuration: task 0 was 'one' and is 'uno'"):
        learned(iter([("uno", *tasks[0][1:])]), network, **options)


# What is refused


@pytest.mark.parametrize("tasks", ["tasks", torch.zeros(3), nn.Linear(1, 1), 3, None])
def test_what_holds_no_tasks_is_refused(tasks):
    with pytest.raises(TypeError, match=r"tasks must be a Stream, or an iterable of \(name, train"):
        learn(tasks, network(), steps=1)


@pytest.mark.parametrize("task", [("one", 1), "one", {"name": "one"}, torch.zeros(3)])
def test_a_task_in_another_form_is_refused(task):
    with pytest.raises(ValueError, match=r"a task must be \(name, train, test\)"):
        learn([task], network(), steps=1)


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="no task to learn"):
        learn(iter([]), network(), steps=1)


def test_data_that_can_be_read_only_once_are_refused(digits):
    once = iter([digits.train])
    for task in (("one", once, digits.test), ("one", digits.train, once)):
        with pytest.raises(ValueError, match=r"data of task 'one' are an iterator.*only once"):
            learn([task], network(), steps=1)


def test_outputs_that_a_model_cannot_choose_are_refused(digits):
    task = Task("one", digits.train, digits.test, range(2))
    with pytest.raises(TypeError, match="must be a MultiHead, got Sequential"):
        learn([task], network(), steps=1)


def test_the_heads_that_were_chosen_stay_where_tasks_choose_none(digits):
    model = MultiHead(mlp((64, 12), seed=0))
    model.outputs = range(2, 12)
    learn([("one", digits.train, digits.test)], model, **QUICK)
    assert model.outputs == range(2, 12)
