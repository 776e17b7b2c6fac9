"""The scale of an optimizer's steps, against the steps that it takes."""

import pytest
import torch
from torch import nn

from ewc_lib._metric import SCALES, rates_of

DOUBLE = torch.float64
RATE = 0.01

ADAPTIVE = {
    "Adam": lambda params: torch.optim.Adam(params, lr=RATE),
    "Adam, one by one": lambda params: torch.optim.Adam(params, lr=RATE, foreach=False),
    "Adam, fused": lambda params: torch.optim.Adam(params, lr=RATE, fused=True),
    "Adam, amsgrad": lambda params: torch.optim.Adam(params, lr=RATE, amsgrad=True),
    "Adam, a rate of a tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(RATE)),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=0.0),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, RATE, weight_decay=0, fused=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=RATE),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=RATE, betas=(0.9, 0.9)),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=RATE),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=RATE),
    "RMSprop, centered": lambda params: torch.optim.RMSprop(params, lr=RATE, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=RATE, lr_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=RATE),
}
"""Those whose step is the scale times a gradient that has stayed the same from the beginning."""


class Points(nn.Module):
    def __init__(self, dtype=DOUBLE):
        super().__init__()
        self.a, self.b = (nn.Parameter(draw(3 + i, i).to(dtype)) for i in (0, 1))


