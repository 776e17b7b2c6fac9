"""One operation on many tensors."""

import pytest
import torch
from torch import nn

from ewc_lib._foreach import copy_back_, each, in_dtypes_of, inner
from ewc_lib.experiments.cost.counts import Asked
from tests.counting import operations

DOUBLE = torch.float64


def vector(seed, *dtypes):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3), (4,), (), (1, 2, 3, 2)]
    dtypes = dtypes or (DOUBLE,)
    return {
        f"p{i}": torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    }


class Wrapped(torch.Tensor):
    """A tensor of another kind, as one that is sharded."""


CALLS = {
    "sub": lambda a, b, c: each("sub", a, b),
    "mul": lambda a, b, c: each("mul", a, 0.3),
    "mul_by_tensor": lambda a, b, c: each("mul", a, torch.tensor(0.3, dtype=DOUBLE)),
    "add_": lambda a, b, c: each("add_", a, b, alpha=0.7),
    "addcmul_": lambda a, b, c: each("addcmul_", a, b, c, value=0.7),
    "lerp_": lambda a, b, c: each("lerp_", a, b, c),
    "copy_": lambda a, b, c: each("copy_", a, b),
    "reciprocal_": lambda a, b, c: each("reciprocal_", a),
    "clamp_min": lambda a, b, c: each("clamp_min", a, 0.0),
}
SINGLE = {
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: 0.3 * a,
    "mul_by_tensor": lambda a, b, c: 0.3 * a,
    "add_": lambda a, b, c: a + 0.7 * b,
    "addcmul_": lambda a, b, c: a + 0.7 * b * c,
    "lerp_": lambda a, b, c: a + c * (b - a),
    "copy_": lambda a, b, c: b,
    "reciprocal_": lambda a, b, c: 1 / a,
    "clamp_min": lambda a, b, c: a.relu(),
}


@pytest.mark.parametrize("how", ["at once", "missing", "of another kind"])
@pytest.mark.parametrize("call", CALLS)
def test_it_is_what_the_operation_does_to_each_tensor(call, how, monkeypatch):
    a, b, c = (vector(seed) for seed in range(3))
    expected = {name: SINGLE[call](a[name], b[name], c[name]) for name in a}
    if how == "missing":
        name = call.partition("_by")[0]
        monkeypatch.delattr(torch, f"_foreach_{name}")
    elif how == "of another kind":
        a = {name: value.as_subclass(Wrapped) for name, value in a.items()}
    with Asked() as counted:
        found = CALLS[call](a, b, c)
    assert list(found) == list(a)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].as_subclass(torch.Tensor), value)
    assert all((found[name] is a[name]) == call.endswith("_") for name in a)
    assert counted.operations == (1 if how == "at once" else len(a))


def test_tensors_of_several_dtypes_take_one_call_for_each():
    a, b = vector(0, torch.float32, DOUBLE), vector(1, torch.float32, DOUBLE)
    found = each("sub", a, b)
    assert list(found) == list(a)
    assert all(torch.equal(found[name], a[name] - b[name]) for name in a)
    assert operations(lambda: each("sub", a, b)) == 2


def test_nothing_takes_no_call():
    assert each("sub", {}, {}) == {}


def test_it_can_be_differentiated_in_a_number_for_all():
    factor = torch.tensor(3.0, requires_grad=True)
    found = each("mul", {"a": torch.ones(2), "b": torch.full((3,), 2.0)}, factor)
    sum(value.sum() for value in found.values()).backward()
    assert factor.grad.item() == 2 * 1.0 + 3 * 2.0


def test_vmap_and_gradients_go_through_it():
    a, b = vector(0), vector(1)

    def total(x):
        return inner(each("sub", {"p0": x}, {"p0": b["p0"]}), {"p0": x})

    x = torch.stack([a["p0"], b["p0"]])
    expected = torch.stack([2 * y - b["p0"] for y in x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(x), expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [torch.Tensor, Wrapped])
def test_only_what_has_another_dtype_is_converted(grad, kind):
    values = {n: v.as_subclass(kind) for n, v in vector(0, torch.bfloat16, DOUBLE).items()}
    like = vector(1)
    with torch.set_grad_enabled(grad):
        found = in_dtypes_of(like, values)
    assert {value.dtype for value in found.values()} == {DOUBLE}
    assert [found[n] is values[n] for n in values] == [False, True, False, True]
    assert all(torch.equal(found[n], values[n].double()) for n in values)


def test_a_conversion_is_differentiable():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    in_dtypes_of({"p": torch.ones(2)}, {"p": p})["p"].sum().backward()
    assert torch.equal(p.grad, torch.ones(2, dtype=torch.bfloat16))


def test_values_are_written_to_where_they_are_not_yet():
    places = vector(0, torch.bfloat16, DOUBLE)
    values = {n: v if v.dtype == DOUBLE else torch.ones_like(v) for n, v in places.items()}
    assert operations(lambda: copy_back_(places, values)) == 1
    assert all(torch.equal(places[n], values[n]) for n in places)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "with gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "of another kind": lambda x: x.as_subclass(Wrapped),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128])
def test_an_inner_product_is_real_whatever_the_layout(layout, dtype):
    a, b = vector(0, dtype), vector(1, dtype)
    if dtype.is_complex:
        b = {name: value * (1 - 2j) for name, value in b.items()}
    expected = sum((a[name].conj() * b[name]).sum().real for name in a)
    found = inner({name: LAYOUTS[layout](value) for name, value in a.items()}, b)
    assert found.dtype == DOUBLE
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def test_an_inner_product_of_tensors_in_one_layout_is_three_operations():
    a, b = vector(0), vector(1)
    a, b = ({n: LAYOUTS["channels last"](v) for n, v in each_.items()} for each_ in (a, b))
    assert operations(lambda: inner(a, b)) == 3
