"""Every rule against autograd, one observation at a time."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from ewc_lib.fisher import rules
from ewc_lib.fisher.rules import Broadcast, OuterProduct, Rows, chunks, match
from tests.scenarios import PROPERTY


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one_by_one(operation, parameter, a, g):
    """Gradient of the parameter for each observation, by autograd alone."""
    parameter = parameter.clone().requires_grad_()
    found = []
    for n in range(len(a)):
        output = operation(a[n : n + 1], parameter)
        found.append(torch.autograd.grad(output, parameter, g[n : n + 1])[0])
    return torch.stack(found)


def check(rule, operation, parameter, a, g):
    expected = one_by_one(operation, parameter, a, g)
    close = partial(torch.allclose, rtol=1e-12, atol=1e-12)
    before = a.clone(), g.clone()
    assert rule.fits(a, operation(a, parameter), len(a))
    assert rule.shape == parameter.shape
    assert close(rule.gradients(a, g), expected)
    assert close(rule.total(a, g), expected.sum(0))
    for size in (1, 3 * parameter.numel() * 8, 2**21):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rules, "CHUNK_BYTES", size)
            assert close(rule.squares(a, g), expected.square().sum(0))
    assert torch.equal(a, before[0])
    assert torch.equal(g, before[1])


SEEDS = st.integers(0, 1000)
POSITIONS = st.lists(st.integers(1, 3), max_size=2)


@PROPERTY
@given(st.integers(1, 5), POSITIONS, st.integers(1, 4), st.integers(1, 4), st.booleans(), SEEDS)
def test_linear_maps(n, positions, n_in, n_out, transposed, seed):
    a, g = normal(n, *positions, n_in, seed=seed), normal(n, *positions, n_out, seed=seed + 1)
    weight = normal(*((n_in, n_out) if transposed else (n_out, n_in)))
    operation = torch.matmul if transposed else F.linear
    check(OuterProduct(weight.shape, transposed), operation, weight, a, g)


@st.composite
def broadcasts(draw):
    """The shape of a sum, and one that broadcasts to it without the axis of observations."""
    whole = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    kept = whole[draw(st.integers(0, len(whole))) :]
    shape = [1 if draw(st.booleans()) else size for size in kept]
    leading = [1] if len(kept) == len(whole) and draw(st.booleans()) else []
    return whole, leading + shape


@PROPERTY
@given(st.integers(2, 5), broadcasts(), SEEDS)
def test_sums_with_a_broadcast_parameter(n, shapes, seed):
    whole, shape = shapes
    a, g = normal(n, *whole, seed=seed), normal(n, *whole, seed=seed + 1)
    check(Broadcast(torch.Size(shape)), torch.add, normal(*shape), a, g)


@PROPERTY
@given(st.integers(1, 5), POSITIONS, st.integers(1, 3), st.sampled_from([None, 0, 2, -1]), SEEDS)
def test_tables_with_repeated_and_unused_rows(n, positions, width, padding_idx, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 4, (n, *positions), generator=generator)
    g = normal(n, *positions, width, seed=seed)
    operation = partial(F.embedding, padding_idx=padding_idx)
    check(Rows(torch.Size([4, width]), padding_idx), operation, normal(4, width), a, g)


@PROPERTY
@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 400))
def test_chunks_cover_every_observation_once_within_the_budget(n, size, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "CHUNK_BYTES", budget)
        parts = list(chunks(torch.zeros(n, 2, dtype=torch.float64), torch.Size([size])))
    covered = [i for part in parts for i in range(n)[part]]
    assert covered == list(range(n))
    lengths = [len(range(n)[part]) for part in parts]
    assert all(length * size * 8 <= budget or length == 1 for length in lengths)
    assert all(length == lengths[0] for length in lengths[:-1])


X, W, B = normal(3, 4), normal(2, 4), normal(2)
TOKENS, TABLE = torch.tensor([[0, 1], [1, 2], [0, 0]]), normal(5, 2)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (F.linear, (X, W), {}, [(W, X, OuterProduct)]),
        (F.linear, (X, W, B), {}, [(W, X, OuterProduct), (B, X, Broadcast)]),
        (F.linear, (X,), {"weight": W, "bias": None}, [(W, X, OuterProduct)]),
        (torch.addmm, (B, X, W.mT), {}, [(W.mT, X, OuterProduct), (B, X, Broadcast)]),
        (torch.Tensor.__matmul__, (X, W.mT), {}, [(W.mT, X, OuterProduct)]),
        (torch.add, (X, B), {}, [(X, B, Broadcast), (B, X, Broadcast)]),
        (torch.Tensor.__radd__, (X, B), {}, [(X, B, Broadcast), (B, X, Broadcast)]),
        (F.embedding, (TOKENS, TABLE), {}, [(TABLE, TOKENS, Rows)]),
        (F.embedding, (TOKENS, TABLE), {"padding_idx": 0}, [(TABLE, TOKENS, Rows)]),
        # no rule is right for these
        (torch.add, (X, B), {"alpha": 2}, []),
        (torch.add, (X, 1.0), {}, []),
        (torch.addmm, (B, X, W.mT), {"beta": 2}, []),
        (torch.matmul, (W[0], X.mT), {}, []),
        (torch.matmul, (X, W[0]), {}, []),
        (torch.matmul, (X, W.mT.expand(3, 4, 2)), {}, []),
        (F.embedding, (TOKENS, TABLE), {"max_norm": 1.0}, []),
        (F.embedding, (TOKENS, TABLE), {"scale_grad_by_freq": True}, []),
        (torch.einsum, ("ni,oi->no", X, W), {}, []),
        (torch.sub, (X, B), {}, []),
        (torch.mul, (X, B), {}, []),
    ],
)
def test_an_operation_has_the_rules_it_should(function, args, kwargs, expected):
    found = list(match(function, args, kwargs))
    assert len(found) == len(expected)
    for (parameter, other, rule), (parameter_expected, other_expected, kind) in zip(
        found, expected, strict=True
    ):
        assert torch.equal(parameter, parameter_expected)
        assert torch.equal(other, other_expected)
        assert type(rule) is kind
        assert rule.shape == parameter.shape


@pytest.mark.parametrize(
    ("rule", "a", "output", "n"),
    [
        (OuterProduct(W.shape), normal(4), normal(2), 4),
        (OuterProduct(W.shape), normal(6, 4), normal(6, 2), 3),
        (OuterProduct(W.shape), normal(3, 4), normal(5, 3, 2), 3),
        (Broadcast(torch.Size([3])), normal(1), normal(3), 3),
        (Broadcast(torch.Size([3, 2])), normal(3, 2), normal(3, 2), 3),
        (Broadcast(torch.Size([2])), normal(6, 2), normal(6, 2), 3),
        (Rows(TABLE.shape), torch.tensor(1), normal(2), 2),
        (Rows(TABLE.shape), torch.arange(4), normal(4, 2), 3),
    ],
)
def test_a_layout_without_observations_first_does_not_fit(rule, a, output, n):
    assert not rule.fits(a, output, n)