def draw(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def step(optimizer, model, gradients):
    """Take a step with gradients; return how far each parameter has moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = None if gradients.get(name) is None else gradients[name].to(p.dtype)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def scales(optimizer, model, metric="optimizer"):
    numbers, below = rates_of(optimizer, dict(model.named_parameters()), metric)
    one = torch.ones((), dtype=DOUBLE)
    return {name: number / below.get(name, one) for name, number in numbers.items()}


def constant(seed=7):
    """Gradients of many sizes."""
    return {"a": draw(3, seed).exp() * 1e-3, "b": -10 * draw(4, seed + 1)}


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_a_step_for_a_gradient_that_stays_is_that_gradient_times_the_scale(name, steps):
    model, gradients = Points(), constant()
    optimizer = ADAPTIVE[name](model.parameters())
    for _ in range(steps):
        moved = step(optimizer, model, gradients)
    found = scales(optimizer, model)
    for n, g in gradients.items():
        torch.testing.assert_close(-found[n] * g, moved[n], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9, nesterov=True),
        lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.8, dampening=0.3),
        lambda params: torch.optim.RMSprop(params, lr=RATE, momentum=0.9, alpha=0.5),
    ],
    ids=["SGD", "Nesterov", "dampened", "RMSprop"],
)
def test_momentum_goes_as_far_as_it_goes_in_the_end(make):
    model, gradients = Points(), constant()
    optimizer = make(model.parameters())
    for _ in range(300):
        moved = step(optimizer, model, gradients)
    for n, scale in scales(optimizer, model).items():
        torch.testing.assert_close(-scale * gradients[n], moved[n], rtol=1e-6, atol=1e-12)


def test_momentum_that_never_ends_leaves_the_learning_rate():
    model = Points()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=1.0)
    step(optimizer, model, constant())
    assert {float(x) for x in scales(optimizer, model).values()} == {RATE}


@pytest.mark.parametrize("name", [n for n in ADAPTIVE if n != "RAdam"])
def test_gradients_that_change_count_by_the_mean_of_their_squares(name):
    """With the first moment at rest, a step is the scale times it, whatever came before."""
    model, optimizer = Points(), None
    optimizer = ADAPTIVE[name](model.parameters())
    for seed in range(20):
        step(optimizer, model, constant(seed))
    before = scales(optimizer, model)
    step(optimizer, model, {n: 100 * g for n, g in constant(50).items()})
    after = scales(optimizer, model)
    if name == "SGD":
        assert all(torch.equal(before[n], after[n]) for n in before)
    else:
        assert all((after[n] < before[n]).all() for n in before)


def test_sparse_adam_has_its_scale():
    model = nn.Embedding(5, 2, sparse=True).double()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=RATE)
    before = model.weight.detach().clone()
    (model(torch.tensor([1, 3])) * torch.tensor([1.0, -20.0])).sum().backward()
    optimizer.step()
    (scale,) = scales(optimizer, model).values()
    rows, gradient = [1, 3], torch.tensor([1.0, -20.0]).double()
    weights = 1 - 0.9  # of the first moment, which is not corrected apart
    moved = (model.weight.detach() - before)[rows]
    torch.testing.assert_close(moved, -scale[rows] * gradient * weights / weights)


def test_radam_has_its_learning_rate_until_it_divides():
    model = Points()
    optimizer = torch.optim.RAdam(model.parameters(), lr=RATE)
    for _ in range(5):
        moved = step(optimizer, model, constant())
    for n, scale in scales(optimizer, model).items():
        assert scale == RATE
        torch.testing.assert_close(-scale * constant()[n], moved[n])


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "Adagrad"])
def test_parameters_with_other_numbers_of_steps_each_have_their_own(name):
    model, gradients = Points(), constant()
    optimizer = ADAPTIVE[name](model.parameters())
    for t in range(9):
        some = gradients if t % 3 == 0 else {"a": gradients["a"]}
        moved = step(optimizer, model, some)
    step(optimizer, model, some)
    moved = step(optimizer, model, gradients)
    found = scales(optimizer, model)
    for n, g in gradients.items():
        torch.testing.assert_close(-found[n] * g, moved[n], rtol=1e-6, atol=1e-12)


def test_a_number_of_steps_that_cannot_be_read_gives_the_same(monkeypatch):
    for name in ("Adam", "NAdam", "RAdam", "Adagrad"):
        model = Points()
        optimizer = ADAPTIVE[name](model.parameters())
        for _ in range(8):
            step(optimizer, model, constant())
        expected = scales(optimizer, model)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            found = scales(optimizer, model)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Adam", "Adagrad", "SGD"])
def test_a_parameter_without_a_gradient_so_far_has_the_learning_rate(name):
    model, gradients = Points(), constant()
    optimizer = ADAPTIVE[name](model.parameters())
    assert all(scale == RATE for scale in scales(optimizer, model).values())
    step(optimizer, model, {"a": gradients["a"]})
    assert scales(optimizer, model)["b"] == RATE


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_euclidean_metric_has_the_learning_rate_of_each_group(name):
    model = Points()
    groups = [{"params": [model.b], "lr": 0.5}, {"params": [model.a], "lr": 0.125}]
    optimizer = ADAPTIVE[name](groups)
    step(optimizer, model, constant())
    assert {n: float(s) for n, s in scales(optimizer, model, "euclidean").items()} == {
        "a": 0.125,
        "b": 0.5,
    }


def test_each_group_has_its_own_numbers():
    model, gradients = Points(), constant()
    groups = [
        {"params": [model.b], "lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1},
        {"params": [model.a], "amsgrad": True},
    ]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    for _ in range(3):
        moved = step(optimizer, model, gradients)
    for n, scale in scales(optimizer, model).items():
        torch.testing.assert_close(-scale * gradients[n], moved[n], rtol=1e-6, atol=1e-12)


def test_the_two_parts_of_a_complex_number_are_two_entries():
    model = nn.Module()
    model.c = nn.Parameter(torch.complex(draw(3, 0), draw(3, 1)))
    gradients = {"c": torch.complex(draw(3, 2), 100 * draw(3, 3))}
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(3):
        moved = step(optimizer, model, gradients)
    found = scales(optimizer, model)["c"] * torch.view_as_real(gradients["c"])
    torch.testing.assert_close(-found, torch.view_as_real(moved["c"]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_of_half_precision_is_one_of_single_precision(dtype):
    model = Points(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-3)
    step(optimizer, model, {"a": torch.ones(3), "b": torch.ones(4)})
    for scale in scales(optimizer, model).values():
        assert scale.dtype == torch.float32
        torch.testing.assert_close(scale, torch.full_like(scale, RATE), rtol=0.02, atol=0)


def test_what_a_wrapper_or_a_class_of_ones_own_does_is_what_is_inside():
    class Own(torch.optim.AdamW):
        pass

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    model = Points()
    optimizer = Own(model.parameters(), lr=RATE)
    step(optimizer, model, constant())
    torch.testing.assert_close(scales(Wrapper(optimizer), model), scales(optimizer, model))
    assert all(scale.dim() for scale in scales(optimizer, model).values())


UNKNOWN = ["ASGD", "Adadelta", "Adafactor", "Muon", "Rprop"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_known_scale_is_refused_but_for_its_learning_rate(name):
    model = nn.Linear(3, 2, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match=f"that of {name} is not known: use form='gradient'"):
        scales(optimizer, model)
    step(optimizer, model, {"weight": torch.ones(2, 3)})
    assert scales(optimizer, model, "euclidean") == {"weight": RATE}


def test_an_optimizer_of_ones_own_is_refused_too():
    class Own(torch.optim.Optimizer):
        pass

    model = Points()
    with pytest.raises(ValueError, match="that of Own is not known"):
        scales(Own(model.parameters(), {"lr": RATE}), model)


@pytest.mark.parametrize("metric", ["optimizer", "euclidean"])
def test_lbfgs_and_what_has_no_rate_are_refused_in_every_metric(metric):
    model = Points()
    with pytest.raises(ValueError, match="LBFGS remembers"):
        scales(torch.optim.LBFGS(model.parameters()), model, metric)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="needs the learning rate"):
        scales(optimizer, model, metric)


def test_every_optimizer_of_pytorch_was_decided_on():
    known = {c.__name__ for c in SCALES}
    there = {n for n, c in vars(torch.optim).items() if isinstance(c, type)}
    assert there - {"LBFGS", "Optimizer", *UNKNOWN} == known


@pytest.mark.parametrize("method", [torch.optim.Adam, torch.optim.AdamW])
def test_a_first_step_that_a_scaler_leaves_out_of_a_fused_kernel_is_no_step(method):
    model = torch.nn.Linear(3, 2)
    optimizer = method(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(4, 3)).sum()).backward()
    model.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    found = rates_of(optimizer, dict(model.named_parameters()), "optimizer")
    assert found.numbers == {"weight": 0.01, "bias": 0.01}
    assert found.divisors == {}
