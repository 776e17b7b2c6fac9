"""Gradients of a parameter from what arrived at its uses, also through tensors computed from it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_lib.score import gradients as module
from ewc_lib.score import memory
from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.forward_pass import pull_through
from ewc_lib.score.gradients import ParameterGradients, UseInBatch, pull_back, selects_entries
from ewc_lib.score.record import ParameterUse
from ewc_lib.score.rules import (
    Broadcast,
    Convolution,
    Factors,
    OuterProduct,
    Products,
    Rows,
    Scale,
)
from ewc_lib.score.squares import SquareSums
from tests.budgets import set_budget

N = 5


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameter(*shape):
    return normal(*shape, seed=7).requires_grad_()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-11, atol=1e-12)


ORDER = torch.tensor([2, 0, 3])
REPEATS = torch.tensor([2, 0, 2])

REARRANGED = {
    "itself": lambda w: w,
    "transpose": lambda w: w.T,
    "slice": lambda w: w[1:, :2],
    "one row": lambda w: w[2],
    "lookup": lambda w: w[ORDER],
    "lookup by embedding": lambda w: F.embedding(ORDER, w),
    "view": lambda w: w.view(2, -1),
    "copy": lambda w: w.clone().contiguous(),
    "flip": lambda w: w.flip(0),
    "joined with zeros": lambda w: torch.cat([w, w.new_zeros(1, 3)]),
    "masked": lambda w: w * (torch.arange(3) > 0),
    "shifted": lambda w: w + 1,
}
CHANGED = {
    "scaled": lambda w: 2 * w,
    "negative": lambda w: -w,
    "halved": lambda w: w / 2,
    "scaled in part": lambda w: w * torch.tensor([1.0, 1.0, 3.0]),
    "repeated": lambda w: w.repeat(1, 2),
    "repeated lookup": lambda w: w[REPEATS],
    "expanded": lambda w: w.expand(2, 4, 3),
    "mean": lambda w: w.mean(0),
    "differences": lambda w: w.diff(dim=0),
    "mixed": lambda w: w @ normal(3, 3),
    "normalised": lambda w: w / w.norm(dim=1, keepdim=True),
    "curved": lambda w: w.tanh(),
    "joined with itself": lambda w: torch.cat([w, w.T @ w]),
}


@pytest.mark.parametrize("derive", REARRANGED.values(), ids=REARRANGED)
def test_entries_that_only_move_are_rearranged(derive):
    weight = parameter(4, 3)
    assert selects_entries(derive(weight), weight)


@pytest.mark.parametrize("derive", CHANGED.values(), ids=CHANGED)
def test_entries_that_are_scaled_summed_or_repeated_are_not(derive):
    weight = parameter(4, 3)
    assert not selects_entries(derive(weight), weight)


@pytest.mark.parametrize("derive", REARRANGED.values(), ids=REARRANGED)
def test_squares_of_selected_entries_are_pulled_back_like_gradients(derive):
    weight = parameter(4, 3)
    source = derive(weight)
    values = normal(*source.shape)
    squares = pull_back(source, weight, values.square())
    assert close(squares, pull_back(source, weight, values).square())


def test_asking_leaves_the_graph_and_the_random_state():
    weight = parameter(4, 3)
    source, state = weight.T, torch.get_rng_state()
    assert selects_entries(source, weight)
    assert selects_entries(source, weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is None


# Pulling back

DERIVED = REARRANGED | CHANGED


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_a_gradient_is_pulled_back_as_autograd_does_alone_and_in_a_batch(derive):
    weight = parameter(4, 3)
    source = derive(weight)
    values = normal(N, *source.shape)
    if source is weight:
        expected = values
    else:
        expected = torch.stack(
            [torch.autograd.grad(source, weight, v, retain_graph=True)[0] for v in values]
        )
    assert close(pull_back(source, weight, values[0]), expected[0])
    assert close(pull_back(source, weight, values), expected)


class Doubled(torch.autograd.Function):
    """Its way back takes one gradient only, as that of an einsum does."""

    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, g):
        return torch.einsum("ij,->ij", g, g.new_tensor(2.0))


def test_what_cannot_go_back_in_a_batch_goes_one_by_one():
    w = torch.randn(2, 3, requires_grad=True)
    values = torch.randn(4, 2, 3)
    source = Doubled.apply(w)
    with pytest.raises(RuntimeError, match="Batch"):
        torch.autograd.grad(source, w, values, retain_graph=True, is_grads_batched=True)
    assert torch.equal(pull_back(source, w, values), 2 * values)


def test_what_is_pulled_back_keeps_the_precision_of_the_sums():
    weight = parameter(4, 3).detach().to(torch.float16).requires_grad_()
    back = pull_back(weight.T, weight, torch.ones(3, 4))
    assert back.dtype == torch.float32
    assert back.shape == (4, 3)


# Uses in a batch


def use_in_batch(source, rule, a, axis=None, shape=(), dtype=torch.float64, room=0):
    use = ParameterUse(source, rule, a, None, torch.Size(shape), "")
    return UseInBatch.of(use, axis or BatchAxis(), N, dtype, room)


def test_a_reading_cuts_its_input_and_what_arrives_alike():
    weight, axis = parameter(2, 3), BatchAxis(1)
    found = use_in_batch(weight, OuterProduct(weight.shape), normal(4, N, 3), axis)
    assert torch.equal(found.input, axis.split(normal(4, N, 3), N))
    assert found.cut(normal(1, 4, N, 2)).shape == (1, N, 4, 1, 2)
    both = normal(2, 4, N, 2)
    assert torch.equal(found.cut(both)[1], axis.split(both[1], N))
    assert found.source is weight


def test_conversion_keeps_the_indices_of_a_table():
    found = use_in_batch(
        parameter(3, 2), Rows(torch.Size([3, 2])), torch.zeros(N, 4).long(), dtype=torch.float32
    )
    assert found.input.dtype == torch.int64
    assert found.cut(torch.ones(1, N, 4, 2, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_inputs_are_converted_before_anything_is_multiplied(half):
    weight = parameter(2, 3)
    a = (1e-5 * normal(N, 3)).to(half)
    found = use_in_batch(weight, OuterProduct(weight.shape), a, dtype=torch.float32)
    assert found.input.dtype == torch.float32
    assert torch.equal(found.input.squeeze(1), a.float())


def test_only_what_was_copied_is_counted():
    kernel = parameter(2, 3, 2)
    rule = Convolution(kernel.shape, (1,), ((0, 0),), (1,), 1)
    images = normal(N, 3, 4)
    windows = N * 3 * 2 * 3 * 8
    assert use_in_batch(kernel, rule, images, room=windows).copied == windows
    assert use_in_batch(kernel, rule, images, room=windows - 1).copied < windows
    weight = parameter(2, 3)
    linear = OuterProduct(weight.shape)
    assert use_in_batch(weight, linear, normal(N, 3)).copied == 0
    assert use_in_batch(weight, linear, normal(N, 3), dtype=torch.float32).copied == N * 3 * 4


# Gradients through several uses


class Function:
    """A function of a parameter and of inputs, with the uses that a watcher would find."""

    def __init__(self, parameter, function, uses):
        self.parameter, self.function = parameter, function
        self.uses = [use_in_batch(*use) for use in uses]

    def gradients(self, at_outputs, selects_entries):
        gs = [r.cut(g[None]) for r, g in zip(self.uses, at_outputs, strict=True)]
        return ParameterGradients(self.parameter, self.uses, gs, selects_entries)

    def by_observation(self, at_outputs):
        """Gradient of each observation by autograd."""
        found = []
        for n in range(N):
            value = sum(
                (out[n] * g[n]).sum() for out, g in zip(self.function(), at_outputs, strict=True)
            )
            found.append(torch.autograd.grad(value, self.parameter, retain_graph=True)[0])
        return torch.stack(found)


def one_use():
    w, x = parameter(2, 3), normal(N, 4, 3)
    return Function(w, lambda: [F.linear(x, w)], [(w, OuterProduct(w.shape), x)]), True


def squares_factorise():
    w, x = parameter(2, 3), normal(N, 3)
    return Function(w, lambda: [F.linear(x, w)], [(w, OuterProduct(w.shape), x)]), True


def several_uses():
    w, x, tokens = parameter(4, 3), normal(N, 2, 3), torch.arange(2 * N).reshape(N, 2) % 4
    uses = [
        (w, OuterProduct(w.shape), x),
        (w, Rows(w.shape), tokens),
        (w, Scale(w.shape), normal(N, 4, 3, seed=3)),
    ]
    return (
        Function(
            w, lambda: [F.linear(x, w), F.embedding(tokens, w), w * normal(N, 4, 3, seed=3)], uses
        ),
        True,
    )


def of_a_transpose():
    w, x = parameter(3, 2), normal(N, 4, 3)
    t = w.T
    return Function(w, lambda: [F.linear(x, t)], [(t, OuterProduct(t.shape), x)]), True


def of_a_transpose_twice():
    w, x, z = parameter(3, 2), normal(N, 4, 3), normal(N, 3, seed=4)
    t = w.T
    uses = [(t, OuterProduct(t.shape), x), (t, OuterProduct(t.shape), z)]
    return Function(w, lambda: [F.linear(x, t), F.linear(z, t)], uses), True


def two_uses_of_one_term():
    w, x, z = parameter(2, 3), normal(N, 3), normal(N, 3, seed=4)
    uses = [(w, OuterProduct(w.shape), x), (w, OuterProduct(w.shape), z)]
    return Function(w, lambda: [F.linear(x, w), F.linear(z, w)], uses), True


def of_a_slice_in_one_term():
    w, x = parameter(5, 3), normal(N, 3)
    part = w[1:3]
    return Function(w, lambda: [F.linear(x, part)], [(part, OuterProduct(part.shape), x)]), True


def of_a_product():
    w, x = parameter(2, 3), normal(N, 4, 3)
    scaled = w * normal(2, 1)
    return Function(
        w, lambda: [F.linear(x, scaled)], [(scaled, OuterProduct(scaled.shape), x)]
    ), False


def of_a_product_in_one_term():
    w, x = parameter(2, 3), normal(N, 3)
    scaled = w.tanh()
    return Function(
        w, lambda: [F.linear(x, scaled)], [(scaled, OuterProduct(scaled.shape), x)]
    ), False


def of_different_tensors():
    """The parameter itself, a transpose and a normalised one."""
    w, x, z = parameter(3, 3), normal(N, 4, 3), normal(N, 3, seed=4)
    t, u = w.T, w / w.norm()
    uses = [
        (w, OuterProduct(w.shape), x),
        (t, OuterProduct(t.shape), z),
        (u, Broadcast(u.shape), normal(N, 3, 3)),
    ]
    function = Function(w, lambda: [F.linear(x, w), F.linear(z, t), normal(N, 3, 3) + u], uses)
    return function, False


def at_every_position():
    """As in a recurrent network, and once at two positions together."""
    w = parameter(8, 9)
    inputs = [normal(N, 9, seed=i) for i in range(4)] + [normal(N, 2, 9, seed=9)]
    uses = [(w, OuterProduct(w.shape), x) for x in inputs]
    return Function(w, lambda: [F.linear(x, w) for x in inputs], uses), True


def at_every_position_through_a_product():
    w = parameter(8, 9)
    scaled = w / w.norm(dim=1, keepdim=True)
    inputs = [normal(N, 9, seed=i) for i in range(4)]
    uses = [(scaled, OuterProduct(scaled.shape), x) for x in inputs]
    return Function(w, lambda: [F.linear(x, scaled) for x in inputs], uses), False


def on_images_of_two_sizes():
    """The kernel of two groups, which is scaled entry by entry, too."""
    w, factor = parameter(4, 2, 2), normal(N, 4, 2, 2, seed=3)
    images = [normal(N, 4, width, seed=i) for i, width in enumerate((2, 2, 5))]
    rule = Convolution(w.shape, (1,), ((0, 0),), (1,), 2)
    uses = [*((w, rule, x) for x in images), (w, Scale(w.shape), factor)]
    outputs = lambda: [*(F.conv1d(x, w, groups=2) for x in images), w * factor]  # noqa: E731
    return Function(w, outputs, uses), True


FUNCTIONS = (
    one_use,
    squares_factorise,
    several_uses,
    of_a_transpose,
    of_a_transpose_twice,
    two_uses_of_one_term,
    of_a_slice_in_one_term,
    of_a_product,
    of_a_product_in_one_term,
    of_different_tensors,
    at_every_position,
    at_every_position_through_a_product,
    on_images_of_two_sizes,
)


@pytest.fixture(params=FUNCTIONS, ids=lambda make: make.__name__)
def case(request):
    function, selects_entries = request.param()
    at_outputs = [normal(*out.shape, seed=5 + i) for i, out in enumerate(function.function())]
    return function.gradients(at_outputs, selects_entries), function.by_observation(at_outputs)


def test_gradients_of_all_uses_add_up(case):
    gradients, expected = case
    assert close(gradients.gradients(), expected)
    assert close(gradients.gradients(slice(1, 3)), expected[1:3])


def added(add, like, *args):
    out = normal(*like.shape, seed=9)
    add(out, *args)
    return out - normal(*like.shape, seed=9)


def squared(gradients, like, budget=None):
    """Add up squared gradients, on top of something."""
    out, squares = normal(*like.shape, seed=9), SquareSums(budget or memory.CPU)
    gradients.add_squares(out, squares)
    squares.finish()
    return out - normal(*like.shape, seed=9)


def test_totals_are_sums(case):
    gradients, expected = case
    assert close(added(gradients.add_total, expected[0]), expected.sum(0))


@pytest.mark.parametrize("size", [1, 200, 2**22])
def test_gradients_are_added_before_they_are_squared(case, size, monkeypatch):
    gradients, expected = case
    set_budget(monkeypatch, squares=size)
    assert close(squared(gradients, expected[0]), expected.square().sum(0))
    on_gpu = replace(memory.accelerator(2**35), squares=size, limit=size, cuts=None)
    assert close(squared(gradients, expected[0], on_gpu), expected.square().sum(0))


def test_columns_that_went_back_together_are_those_that_went_alone(case):
    gradients, expected = case
    both = replace(
        gradients, output_gradients=[torch.cat([g, -2 * g]) for g in gradients.output_gradients]
    )
    assert len(both) == 2
    assert close(both.column(1).gradients(), -2 * expected)
    for budget in (memory.CPU, memory.accelerator(2**35)):
        assert close(squared(both, expected[0], budget), 5 * expected.square().sum(0))
    if both.squares_factorise:
        found = added(both.add_squares_of_terms, expected[0], both.squared_terms())
        assert close(found, 5 * expected.square().sum(0))


@pytest.mark.parametrize("rows", [1, 3])
def test_uses_may_be_joined_for_a_few_observations_at_a_time(case, rows, monkeypatch):
    gradients, expected = case
    at_outputs = [g[0] for g in gradients.output_gradients]
    tensors = [*at_outputs, *(use.input for use in gradients.uses)]
    one = sum(t[0].numel() * t.element_size() for t in tensors)
    set_budget(monkeypatch, rows=rows * one)
    largest, join = [0], Products.join

    def watched(rule, uses):
        joined = join(rule, uses)
        largest.append(sum(t.numel() * t.element_size() for t in joined[1:]))
        return joined

    monkeypatch.setattr(Products, "join", watched)
    assert close(squared(gradients, expected[0]), expected.square().sum(0))
    assert close(gradients.gradients(), expected)
    assert close(gradients.gradients(slice(1, 5)), expected[1:5])
    assert max(largest) <= rows * one


@pytest.mark.parametrize("make", [at_every_position, at_every_position_through_a_product])
def test_uses_at_many_positions_take_one_product(make, monkeypatch):
    function, selects_entries = make()
    at_outputs = [normal(*out.shape) for out in function.function()]
    products = []

    def watched(rule, a):
        products.append(a.shape[:3])
        return a

    monkeypatch.setattr(Factors, "input_rows", watched)
    gradients = function.gradients(at_outputs, selects_entries)
    gradients.gradients()
    squared(gradients, torch.zeros(8, 9))
    positions = sum(out[0].numel() // 8 for out in at_outputs)
    assert products == [(N, 1, positions)] * 2


def test_uses_at_so_many_positions_that_a_copy_would_cost_more_stay_apart(monkeypatch):
    w = parameter(8, 9)
    inputs = [normal(N, 9, 9, seed=i) for i in range(3)]
    uses = [(w, OuterProduct(w.shape), x) for x in inputs]
    function = Function(w, lambda: [F.linear(x, w) for x in inputs], uses)
    at_outputs = [normal(*out.shape) for out in function.function()]
    monkeypatch.delattr(Products, "join")
    found = function.gradients(at_outputs, selects_entries=True).gradients()
    assert close(found, function.by_observation(at_outputs))


def test_what_was_computed_from_a_parameter_is_pulled_back_once(monkeypatch):
    shapes = []

    def watched(source: Tensor, parameter: Tensor, values: Tensor) -> Tensor:
        shapes.append(values.shape)
        return pull_back(source, parameter, values)

    monkeypatch.setattr(module, "pull_back", watched)
    function, selects_entries = at_every_position_through_a_product()
    at_outputs = [normal(*out.shape) for out in function.function()]
    gradients = function.gradients(at_outputs, selects_entries)
    gradients.add_total(torch.zeros(8, 9, dtype=torch.float64))
    squared(gradients, torch.zeros(8, 9))
    assert shapes == [(8, 9), (N, 8, 9)]


def test_squares_of_terms_may_be_added_over_columns_first(case):
    gradients, expected = case
    if gradients.squares_factorise:
        terms = gradients.squared_terms()
        found = added(gradients.add_squares_of_terms, expected[0], 3 * terms)
        assert close(found, 3 * expected.square().sum(0))


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_only_one_use_of_one_term_of_moved_entries_is_one_term(make):
    function, selects_entries = make()
    at_outputs = [normal(*out.shape) for out in function.function()]
    expected = make in (squares_factorise, of_a_slice_in_one_term)
    assert function.gradients(at_outputs, selects_entries).squares_factorise == expected


def test_without_signs_a_total_shows_the_size_of_its_terms():
    for make in (one_use, squares_factorise, several_uses):
        function, selects_entries = make()
        at_outputs = [normal(*out.shape, seed=5 + i) for i, out in enumerate(function.function())]
        gradients = function.gradients(at_outputs, selects_entries)
        sizes = added(gradients.absolute().add_total, function.parameter)
        assert (sizes >= added(gradients.add_total, function.parameter).abs() - 1e-12).all()
        flipped = function.gradients(
            [g * normal(*g.shape, seed=6).sign() for g in at_outputs], selects_entries
        )
        assert close(added(flipped.absolute().add_total, function.parameter), sizes)


def test_squares_of_moved_entries_are_pulled_back_once(monkeypatch):
    """Not the gradients of all observations, one after the other."""
    shapes = []

    def watched(source: Tensor, parameter: Tensor, values: Tensor) -> Tensor:
        shapes.append(values.shape)
        return pull_back(source, parameter, values)

    monkeypatch.setattr(module, "pull_back", watched)
    for make in (of_a_transpose, of_a_transpose_twice):
        function, selects_entries = make()
        gradients = function.gradients(
            [normal(*out.shape) for out in function.function()], selects_entries
        )
        squared(gradients, torch.zeros(3, 2))
    assert shapes == [(2, 3), (2, 3)]


SMALL = """
import sys
import torch
from ewc_lib import fisher_information

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
fisher_information(model, (torch.randn(20, 3), torch.arange(20) % 2))
assert "sympy" not in sys.modules
"""


def test_a_process_does_not_import_what_only_symbolic_shapes_need():
    """It would take half a second and 40 MiB."""
    subprocess.run([sys.executable, "-c", SMALL], check=True, cwd=Path(__file__).parents[2])


def test_a_column_is_pulled_through_as_a_vector_jacobian_product():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    output, column = x.square().cumsum(0), torch.randn(5, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(output, x, column, retain_graph=True)
    with torch.no_grad():
        found, nothing = pull_through(output, [x, unused], column)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert nothing is None


@pytest.mark.parametrize("masked", [-torch.inf, torch.inf, torch.nan])
def test_outputs_that_are_not_finite_do_not_spoil_the_gradients_of_others(masked):
    x = torch.ones(4, requires_grad=True)
    output = torch.where(torch.tensor([True, False, True, True]), 3 * x, masked)
    (found,) = pull_through(output, [x], torch.tensor([1.0, 0.0, 2.0, 3.0]))
    assert found.tolist() == [3, 0, 6, 9]
