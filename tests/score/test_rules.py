"""Every rule against autograd, one observation at a time."""

from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from ewc_lib.score import memory
from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.operations import match
from ewc_lib.score.rules import (
    Broadcast,
    Convolution,
    Einsum,
    OuterProduct,
    Products,
    Rows,
    Scale,
    TransposedConvolution,
    add_squared_products,
)
from ewc_lib.score.squares import SquareSums
from tests.scenarios import PROPERTY


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one_by_one(operation, parameter, a, g):
    """Gradient of the parameter for each observation, by autograd alone."""
    parameter = parameter.clone().requires_grad_()
    found = []
    for alone, arriving in zip(a, g, strict=True):
        output = operation(alone, parameter)
        assert output.shape == arriving.shape
        found.append(torch.autograd.grad(output, parameter, arriving)[0])
    return torch.stack(found)


def outputs(operation, parameter, a, seed):
    """Random gradients of the outputs of all observations."""
    shape = operation(a[0], parameter).shape
    return normal(len(a), *shape, seed=seed)


def check(rule, operation, parameter, a, seed=1, other=None):
    """Compare everything a rule can do with autograd.

    ``a`` holds one observation per row, each in the form that the operation sees; ``other`` is
    what the rule needs instead, as the normalised input of a normalisation.
    """
    g = outputs(operation, parameter, a, seed)
    expected = one_by_one(operation, parameter, a, g)
    other = a if other is None else other
    before = other.clone(), g.clone()
    close = partial(torch.allclose, rtol=1e-11, atol=1e-11)
    start = normal(*parameter.shape, seed=9)
    assert rule.shape == parameter.shape
    for room in (0, 2**20):
        ready = rule.prepare(other, room)
        assert close(rule.gradients(ready, g), expected)
        assert close(added(rule.add_total, start, ready, g), start + expected.sum(0))
        squares = start + expected.square().sum(0)
        # Pieces of less than one observation, of about two, and of all of them.
        for size in (1, 2 * 8 * parameter.numel(), 2**22):
            for budget in (
                replace(memory.CPU, squares=size),
                replace(ON_GPU, squares=size, limit=size, cuts=None),
            ):
                found = squared(rule.add_squares, start, budget, ready, g.unsqueeze(0))
                assert close(found, squares)
                both = torch.stack([g, 2 * g])  # along two output columns at once
                found = squared(rule.add_squares, start, budget, ready, both)
                assert close(found, start + 5 * expected.square().sum(0))
        if rule.squares_factorise(ready, g):
            of_terms = added(rule.add_total, start, ready.square(), g.square())
            assert close(of_terms, squares)
        if isinstance(rule, Products):  # two uses of it, as one
            joined, a_of_both, g_of_both = rule.join([(ready, g[None]), (ready, 2 * g[None])])
            assert joined.shape == rule.shape
            assert close(joined.gradients(a_of_both, g_of_both[0]), 3 * expected)
            total = added(joined.add_total, start, a_of_both, g_of_both[0])
            assert close(total, start + 3 * expected.sum(0))
            found = squared(joined.add_squares, start, memory.CPU, a_of_both, g_of_both)
            assert close(found, start + 9 * expected.square().sum(0))
    assert torch.equal(other, before[0])
    assert torch.equal(g, before[1])
    return rule.squares_factorise(ready, g)


def added(add, start, *args):
    out = start.clone()
    add(out, *args)
    return out


def squared(add, start, budget, *args):
    out, squares = start.clone(), SquareSums(budget)
    add(out, *args, squares)
    squares.finish()
    return out


ON_GPU = memory.accelerator(2**35)
SEEDS = st.integers(0, 1000)
POSITIONS = st.lists(st.integers(1, 3), max_size=2)
COUNTS = st.integers(1, 4)


# Linear maps


@PROPERTY
@given(COUNTS, POSITIONS, COUNTS, COUNTS, st.booleans(), SEEDS)
def test_matrices_on_the_right(n, positions, n_in, n_out, transposed, seed):
    a = normal(n, *positions, n_in, seed=seed)
    weight = normal(*((n_in, n_out) if transposed else (n_out, n_in)))
    operation = torch.matmul if transposed else F.linear
    factorise = check(OuterProduct(weight.shape, transposed), operation, weight, a, seed + 1)
    assert factorise == (torch.Size(positions).numel() == 1)


