"""Which operations have rules, for which arguments, and that they are the right ones."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.operations import inside, match
from ewc_lib.score.rules import (
    Broadcast,
    Convolution,
    Einsum,
    OuterProduct,
    Rows,
    Scale,
    TransposedConvolution,
)
from tests.scenarios import PROPERTY

N = 3


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameter(*shape):
    return normal(*shape, seed=1).requires_grad_()


X, SEQUENCE, IMAGES = normal(N, 4), normal(N, 2, 4), normal(N, 4, 5, 6)
W, V, B = parameter(2, 4), parameter(4, 2), parameter(2)
ROW, CHANNELS, SCALAR = parameter(4), parameter(4), parameter()
TOKENS, TABLE = torch.tensor([[0, 1], [1, 2], [0, 0]]), parameter(5, 2)
MEAN, VARIANCE = normal(4), normal(4).square() + 0.5
POSITIVE = X.abs() + 0.5

ACCEPTED = {
    # linear maps
    "linear": (F.linear, (X, W), {}, {W: OuterProduct}),
    "linear with bias": (F.linear, (X, W, B), {}, {W: OuterProduct, B: Broadcast}),
    "linear by keyword": (F.linear, (X,), {"weight": W, "bias": None}, {W: OuterProduct}),
    "linear on sequences": (F.linear, (SEQUENCE, W, B), {}, {W: OuterProduct, B: Broadcast}),
    "addmm": (torch.addmm, (B, X, V), {}, {V: OuterProduct, B: Broadcast}),
    "matmul": (torch.matmul, (X, V), {}, {V: OuterProduct}),
    "matmul of sequences": (torch.matmul, (SEQUENCE, V), {}, {V: OuterProduct}),
    "matmul on the left": (torch.matmul, (W, SEQUENCE.mT), {}, {W: OuterProduct}),
    "matmul with a vector": (torch.matmul, (SEQUENCE, ROW), {}, {ROW: Einsum}),
    "matmul with a vector of one": (torch.matmul, (X, ROW), {}, {ROW: Einsum}),
    "mm": (torch.mm, (X, V), {}, {V: OuterProduct}),
    "method matmul": (Tensor.matmul, (X, V), {}, {V: OuterProduct}),
    "method mm": (Tensor.mm, (X, V), {}, {V: OuterProduct}),
    "operator @": (Tensor.__matmul__, (X, V), {}, {V: OuterProduct}),
    "baddbmm": (torch.baddbmm, (CHANNELS, SEQUENCE.mT, SEQUENCE), {}, {CHANNELS: Broadcast}),
    "einsum": (torch.einsum, ("ni,oi->no", X, W), {}, {W: Einsum}),
    "einsum, parameter first": (torch.einsum, ("oi, nti -> nto", W, SEQUENCE), {}, {W: Einsum}),
    "einsum without arrow": (torch.einsum, ("bi,io", X, V), {}, {V: Einsum}),
    "einsum with dots": (torch.einsum, ("...i,oi->...o", SEQUENCE, W), {}, {W: Einsum}),
    "einsum with dots, no arrow": (torch.einsum, ("...i,io", SEQUENCE, V), {}, {V: Einsum}),
    # convolutions
    "conv1d": (
        F.conv1d,
        (IMAGES[..., 0], parameter(6, 2, 3), parameter(6)),
        {"padding": "same", "groups": 2},
        [Convolution, Broadcast],
    ),
    "conv2d": (
        F.conv2d,
        (IMAGES, parameter(6, 4, 2, 3), parameter(6)),
        {},
        [Convolution, Broadcast],
    ),
    "conv2d with options": (
        F.conv2d,
        (IMAGES, parameter(6, 4, 2, 3), None, (2, 1), 1, (1, 2)),
        {},
        [Convolution],
    ),
    "conv2d, valid": (
        F.conv2d,
        (IMAGES, parameter(6, 4, 2, 3), None, 1, "valid"),
        {},
        [Convolution],
    ),
    "conv3d": (
        F.conv3d,
        (normal(N, 2, 3, 4, 3), parameter(4, 2, 2, 2, 2), parameter(4)),
        {"stride": [1, 2, 1]},
        [Convolution, Broadcast],
    ),
    "conv_transpose1d": (
        F.conv_transpose1d,
        (IMAGES[..., 0], parameter(4, 3, 3), parameter(6)),
        {"stride": 2, "output_padding": 1, "groups": 2},
        [TransposedConvolution, Broadcast],
    ),
    "conv_transpose2d": (
        F.conv_transpose2d,
        (IMAGES, parameter(4, 3, 2, 3), None, 2, 1),
        {},
        [TransposedConvolution],
    ),
    "conv_transpose3d": (
        F.conv_transpose3d,
        (normal(N, 2, 3, 2, 2), parameter(2, 3, 2, 2, 2)),
        {"dilation": 2},
        [TransposedConvolution],
    ),
    # tables
    "embedding": (F.embedding, (TOKENS, TABLE), {}, {TABLE: Rows}),
    "embedding with padding": (F.embedding, (TOKENS, TABLE, 1), {}, {TABLE: Rows}),
    "embedding, last row padding": (F.embedding, (TOKENS + 2, TABLE, -1), {}, {TABLE: Rows}),
    "embedding_bag": (F.embedding_bag, (TOKENS, TABLE), {}, {TABLE: Rows}),
    "embedding_bag, sum": (
        F.embedding_bag,
        (TOKENS, TABLE),
        {"mode": "sum", "padding_idx": -5},
        {TABLE: Rows},
    ),
    "getitem": (Tensor.__getitem__, (TABLE, TOKENS), {}, {TABLE: Rows}),
    "getitem from the end": (Tensor.__getitem__, (TABLE, TOKENS - 2), {}, {TABLE: Rows}),
    "getitem of numbers": (Tensor.__getitem__, (ROW, TOKENS), {}, {ROW: Rows}),
    "getitem of matrices": (Tensor.__getitem__, (parameter(3, 2, 4), TOKENS), {}, [Rows]),
    "index_select": (torch.index_select, (TABLE, 0, TOKENS[:, 1]), {}, {TABLE: Rows}),
    "method index_select": (Tensor.index_select, (TABLE, 0, TOKENS[:, 1]), {}, {TABLE: Rows}),
    # normalisations
    "layer_norm": (F.layer_norm, (SEQUENCE, (4,), ROW, CHANNELS), {}, [Scale, Broadcast]),
    "layer_norm of planes": (
        F.layer_norm,
        (SEQUENCE, (2, 4), parameter(2, 4), parameter(2, 4), 0.1),
        {},
        [Scale, Broadcast],
    ),
    "layer_norm without bias": (F.layer_norm, (X, (4,)), {"weight": ROW, "eps": 0.1}, {ROW: Scale}),
    "rms_norm": (F.rms_norm, (SEQUENCE, (4,), ROW), {"eps": 0.1}, {ROW: Scale}),
    "rms_norm as is": (F.rms_norm, (SEQUENCE, (4,), ROW), {}, {ROW: Scale}),
    "group_norm": (F.group_norm, (IMAGES, 2, ROW, CHANNELS, 0.1), {}, [Scale, Broadcast]),
    "group_norm of vectors": (F.group_norm, (X, 2, ROW), {}, {ROW: Scale}),
    "batch_norm": (
        F.batch_norm,
        (IMAGES, MEAN, VARIANCE, ROW, CHANNELS),
        {"eps": 0.1},
        [Scale, Broadcast],
    ),
    "batch_norm of vectors": (F.batch_norm, (X, MEAN, VARIANCE, ROW), {}, {ROW: Scale}),
    "instance_norm": (
        F.instance_norm,
        (IMAGES,),
        {"weight": ROW, "bias": CHANNELS, "eps": 0.1},
        {ROW: Scale, CHANNELS: Broadcast},
    ),
    "instance_norm, running": (
        F.instance_norm,
        (IMAGES, MEAN, VARIANCE, ROW, CHANNELS, False),
        {},
        {ROW: Scale, CHANNELS: Broadcast},
    ),
    # entry by entry
    "add": (torch.add, (X, ROW), {}, {ROW: Broadcast}),
    "add from the left": (torch.add, (SCALAR, X), {}, {SCALAR: Broadcast}),
    "method add": (Tensor.add, (SEQUENCE, ROW), {}, {ROW: Broadcast}),
    "operator +": (Tensor.__add__, (X, ROW), {}, {ROW: Broadcast}),
    "reflected +": (Tensor.__radd__, (X, ROW), {}, {ROW: Broadcast}),
    "mul": (torch.mul, (X, ROW), {}, {ROW: Scale}),
    "multiply": (torch.multiply, (ROW, SEQUENCE), {}, {ROW: Scale}),
    "mul of a broadcast input": (torch.mul, (normal(N, 1), ROW), {}, {ROW: Scale}),
    "method mul": (Tensor.mul, (X, SCALAR), {}, {SCALAR: Scale}),
    "method multiply": (Tensor.multiply, (X, ROW), {}, {ROW: Scale}),
    "operator *": (Tensor.__mul__, (X, ROW), {}, {ROW: Scale}),
    "reflected *": (Tensor.__rmul__, (X, ROW), {}, {ROW: Scale}),
    "mul of a mask": (torch.mul, (X > 0, ROW), {}, {ROW: Scale}),
    "sub": (torch.sub, (X, ROW), {}, {ROW: Scale}),
    "sub from a parameter": (torch.sub, (ROW, X), {}, {ROW: Broadcast}),
    "method sub": (Tensor.sub, (X, SCALAR), {}, {SCALAR: Scale}),
    "operator -": (Tensor.__sub__, (normal(N, 1), ROW), {}, {ROW: Scale}),
    "div": (torch.div, (X, ROW), {}, {ROW: Scale}),
    "div of a parameter": (torch.div, (ROW, POSITIVE), {}, {ROW: Scale}),
    "method div": (Tensor.div, (SCALAR, POSITIVE), {}, {SCALAR: Scale}),
    "operator /": (Tensor.__truediv__, (normal(N, 1), ROW), {}, {ROW: Scale}),
    "expand": (Tensor.expand, (ROW, N, 2, 4), {}, {ROW: Broadcast}),
    "expand by a tuple": (Tensor.expand, (parameter(1, 4), (N, -1)), {}, [Broadcast]),
    "expand_as": (Tensor.expand_as, (ROW, X), {}, {ROW: Broadcast}),
    "broadcast_to": (torch.broadcast_to, (ROW, (N, 4)), {}, {ROW: Broadcast}),
    "repeat": (Tensor.repeat, (ROW, N, 1), {}, {ROW: Broadcast}),
    "repeat by a tuple": (Tensor.repeat, (ROW, (N, 2, 1)), {}, {ROW: Broadcast}),
    "repeat of ones": (Tensor.repeat, (parameter(1, 1, 4), N, 2, 1), {}, [Broadcast]),
    "prelu": (F.prelu, (X, ROW), {}, {ROW: Scale}),
    "where": (torch.where, (X > 0, ROW, CHANNELS), {}, {ROW: Scale, CHANNELS: Scale}),
    "where, not": (torch.where, (X > 0, 0.0, ROW), {}, {ROW: Scale}),
    "where of a broadcast condition": (torch.where, (X[:, :1] > 0, ROW, X), {}, {ROW: Scale}),
    "method where": (Tensor.where, (ROW, X > 0, X), {}, {ROW: Scale}),
    "masked_fill": (torch.masked_fill, (ROW, X > 0, 1.0), {}, {ROW: Scale}),
    "masked_fill by a parameter": (Tensor.masked_fill, (X, X > 0, SCALAR), {}, {SCALAR: Scale}),
    "prelu of images": (torch.prelu, (IMAGES, CHANNELS), {}, {CHANNELS: Scale}),
    "prelu with one slope": (F.prelu, (IMAGES, parameter(1)), {}, [Scale]),
}


def parameters_of(args, kwargs):
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]


def by_observation(output, g, watched):
    """Gradient of what each observation contributes, by autograd."""
    return [
        torch.autograd.grad(output[n], watched, g[n], retain_graph=True) for n in range(len(output))
    ]


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"), ACCEPTED.values(), ids=ACCEPTED
)
def test_the_rule_of_an_operation_gives_its_gradients(function, args, kwargs, expected):
    watched = parameters_of(args, kwargs)
    found = [
        (t, rule, other) for t, rule, other in match(function, args, kwargs) if t.requires_grad
    ]
    if isinstance(expected, list):
        expected = dict(zip(watched, expected, strict=True))
    assert len(found) == len(watched) == len(expected)
    assert {t: type(rule) for t, rule, _ in found} == expected

    output = function(*args, **kwargs)
    g = normal(*output.shape, seed=2)
    gradients = by_observation(output, g, watched)
    where = BatchAxis()
    for tensor, rule, other in found:
        (number,) = (i for i, t in enumerate(watched) if t is tensor)
        a = output.new_zeros(()).expand(output.shape) if other is None else other().detach()
        a = rule.prepare(where.split(a, N), 0)
        assert rule.shape == tensor.shape
        by_rule = rule.gradients(a, where.split(g, N))
        wanted = torch.stack([gradient[number] for gradient in gradients])
        assert torch.allclose(by_rule, wanted, rtol=1e-10, atol=1e-10)


def test_a_stack_of_matrices_may_be_on_either_side():
    """Observations are along the stack, or along the rows or columns of each matrix."""
    for function in (torch.bmm, torch.matmul, Tensor.bmm):
        right, left = parameter(2, 4, 5), parameter(2, 5, 4)
        for args, tensor, axis in (
            ((normal(2, N, 4), right), right, 1),
            ((left, normal(2, 4, N)), left, 2),
        ):
            rule, other = next((r, o) for t, r, o in match(function, args, {}) if t is tensor)
            output, where = function(*args), BatchAxis(axis)
            g = normal(*output.shape, seed=2)
            a = where.split(other().detach(), N)
            by_rule = rule.gradients(a, where.split(g, N))
            rows, arriving = output.movedim(axis, 0), g.movedim(axis, 0)
            wanted = [gradient for (gradient,) in by_observation(rows, arriving, [tensor])]
            assert torch.allclose(by_rule, torch.stack(wanted), atol=1e-10)


def test_letters_that_stand_alone_are_put_in_the_order_of_the_alphabet():
    x = normal(N, 4)
    (rule,) = (r for t, r, _ in match(torch.einsum, ("zi,ia", x, V), {}) if t is V)
    output = torch.einsum("zi,ia", x, V)
    g = normal(*output.shape, seed=2)
    (expected,) = torch.autograd.grad(output, V, g)
    assert torch.allclose(rule.gradients(x.unsqueeze(0), g.unsqueeze(0)).squeeze(0), expected)


@pytest.mark.parametrize("function", [torch.mul, torch.sub, torch.div])
def test_an_input_with_fewer_axes_than_the_result_is_spread_over_it(function):
    """Then the observations lie along another axis of the result than of the input."""
    x, column = normal(N).abs() + 0.5, parameter(2, 1)
    for args in ((x, column), (column, x)):
        rule, other = next((r, o) for t, r, o in match(function, args, {}) if t is column)
        output, where = function(*args), BatchAxis(1)
        g = normal(*output.shape, seed=2)
        a = output.new_zeros(()).expand(output.shape) if other is None else other().detach()
        by_rule = rule.gradients(where.split(a, N), where.split(g, N))
        wanted = [gradient for (gradient,) in by_observation(output.mT, g.mT, [column])]
        assert torch.allclose(by_rule, torch.stack(wanted), atol=1e-10)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.batch_norm, (IMAGES, MEAN, VARIANCE, ROW)),
        (F.instance_norm, (IMAGES, MEAN, VARIANCE, ROW)),
        (F.instance_norm, (IMAGES, MEAN, VARIANCE, ROW, CHANNELS, False)),
    ],
)
def test_normalising_again_leaves_running_statistics_alone(function, args):
    before = MEAN.clone(), VARIANCE.clone()
    (other,) = (o for t, _, o in match(function, args, {}) if t is ROW)
    other()
    assert torch.equal(MEAN, before[0])
    assert torch.equal(VARIANCE, before[1])


def test_a_sum_in_place_is_a_sum():
    for function in (Tensor.add_, Tensor.__iadd__):
        (found,) = (m for m in match(function, (X.clone(), ROW), {}) if m[0] is ROW)
        assert type(found[1]) is Broadcast
        assert found[2] is None


def test_both_sides_of_an_operation_may_be_parameters():
    right = parameter(4)
    for function in (torch.add, torch.mul, torch.sub, torch.div):
        assert [t is ROW for t, _, _ in match(function, (ROW, right), {})] == [True, False]
    assert [t is W for t, _, _ in match(torch.matmul, (V, W), {})] == [True, False]


REFUSED = {
    "no operation that is known": (torch.tanh, (ROW,), {}),
    "linear with a vector": (F.linear, (X, ROW), {}),
    "addmm with a factor": (torch.addmm, (B, X, V), {"alpha": 2}),
    "addmm with a factor of the sum": (torch.addmm, (B, X, V), {"beta": 2}),
    "matmul of two vectors": (torch.matmul, (X[0], ROW), {}),
    "matmul of a vector": (torch.matmul, (ROW, X.mT), {}),
    "matmul of a vector by a matrix": (torch.matmul, (X[0], V), {}),
    "matmul of stacks with more axes": (
        torch.matmul,
        (SEQUENCE.unsqueeze(1), parameter(N, 4, 2)),
        {},
    ),
    "einsum of three": (torch.einsum, ("ni,ir,ro->no", X, V, parameter(2, 2)), {}),
    "einsum of one": (torch.einsum, ("io->oi", V), {}),
    "einsum of a list": (torch.einsum, ("ni,io->no", [X, V]), {}),
    "einsum of a diagonal": (torch.einsum, ("nii,ii->n", normal(N, 4, 4), parameter(4, 4)), {}),
    "einsum that sums a parameter alone": (torch.einsum, ("ni,ik->ni", X, V), {}),
    "einsum with dots in the parameter": (torch.einsum, ("ni,...i->n...", X, W), {}),
    "convolution of one image": (F.conv2d, (IMAGES[0], parameter(6, 4, 2, 3)), {}),
    "embedding with a norm": (F.embedding, (TOKENS, TABLE), {"max_norm": 1.0}),
    "embedding by frequency": (F.embedding, (TOKENS, TABLE), {"scale_grad_by_freq": True}),
    "embedding_bag, max": (F.embedding_bag, (TOKENS, TABLE), {"mode": "max"}),
    "embedding_bag with a norm": (F.embedding_bag, (TOKENS, TABLE), {"max_norm": 1.0}),
    "embedding_bag by frequency": (F.embedding_bag, (TOKENS, TABLE), {"scale_grad_by_freq": True}),
    "embedding_bag with offsets": (
        F.embedding_bag,
        (TOKENS.flatten(), TABLE, torch.tensor([0, 2, 4])),
        {},
    ),
    "embedding_bag with weights": (
        F.embedding_bag,
        (TOKENS, TABLE),
        {"mode": "sum", "per_sample_weights": normal(N, 2)},
    ),
    "baddbmm with a factor": (torch.baddbmm, (ROW, SEQUENCE.mT, SEQUENCE), {"beta": 2}),
    "getitem of a slice": (Tensor.__getitem__, (TABLE, slice(2)), {}),
    "getitem of one row": (Tensor.__getitem__, (TABLE, TOKENS[0, 0]), {}),
    "getitem by a mask": (Tensor.__getitem__, (TABLE, torch.arange(5) > 2), {}),
    "getitem along two axes": (Tensor.__getitem__, (TABLE, (TOKENS, 0)), {}),
    "index_select of columns": (torch.index_select, (TABLE, 1, TOKENS[2]), {}),
    "batch_norm in training": (F.batch_norm, (X, None, None, ROW, CHANNELS, True), {}),
    "add with a factor": (torch.add, (X, ROW), {"alpha": 2}),
    "add of a number": (torch.add, (ROW, 1.0), {}),
    "mul of a number": (torch.mul, (ROW, 2.0), {}),
    "sub with a factor": (torch.sub, (X, ROW), {"alpha": 2}),
    "sub of a number": (torch.sub, (ROW, 2.0), {}),
    "reflected -": (Tensor.__rsub__, (X, ROW), {}),
    "div of a number": (torch.div, (ROW, 2.0), {}),
    "div with rounding": (torch.div, (X, ROW), {"rounding_mode": "floor"}),
    "mul in place": (Tensor.mul_, (X, ROW), {}),
    "repeat of more than ones": (Tensor.repeat, (ROW, N, 2), {}),
    "repeat of more than ones by a tuple": (Tensor.repeat, (parameter(2, 4), (N, 2, 1)), {}),
}


@pytest.mark.parametrize(("function", "args", "kwargs"), REFUSED.values(), ids=REFUSED)
def test_other_operations_and_arguments_have_no_rule(function, args, kwargs):
    assert not [t for t, _, _ in match(function, args, kwargs) if t.requires_grad]


@PROPERTY
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True), st.data())
def test_sums_over_products_of_any_letters(own, data):
    """Of an equation, a rule is only made of a parameter whose letters all appear elsewhere."""
    term = data.draw(st.permutations([*data.draw(st.sets(st.sampled_from("abcd"))), "n"]))
    output = data.draw(st.sets(st.sampled_from(sorted({*own, *term} - {"n"}))))
    equation = f"{''.join(term)},{''.join(own)}->n{''.join(sorted(output))}"
    sizes = {"n": N, "a": 1, "b": 2, "c": 3, "d": 4}
    x, tensor = normal(*(sizes[c] for c in term)), parameter(*(sizes[c] for c in own))
    found = [(r, o) for t, r, o in match(torch.einsum, (equation, x, tensor), {}) if t is tensor]
    assert len(found) == ({*own} <= {*term, *output})
    for rule, other in found:
        axis = term.index("n")
        result = torch.einsum(equation, x, tensor)
        g = normal(*result.shape, seed=2)
        a = BatchAxis(axis).split(other(), N)
        by_rule = rule.gradients(a, BatchAxis().split(g, N))
        wanted = [gradient for (gradient,) in by_observation(result, g, [tensor])]
        assert torch.allclose(by_rule, torch.stack(wanted), atol=1e-10)


# Composite operations


class Names(TorchFunctionMode):
    """Record the names of all operations, and look into composite ones if asked."""

    def __init__(self, look_inside):
        super().__init__()
        self.names, self.look_inside = [], look_inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        if self.look_inside and (code := inside(func)):
            with self:
                return code(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_looked_into(need_weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    namespace, globals_before = F.multi_head_attention_forward.__globals__, dict(vars(F))
    found = {}
    for look_inside in (False, True):
        with Names(look_inside) as seen:
            output, weights = layer(SEQUENCE, SEQUENCE, SEQUENCE, need_weights=need_weights)
        found[look_inside] = seen.names, output, weights
    (outside, expected, _), (within, output, weights) = found[False], found[True]
    assert torch.equal(output, expected)
    assert (weights is not None) == need_weights
    assert "linear" not in outside
    assert within.count("linear") == 2
    assert within.count("multi_head_attention_forward") == 1
    assert F.multi_head_attention_forward.__globals__ is namespace
    assert vars(F) == globals_before
    assert namespace["has_torch_function"] is torch.overrides.has_torch_function


def seen(function, *args, **kwargs):
    """Return the names of the operations within a composite one, and its result."""
    with Names(look_inside=True) as names:
        output = function(*args, **kwargs)
    return names.names, output


def test_a_learned_mask_of_attention_is_spread_over_the_batch():
    query, key, value = normal(N, 2, 5, 4), normal(N, 2, 3, 4, seed=1), normal(N, 2, 3, 6, seed=2)
    for mask in (parameter(5, 3), parameter(2, 5, 1), parameter(1, 2, 5, 3)):
        names, output = seen(F.scaled_dot_product_attention, query, key, value, mask, scale=0.3)
        assert "expand" in names
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        assert torch.allclose(output, expected)
    for mask in (None, normal(5, 3), torch.ones(5, 3, dtype=torch.bool)):
        names, output = seen(F.scaled_dot_product_attention, query, key, value, mask)
        assert "expand" not in names
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, mask))


GROUPED = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


@GROUPED
@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 4, 8], [0, 0, 0]])
def test_groups_of_rows_are_multiplied_one_by_one(ends):
    rows, matrices = normal(8, 16).float(), parameter(3, 16, 4).float()
    offsets = torch.tensor(ends, dtype=torch.int32)
    names, output = seen(F.grouped_mm, rows, matrices, offs=offsets)
    assert names.count("matmul") == len({*ends} - {0})
    assert output.shape == (8, 4)
    expected = F.grouped_mm(rows, matrices, offs=offsets)
    assert torch.allclose(output[: ends[-1]], expected[: ends[-1]], atol=1e-5)
    assert not output[ends[-1] :].any()


@GROUPED
def test_other_grouped_products_are_left_alone():
    rows, columns = normal(8, 16).float(), normal(16, 16, seed=1).float()
    offsets = torch.tensor([4, 16], dtype=torch.int32)
    names, output = seen(F.grouped_mm, rows, columns, offs=offsets)
    assert "matmul" not in names
    assert torch.allclose(output, F.grouped_mm(rows, columns, offs=offsets), atol=1e-5)


def test_code_inside_keeps_its_defaults_and_its_name():
    code = inside(F.multi_head_attention_forward)
    assert code is not F.multi_head_attention_forward
    assert code.__name__ == "multi_head_attention_forward"
    assert code.__defaults__ == F.multi_head_attention_forward.__defaults__
    assert code.__kwdefaults__ == F.multi_head_attention_forward.__kwdefaults__


@pytest.mark.parametrize("function", [F.linear, F.gelu, torch.einsum, Tensor.add_, F.softmax])
def test_other_operations_are_seen_as_a_whole(function):
    assert inside(function) is None
