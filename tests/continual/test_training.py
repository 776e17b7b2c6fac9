import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import EWC, data
from ewc_lib.continual import accuracy, mlp, train
from ewc_lib.continual.training import proximal_metric
from ewc_lib.regularizers import Replay


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_mlp_has_the_given_sizes_with_relu_between():
    model = mlp((64, 16, 8, 10), seed=0)
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(m.weight.shape) for m in model[::2]] == [(16, 64), (8, 16), (10, 8)]


def test_mlp_is_fixed_by_its_seed_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    assert torch.equal(weights(mlp((4, 3), seed=1)), weights(mlp((4, 3), seed=1)))
    assert not torch.equal(weights(mlp((4, 3), seed=1)), weights(mlp((4, 3), seed=2)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_learns_the_digits(digits):
    model = mlp((64, 32, 10), seed=0)
    losses = train(model, digits.train, steps=300, seed=0)
    assert len(losses) == 300
    assert losses[0] == pytest.approx(2.3, abs=0.15)  # log 10: it knows nothing
    assert accuracy(model, digits.test) > 0.9


def test_training_repeats_for_equal_seeds_and_differs_for_others(digits):
    runs = []
    for seed in (0, 0, 1):
        model = mlp((64, 10), seed=0)
        train(model, digits.train, steps=20, seed=seed)
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_one_pass_uses_every_observation_once():
    x = torch.arange(12.0).unsqueeze(1)
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, inputs):
            seen.extend(inputs[:, 0].tolist())
            return super().forward(inputs)

    train(Spy(1, 2), (x, torch.zeros(12, dtype=torch.long)), steps=3, seed=0, batch_size=4)
    assert sorted(seen) == list(range(12))


def test_batches_larger_than_the_data_set_are_filled_by_further_passes():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    sizes = []

    class Spy(torch.nn.Linear):
        def forward(self, inputs):
            sizes.append(len(inputs))
            return super().forward(inputs)

    train(Spy(2, 2), (x, torch.zeros(3, dtype=torch.long)), steps=2, seed=0, batch_size=8)
    assert sizes == [8, 8]


def test_the_penalty_holds_the_weights_near_the_anchor(digits):
    moved = {}
    for strength in (0.0, 1e3):
        model = mlp((64, 10), seed=0)
        train(model, digits.train, steps=100, seed=0)
        ewc = EWC(model, strength=strength)
        fisher = ewc.consolidate(digits.train)
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        flipped = (digits.x_train.flip(1), digits.y_train)
        train(model, flipped, steps=100, seed=1, regularizer=ewc)
        step = {name: p.detach() - anchor[name] for name, p in model.named_parameters()}
        moved[strength] = float(fisher.quadratic(step))
    assert 0 < moved[1e3] < 0.1 * moved[0.0]


def test_on_step_sees_every_update(digits):
    steps = []
    train(mlp((64, 10), seed=0), digits.train, steps=5, seed=0, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]


def test_no_step_changes_nothing(digits):
    model = mlp((64, 10), seed=0)
    assert train(model, digits.train, steps=0, seed=0) == []
    assert torch.equal(weights(model), weights(mlp((64, 10), seed=0)))


@pytest.mark.parametrize(
    ("n", "n_labels", "options", "message"),
    [
        (0, 0, {}, "one label for each input, got 0 and 0"),
        (4, 3, {}, "one label for each input, got 4 and 3"),
        (4, 5, {}, "one label for each input, got 4 and 5"),
        (4, 4, {"batch_size": 0}, "batch_size be positive, got 1 and 0"),
        (4, 4, {"steps": -1}, "steps must not be negative .* got -1"),
    ],
)
def test_training_refuses_what_has_no_batches(n, n_labels, options, message):
    data = torch.zeros(n, 4), torch.zeros(n_labels, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        train(mlp((4, 2), seed=0), data, **{"steps": 1, "seed": 0} | options)


def test_a_regularizer_without_a_proximal_step_is_refused_before_training(digits):
    model = mlp((64, 10), seed=0)
    with pytest.raises(ValueError, match="Replay has no proximal step"):
        train(model, digits.train, steps=5, seed=0, regularizer=Replay(model), proximal=True)
    assert torch.equal(weights(model), weights(mlp((64, 10), seed=0)))


def test_dropout_is_repeated_by_the_seed_and_the_global_state_is_left_alone(digits):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = torch.random.get_rng_state()
        model = torch.nn.Sequential(*mlp((64, 10), seed=0), torch.nn.Dropout(0.5))
        train(model, digits.train, steps=5, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_work_on_the_cpu_does_not_seed_the_accelerators(digits, monkeypatch):
    def refuse(seed):
        raise AssertionError(f"seeded by {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    train(mlp((64, 10), seed=0), digits.train, steps=1, seed=0)


def test_a_batch_is_of_the_same_size_and_order_whatever_the_regularizer(digits):
    seen = []
    for strength in (None, 0.0):
        model = mlp((64, 10), seed=0)
        ewc = None if strength is None else EWC(model, strength)
        if ewc is not None:
            ewc.consolidate(digits.train)
        seen.append(train(model, digits.train, steps=20, seed=0, regularizer=ewc))
    assert seen[0] == seen[1]


def test_a_data_set_trains_as_its_tensors_do(digits):
    found = []
    for own in (digits.train, TensorDataset(*digits.train)):
        model = nn.Sequential(*mlp((64, 10), seed=0), nn.Dropout(0.5))
        found.append((train(model, own, steps=30, seed=3), weights(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_seed_orders_a_loader_that_shuffles_and_the_global_state_is_left_alone(digits):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = torch.random.get_rng_state()
        loader = DataLoader(TensorDataset(*digits.test), batch_size=32, shuffle=True)
        model = mlp((64, 10), seed=0)
        losses = train(model, loader, epochs=2, seed=seed)
        accuracy(model, loader)
        assert torch.equal(before, torch.random.get_rng_state())
        assert len(losses) == 2 * len(loader)
        found.append(losses)
    assert found[0] == found[1] != found[2]


def test_numbers_are_not_taken_for_probabilities_of_classes(digits):
    x, y = digits.train
    model = nn.Linear(64, 1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"criterion=torch\.nn\.MSELoss.*'gaussian'"):
        train(model, (x, y.float()[:, None]), steps=3)
    assert torch.equal(weights(model), before)
    losses = train(model, (x, y.float()[:, None]), epochs=30, criterion=nn.MSELoss())
    assert losses[0] > 20
    assert sum(losses[-9:]) / 9 < 8.25  # the variance of the digits: better than any constant


def test_the_likelihood_of_the_regularizer_is_trained_before_there_is_a_task(digits):
    x, y = digits.train
    model, other = nn.Linear(64, 1), nn.Linear(64, 1)
    other.load_state_dict(model.state_dict())
    pair = (x, y.double()[:, None].float())
    train(model, pair, steps=20, regularizer=EWC(model, 1.0, likelihood="gaussian"))
    train(other, pair, steps=20, criterion=lambda f, t: (f - t).square().mean() / 2)
    torch.testing.assert_close(weights(model), weights(other))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_narrow_integers(digits, dtype):
    x, y = digits.train
    found = [mlp((64, 10), seed=0) for _ in range(2)]
    train(found[0], (x, y), steps=5)
    train(found[1], (x, y.to(dtype)), steps=5)
    assert torch.equal(*map(weights, found))
    assert accuracy(found[0], (x, y.to(dtype))) == accuracy(found[0], (x, y))


def test_labels_in_a_column_are_refused_with_the_way_out(digits):
    x, y = digits.train
    for call in (lambda m, d: train(m, d, steps=1), accuracy):
        with pytest.raises(ValueError, match=r"by y\.squeeze\(-1\)"):
            call(mlp((64, 10), seed=0), (x, y[:, None]))


def test_a_batch_may_be_one_observation(digits):
    x, y = digits.test
    assert len(train(mlp((64, 10), seed=0), (x[:5], y[:5]), epochs=2, batch_size=1)) == 10


class Norms(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))


def test_what_was_put_in_eval_mode_within_a_model_in_training_mode_stays_frozen(digits):
    model = Norms()
    model[1].eval()
    mean = model[1].running_mean.clone()
    train(model, digits.train, steps=3)
    accuracy(model, digits.test)
    train(model, digits.train, steps=3)
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, mean)


def test_a_model_in_eval_mode_is_trained_as_a_whole(digits):
    model = Norms().eval()
    mean = model[1].running_mean.clone()
    train(model, digits.train, steps=3)
    assert all(m.training for m in model.modules())
    assert not torch.equal(model[1].running_mean, mean)


def test_a_scheduler_is_stepped_after_each_update(digits):
    model, rates = mlp((64, 10), seed=0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def halving(one):
        assert one is optimizer
        return torch.optim.lr_scheduler.ExponentialLR(one, 0.5)

    train(
        model,
        digits.train,
        steps=4,
        optimizer=optimizer,
        scheduler=halving,
        on_step=lambda _: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == [0.5, 0.25, 0.125, 0.0625]


def test_a_function_picks_inputs_and_targets_from_longer_batches(digits):
    x, y = digits.train
    longer = (x, torch.zeros(len(y)), y)
    found = [mlp((64, 10), seed=0) for _ in range(3)]
    pick = lambda b: (b[0], b[2])  # noqa: E731
    train(found[0], (x, y), steps=5)
    train(found[1], longer, steps=5, batch=pick)
    train(found[2], TensorDataset(*longer), steps=5, batch=pick)
    assert torch.equal(weights(found[0]), weights(found[1]))
    assert torch.equal(weights(found[0]), weights(found[2]))
    assert accuracy(found[0], longer, batch=pick) == accuracy(found[0], (x, y))
    with pytest.raises(ValueError, match=r"must be a pair.*batch=lambda"):
        train(found[0], longer, steps=1)


def test_an_optimizer_and_a_scheduler_are_given_or_made(digits):
    found = []
    for given in (True, False):
        model = mlp((64, 10), seed=0)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        if given:
            optimizer = optimizer(model.parameters())
            scheduler = scheduler(optimizer)
        train(model, digits.train, steps=4, optimizer=optimizer, scheduler=scheduler)
        found.append(weights(model))
    assert torch.equal(*found)


def test_a_scheduler_that_needs_a_loss_is_refused(digits):
    with pytest.raises(ValueError, match=r"needs a loss.*on_step"):
        train(
            mlp((64, 10), seed=0),
            digits.train,
            steps=1,
            scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau,
        )


def test_a_proximal_step_may_name_its_metric_and_no_other_word():
    assert [proximal_metric(word) for word in (False, True, "optimizer", "euclidean")] == [
        None,
        "optimizer",
        "optimizer",
        "euclidean",
    ]
    with pytest.raises(ValueError, match="proximal must be one of 'optimizer', 'euclidean', True"):
        proximal_metric("adam")


def test_no_tensor_of_a_step_outlives_it(digits):
    kept = []

    def count(_):
        kept.append(sum(torch.is_tensor(one) for one in gc.get_objects()))

    losses = train(mlp((64, 8, 10), seed=0), digits.train, steps=20, seed=0, on_step=count)
    assert kept[1] == kept[-1]
    assert [type(loss) for loss in losses] == [float] * 20