@PROPERTY
@given(COUNTS, POSITIONS, COUNTS, COUNTS, COUNTS, st.booleans(), SEEDS)
def test_matrices_on_the_left(n, positions, n_in, n_out, columns, transposed, seed):
    a = normal(n, *positions, n_in, columns, seed=seed)
    weight = normal(*((n_in, n_out) if transposed else (n_out, n_in)))
    rule = OuterProduct(weight.shape, transposed, from_left=True)
    factorise = check(rule, lambda a, w: (w.mT if transposed else w) @ a, weight, a, seed + 1)
    assert factorise == (torch.Size(positions).numel() * columns == 1)


def test_input_and_output_rows_are_the_factors_of_a_gradient():
    for from_left in (False, True):
        rule = OuterProduct(torch.Size([3, 2]), from_left=from_left)
        a, g = normal(4, 5, 2), normal(4, 5, 3, seed=1)
        a, g = (a.mT, g.mT) if from_left else (a, g)
        assert rule.input_rows(a).shape == (4, 1, 5, 2)
        assert rule.output_rows(a, g).shape == (4, 1, 5, 3)
        product = rule.output_rows(a, g).mT @ rule.input_rows(a)
        assert torch.allclose(product[:, 0], rule.gradients(a, g))


@PROPERTY
@given(COUNTS, COUNTS, st.integers(1, 5), st.integers(1, 7), COUNTS, st.integers(1, 400), SEEDS)
def test_products_are_squared_in_pieces_of_any_size(
    n, groups, positions, rows, columns, size, seed
):
    left = normal(n, groups, positions, rows, seed=seed)
    right = normal(n, groups, positions, columns, seed=seed + 1)
    expected = torch.einsum("ngtl,ngtr->nglr", left, right).square().sum(0)
    start = torch.ones(groups, rows, columns).double()
    for budget in (
        replace(memory.CPU, squares=size),
        replace(ON_GPU, squares=size, limit=size, cuts=None),
    ):
        found = squared(add_squared_products, start, budget, left[None], right)
        assert torch.allclose(found, 1 + expected, rtol=1e-11, atol=1e-11)
        both = torch.stack([left, -2 * left])
        found = squared(add_squared_products, start, budget, both, right)
        assert torch.allclose(found, 1 + 5 * expected, rtol=1e-11, atol=1e-11)


def test_no_piece_of_the_squares_is_larger_than_the_cache(monkeypatch):
    """One observation at a time where it fits, and strips of its rows where it does not."""
    pieces, bmm = [], torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b, out: pieces.append(out.nbytes) or bmm(a, b, out=out)
    )
    left, right = normal(6, 1, 3, 16), normal(6, 1, 3, 8)
    for size in (8 * 8, 5 * 8 * 8, 16 * 8 * 8, 40 * 8 * 8):
        pieces.clear()
        budget = replace(memory.CPU, squares=size)
        squared(add_squared_products, torch.zeros(1, 16, 8).double(), budget, left[None], right)
        assert max(pieces) <= size
        assert sum(pieces) == 6 * 16 * 8 * 8


# Convolutions


@st.composite
def convolutions(draw):
    """Sizes and options of a convolution that has an output."""
    space = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(space))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    size = tuple(
        d * (k - 1) + 1 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)
    )
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    return space, groups, kernel, stride, dilation, size, *channels


def rule_of(function, a, w, **options):
    (_, rule, other), *_ = match(function, (a, w), options)
    assert other() is a
    return rule


