"""A diagonal from the second moments of an optimizer."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib.continual import mlp
from ewc_lib.fisher import Diagonal


def task(n=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator, dtype=dtype), torch.arange(n) % 2


def trained(make, steps=4, batch_size=3, **options):
    """A network after some steps, its optimizer, and the gradients that this was given."""
    model, (x, y), seen = mlp((3, 4, 2), seed=0).double(), task(), []
    optimizer = make(model.parameters(), **options)
    for t in range(steps):
        rows = (torch.arange(batch_size) + batch_size * t) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return model, optimizer, seen


def averaged(seen, beta):
    """Their squares, the latest of which count most, divided by the sum of all weights."""
    weights = [beta ** (len(seen) - 1 - t) for t in range(len(seen))]
    return {
        name: sum(w * g[name] ** 2 for w, g in zip(weights, seen, strict=True)) / sum(weights)
        for name in seen[0]
    }


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam])
@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_they_are_the_average_of_the_squares_times_the_batch_size(make, beta):
    model, optimizer, seen = trained(make, betas=(0.5, beta))
    found = Diagonal.from_optimizer(optimizer, model, batch_size=3)
    for name, want in averaged(seen, beta).items():
        torch.testing.assert_close(found.values[name], 3 * want)
    assert found.kind == "second moments"
    assert found.n_samples == 12


def test_with_amsgrad_it_is_the_average_too_and_not_the_maximum():
    options = {"betas": (0.5, 0.5), "lr": 0.3}
    model, optimizer, seen = trained(torch.optim.Adam, steps=6, amsgrad=True, **options)
    found = Diagonal.from_optimizer(optimizer, model, batch_size=3).values
    largest = {name: optimizer.state[p]["max_exp_avg_sq"] for name, p in model.named_parameters()}
    for name, want in averaged(seen, 0.5).items():
        torch.testing.assert_close(found[name], 3 * want)
    assert any((3 * largest[name] > 1.01 * found[name]).any() for name in found)


@pytest.mark.claim("eq-batch-mean")
def test_at_rest_and_one_observation_a_batch_they_are_the_empirical_fisher():
    model, (x, y) = mlp((3, 4, 2), seed=0).double(), task()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))
    for n in range(len(x)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        optimizer.step()
    found = Diagonal.from_optimizer(optimizer, model, batch_size=1)
    want = fisher_information(model, (x, y), kind="empirical")
    for name, value in want.diagonal().items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=1e-12)


def test_of_a_mean_over_positions_they_are_those_of_whole_sequences():
    """At rest, as the empirical Fisher of sequences, whose loss is a sum over positions."""
    torch.manual_seed(0)
    model, (x, y) = mlp((3, 4, 2), seed=0).double(), (torch.randn(12, 5, 3).double(), task(60)[1])
    y = y.reshape(12, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))
    for n in range(len(x)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[n]), y[n]).backward()  # the mean of five terms
        optimizer.step()
    found = Diagonal.from_optimizer(optimizer, model, batch_size=1, positions=5)
    want = fisher_information(model, (x, y), kind="empirical")
    for name, value in want.diagonal().items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=1e-12)


def test_under_accumulation_a_batch_is_that_of_the_step():
    (model, whole, _), (other, parts, _) = (trained(torch.optim.Adam, steps=0) for _ in range(2))
    x, y = task()
    for rows in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        net = model if len(rows) == 1 else other
        for part in rows:
            (nn.functional.cross_entropy(net(x[part]), y[part]) / len(rows)).backward()
    whole.step()
    parts.step()
    one, two = (
        Diagonal.from_optimizer(optimizer, net, batch_size=8).values
        for optimizer, net in ((whole, model), (parts, other))
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)


@pytest.mark.parametrize("positions", [0, -1, float("nan"), float("inf"), "16"])
def test_positions_are_a_positive_number(positions):
    model, optimizer, _ = trained(torch.optim.Adam)
    with pytest.raises(ValueError, match="positions must be a positive number"):
        Diagonal.from_optimizer(optimizer, model, batch_size=3, positions=positions)


def test_they_imply_no_strength_by_themselves_because_they_count_repeats():
    model, optimizer, _ = trained(torch.optim.Adam)
    ewc = EWC(model, strength=2.0, kind="second moments")
    ewc.remember(Diagonal.from_optimizer(optimizer, model, batch_size=3))
    with pytest.raises(ValueError, match="so give n_a"):
        ewc.bayesian_strength(12)
    assert ewc.bayesian_strength(12, n_a=24) == 2.0


def test_they_cannot_be_computed_from_data_and_who_asks_is_told_of_what():
    model = mlp((3, 4, 2), seed=0).double()
    with pytest.raises(ValueError, match=r"Diagonal\.from_optimizer"):
        fisher_information(model, task(), kind="second moments")


def test_what_never_had_a_gradient_has_zero():
    model, optimizer, _ = trained(torch.optim.Adam, steps=0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    found = Diagonal.from_optimizer(optimizer, model, batch_size=3)
    assert found.values["0.weight"].gt(0).all()
    assert found.values["0.bias"].eq(0).all()
    assert (found.paths["0.weight"], found.paths["0.bias"]) == ("rule", "unused")


def test_complex_parameters_have_the_squared_sizes_of_their_gradients():
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    optimizer = torch.optim.Adam(model.parameters())
    model.w.grad = torch.tensor([3 + 4j, 1j], dtype=torch.complex128)
    optimizer.step()
    found = Diagonal.from_optimizer(optimizer, model, batch_size=1).values["w"]
    torch.testing.assert_close(found, torch.tensor([25.0, 1.0], dtype=torch.float64))


def test_params_chooses_and_n_samples_says_what_it_counts_for():
    model, optimizer, _ = trained(torch.optim.Adam)
    found = Diagonal.from_optimizer(optimizer, model, batch_size=3, params="2.*", n_samples=7)
    assert set(found.values) == {"2.weight", "2.bias"}
    assert found.n_samples == 7


def test_later_steps_do_not_change_it():
    model, optimizer, _ = trained(torch.optim.Adam)
    found = Diagonal.from_optimizer(optimizer, model, batch_size=1)
    before = {name: value.clone() for name, value in found.values.items()}
    optimizer.step()
    for name, value in before.items():
        torch.testing.assert_close(found.values[name], value)


@pytest.mark.parametrize("steps", [0, 4])
def test_an_optimizer_without_second_moments_is_refused(steps):
    for make, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})):
        model, optimizer, _ = trained(make, steps=steps, lr=0.1, **options)
        with pytest.raises(
            ValueError, match=r"holds no second moment of each entry of '0\.weight'"
        ):
            Diagonal.from_optimizer(optimizer, model, batch_size=3)


def test_an_optimizer_that_has_made_no_step_is_refused():
    model, optimizer, _ = trained(torch.optim.Adam, steps=0)
    with pytest.raises(ValueError, match="has made no step"):
        Diagonal.from_optimizer(optimizer, model, batch_size=3)


def test_a_parameter_that_the_optimizer_does_not_have_is_refused():
    model, optimizer, _ = trained(torch.optim.Adam)
    other = nn.Sequential(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"does not have parameter '1\.weight'"):
        Diagonal.from_optimizer(optimizer, other, batch_size=3)


def test_a_batch_size_is_a_positive_whole_number():
    model, optimizer, _ = trained(torch.optim.Adam)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Diagonal.from_optimizer(optimizer, model, batch_size=0)