SAME = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@SAME
@PROPERTY
@given(COUNTS, st.integers(1, 2), convolutions(), st.data(), SEEDS)
def test_convolutions(n, positions, sizes, data, seed):
    space, groups, kernel, stride, dilation, size, n_in, n_out = sizes
    padding = data.draw(
        st.one_of(
            st.tuples(*[st.integers(0, 2)] * space),
            st.sampled_from(["valid"] if max(stride) > 1 else ["valid", "same"]),
        )
    )
    a = normal(n, positions, n_in, *size, seed=seed)
    weight = normal(n_out, n_in // groups, *kernel)
    function = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    rule = rule_of(function, a[0], weight, **options)
    assert type(rule) is Convolution
    check(rule, partial(function, **options), weight, a, seed + 1)


@PROPERTY
@given(COUNTS, st.integers(1, 2), convolutions(), st.data(), SEEDS)
def test_transposed_convolutions(n, positions, sizes, data, seed):
    space, groups, kernel, stride, dilation, size, n_in, n_out = sizes
    # What is padded is cut off, and something must be left.
    padding = tuple(
        data.draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True)
    )
    more = tuple(
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    a = normal(n, positions, n_in, *size, seed=seed)
    weight = normal(n_in, n_out // groups, *kernel)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1]
    options = {
        "stride": stride,
        "padding": padding,
        "output_padding": more,
        "dilation": dilation,
        "groups": groups,
    }
    rule = rule_of(function, a[0], weight, **options)
    assert type(rule) is TransposedConvolution
    check(rule, partial(function, **options), weight, a, seed + 1)


@SAME
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_padding_of_even_and_odd_widths_that_keeps_the_size(kernel, dilation):
    a, weight = normal(3, 1, 2, 7), normal(4, 2, kernel)
    options = {"padding": "same", "dilation": dilation}
    rule = rule_of(F.conv1d, a[0], weight, **options)
    check(rule, partial(F.conv1d, **options), weight, a)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_as_large_as_the_image_has_one_term(groups):
    a, weight = normal(3, 1, 4, 3, 2), normal(6, 4 // groups, 3, 2)
    rule = rule_of(F.conv2d, a[0], weight, groups=groups)
    assert check(rule, partial(F.conv2d, groups=groups), weight, a)
    rule = rule_of(F.conv2d, a[0], weight, groups=groups, padding=1)
    assert not check(rule, partial(F.conv2d, groups=groups, padding=1), weight, a)


def test_windows_are_copied_only_if_there_is_room():
    rule = rule_of(F.conv2d, normal(1, 2, 5, 5), normal(3, 2, 3, 3))
    a, needed = normal(4, 1, 2, 5, 5), 4 * 2 * 9 * 9 * 8
    view, copy = rule.prepare(a, needed - 1), rule.prepare(a, needed)
    assert torch.equal(view, copy)
    assert view.untyped_storage().nbytes() == a.nbytes
    assert copy.untyped_storage().nbytes() == needed


@pytest.mark.parametrize(
    "images",
    [
        lambda: normal(6, 2, 5, 4)[1:5],
        lambda: normal(4, 2, 4, 5).mT,
        lambda: normal(4, 5, 4, 2).movedim(-1, 1),
        lambda: normal(4, 2, 5, 1).expand(4, 2, 5, 4),
        lambda: normal(4, 2, 10, 8)[:, :, ::2, ::2],
    ],
    ids=["part of a tensor", "transposed", "channels last", "expanded", "every other"],
)
@pytest.mark.parametrize("padding", [0, 1])
def test_windows_of_any_memory_layout(images, padding):
    images, weight = images(), normal(3, 2, 2, 3)
    a = BatchAxis().split(images, 4)
    rule = rule_of(F.conv2d, images, weight, padding=padding)
    check(rule, partial(F.conv2d, padding=padding), weight, a)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_convolution_are_the_factors_of_a_gradient(groups):
    a, weight = normal(4, 1, 2, 5, 5), normal(6, 2 // groups, 3, 3)
    rule = rule_of(F.conv2d, a[0], weight, stride=2, groups=groups)
    windows, g = rule.prepare(a, 0), normal(4, 1, 6, 2, 2, seed=1)
    inputs, outputs = rule.input_rows(windows), rule.output_rows(windows, g)
    assert inputs.shape == (4, groups, 4, 18 // groups)
    assert outputs.shape == (4, groups, 4, 6 // groups)
    product = (outputs.mT @ inputs).reshape(4, *weight.shape)
    assert torch.allclose(product, rule.gradients(windows, g))


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_the_factors_of_a_gradient(groups):
    a, weight = normal(4, 1, 2, 3), normal(2, 4 // groups, 2)
    rule = rule_of(F.conv_transpose1d, a[0], weight, stride=2, groups=groups)
    g = normal(4, 1, 4, 6, seed=1)
    inputs, outputs = rule.input_rows(a), rule.output_rows(a, g)
    assert inputs.shape == (4, groups, 3, 2 // groups)
    assert outputs.shape == (4, groups, 3, 8 // groups)
    product = (inputs.mT @ outputs).reshape(4, *weight.shape)
    assert torch.allclose(product, rule.gradients(a, g))


def test_only_a_transposed_convolution_can_miss_outputs_or_reach_them_twice():
    a = normal(1, 2, 3)
    for kernel, options, covers in [
        (1, {}, True),
        (2, {}, False),
        (1, {"stride": 2}, False),
        (1, {"padding": 1}, False),
        (1, {"dilation": 2, "output_padding": 1}, False),
    ]:
        weight = normal(2, 2, kernel)
        assert rule_of(F.conv_transpose1d, a, weight, **options).covers_output == covers
        options.pop("output_padding", None)
        assert rule_of(F.conv1d, a, weight, **options).covers_output


# Sums and products


@st.composite
def broadcasts(draw):
    """The shape of what one observation adds to, and one that broadcasts to it."""
    whole = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    kept = whole[draw(st.integers(0, len(whole))) :]
    return whole, [1 if draw(st.booleans()) else size for size in kept]


@PROPERTY
@given(COUNTS, broadcasts(), SEEDS)
def test_sums_with_a_broadcast_parameter(n, shapes, seed):
    whole, shape = shapes
    a = normal(n, *whole, seed=seed)
    factorise = check(Broadcast(torch.Size(shape)), torch.add, normal(*shape), a, seed + 1)
    assert factorise == (torch.Size(whole).numel() == torch.Size(shape).numel())


@PROPERTY
@given(COUNTS, broadcasts(), SEEDS)
def test_products_with_a_broadcast_parameter(n, shapes, seed):
    whole, shape = shapes
    a = normal(n, *whole, seed=seed)
    factorise = check(Scale(torch.Size(shape)), torch.mul, normal(*shape), a, seed + 1)
    assert factorise == (torch.Size(whole).numel() == torch.Size(shape).numel())


@PROPERTY
@given(COUNTS, st.integers(1, 2), COUNTS, POSITIONS, st.sampled_from([Broadcast, Scale]), SEEDS)
def test_parameters_before_the_positions_of_an_image(n, first, channels, positions, kind, seed):
    """A channel has one scale and one shift, whatever axes of space follow."""
    a = normal(n, first, channels, *positions, seed=seed)
    rule = kind(torch.Size([channels]), len(positions))

    def operation(a, b):
        b = b.reshape(channels, *[1] * len(positions))
        return a + b if kind is Broadcast else a * b

    check(rule, operation, normal(channels), a, seed + 1)


@PROPERTY
@given(
    COUNTS,
    st.sampled_from(
        [
            ("ti,io->to", (2, 3), (3, 4)),
            ("ti,oi->to", (2, 3), (4, 3)),
            ("td,hdk->htk", (2, 3), (2, 3, 2)),
            ("htk,hkd->td", (2, 3, 2), (2, 2, 4)),
            ("td,d->td", (2, 3), (3,)),
            ("sd,ts->td", (3, 2), (4, 3)),
            ("i,io->o", (3,), (3, 2)),
            ("i,o->io", (3,), (2,)),
        ]
    ),
    SEEDS,
)
def test_sums_over_products(n, case, seed):
    equation, inputs, shape = case
    a, parameter = normal(n, *inputs, seed=seed), normal(*shape)
    (rule,) = (
        r for t, r, _ in match(torch.einsum, (equation, a[0], parameter), {}) if t is parameter
    )
    assert type(rule) is Einsum
    assert not check(rule, lambda a, w: torch.einsum(equation, a, w), parameter, a, seed + 1)


# Tables


@PROPERTY
@given(COUNTS, POSITIONS, st.integers(1, 3), st.sampled_from([None, 0, 2]), SEEDS)
def test_tables_with_repeated_and_unused_rows(n, positions, width, padding_idx, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 4, (n, *positions), generator=generator)
    operation = partial(F.embedding, padding_idx=padding_idx)
    rule = Rows(torch.Size([4, width]), padding_idx)
    assert not check(rule, operation, normal(4, width), a, seed + 1)


@PROPERTY
@given(
    COUNTS,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["sum", "mean"]),
    SEEDS,
)
def test_bags_of_rows(n, bags, length, width, padding_idx, mode, seed):
    """A bag may hold a row twice, and nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 4, (n, bags, length), generator=generator)
    a[0, 0] = 0
    operation = partial(F.embedding_bag, mode=mode, padding_idx=padding_idx)
    check(Rows(torch.Size([4, width]), padding_idx, mode), operation, normal(4, width), a, seed + 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_may_have_either_width(dtype):
    a = torch.tensor([[0, 1, 1], [2, 0, 2]], dtype=dtype)
    check(Rows(torch.Size([3, 2])), F.embedding, normal(3, 2), a)


@PROPERTY
@given(COUNTS, st.lists(st.integers(1, 3), max_size=2), st.lists(st.integers(1, 2)), SEEDS)
def test_rows_may_be_numbers_or_matrices(n, positions, row, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 4, (n, *positions), generator=generator)
    table = normal(4, *row[:3])
    check(Rows(table.shape), lambda a, table: table[a], table, a, seed + 1)
