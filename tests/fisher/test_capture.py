"""What is seen of a forward pass."""

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.fisher.capture import Pulled, Recorder, Use, gradients, squares, sum_dtype
from ewc_lib.fisher.rules import Broadcast, OuterProduct, Rows
from tests.scenarios import SCENARIOS, N

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def parameters(**shapes):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def watch(forward, n=3, **shapes):
    p = parameters(**shapes)
    with Recorder(p, n) as recorder:
        forward(**p)
    return recorder


def seen(recorder):
    return [(use.name, type(use.rule)) for use in recorder.uses], recorder.unknown


LINEAR, SUM, TABLE = OuterProduct, Broadcast, Rows


def test_every_use_is_recorded_in_order_with_its_other_input():
    tokens = torch.tensor([[0, 1], [1, 1], [2, 0]])
    recorder = watch(
        lambda W, b, E: F.linear(X, W, b) + F.linear(F.embedding(tokens, E).sum(1), W),
        W=(2, 4),
        b=(2,),
        E=(5, 4),
    )
    uses = [("W", LINEAR), ("b", SUM), ("E", TABLE), ("W", LINEAR)]
    assert seen(recorder) == (uses, set())
    assert torch.equal(recorder.uses[0].input, X)
    assert torch.equal(recorder.uses[2].input, tokens)
    assert not any(use.input.requires_grad for use in recorder.uses)


@pytest.mark.parametrize(
    "forward",
    [
        lambda W: X @ W.t(),
        lambda W: X @ W.T,
        lambda W: X @ W.mT,
        lambda W: F.linear(X, W[:1]),
        lambda W: F.linear(X, W * 1),
        lambda W: F.linear(X, W.clone()),
        lambda W: F.linear(X, W.view(4, 2).view(2, 4)),
        lambda W: F.linear(X, torch.cat([W, W])),
        lambda W: W @ X.mT,
        lambda W: F.linear(W, X),
        lambda W: torch.einsum("ni,oi->no", X, W),
        lambda W: W[0] + X,
        lambda W: W.sum() + X,
        lambda W: torch.add(X, W[0], alpha=2),
    ],
)
def test_views_and_operations_without_a_rule_are_known_to_be_unknown(forward):
    assert seen(watch(forward, W=(2, 4))) == ([], {"W"})


@pytest.mark.parametrize(
    "forward",
    [
        lambda W: (W.shape, W.size(0), W.dim(), W.dtype, W.device, len(W), W.requires_grad),
        lambda W: W.numel() * X,
        lambda W: X.to(W),
        lambda W: torch.zeros_like(W) + 1,
        lambda W: W.detach() * 2,
        lambda W: W.grad,
        lambda W: repr(W),
    ],
)
def test_asking_about_a_parameter_is_no_use(forward):
    assert seen(watch(forward, W=(2, 4))) == ([], set())


def test_what_happens_without_gradients_is_no_use():
    def forward(W):
        with torch.no_grad():
            return F.linear(X, W) + W.sum()

    assert seen(watch(forward, W=(2, 4))) == ([], set())


@pytest.mark.parametrize(
    ("forward", "uses"),
    [
        (lambda W: F.linear(W, W), []),
        (lambda W: W @ W, []),
        (lambda W: W + W, []),
        (lambda W: torch.stack([W, W]), []),
    ],
)
def test_a_parameter_used_twice_in_one_operation_needs_two_rules(forward, uses):
    assert seen(watch(forward, n=3, W=(4, 4))) == (uses, {"W"})


def test_a_parameter_used_twice_is_unknown_if_one_use_has_no_rule():
    """The square matrix looks like a batch of observations, and it is the weight as well."""
    recorder = watch(lambda W: F.linear(W, W), n=4, W=(4, 4))
    assert seen(recorder) == ([("W", LINEAR)], {"W"})


def test_a_layout_that_does_not_fit_is_unknown():
    recorder = watch(lambda W: F.linear(X, W), n=5, W=(2, 4))
    assert seen(recorder) == ([], {"W"})


def test_two_names_of_different_parameters_are_not_confused():
    recorder = watch(lambda V, W: F.linear(F.linear(X, V), W), V=(4, 4), W=(4, 4))
    assert seen(recorder) == ([("V", LINEAR), ("W", LINEAR)], set())


def test_in_place_sums_are_uses():
    def forward(b):
        h = X.clone()
        h += b
        return h.add_(b)

    assert seen(watch(forward, b=(4,))) == ([("b", SUM), ("b", SUM)], set())


def test_nothing_is_watched_after_the_forward_pass():
    p = parameters(W=(2, 4))
    with Recorder(p, 3) as recorder:
        F.linear(X, p["W"])
    F.linear(X, p["W"])
    assert len(recorder.uses) == 1


def test_an_exception_ends_the_watch():
    p = parameters(W=(2, 4))
    recorder = Recorder(p, 3)
    with pytest.raises(RuntimeError, match="shapes"), recorder:
        F.linear(X, p["W"].T)
    F.linear(X, p["W"])
    assert (recorder.uses, recorder.unknown) == ([], {"W"})


def test_a_signature_ignores_the_number_of_observations_and_nothing_else():
    def signature(n, *positions, name="W", transposed=False):
        a = torch.ones(n, *positions, 4)
        forward = {
            False: lambda W: F.linear(a, W),
            True: lambda W: a @ W,
        }[transposed]
        shape = (4, 2) if transposed else (2, 4)
        recorder = watch(lambda **p: forward(p[name]), n=n, **{name: shape})
        (use,) = recorder.uses
        return use.signature

    assert signature(3) == signature(5)
    assert signature(3, 2) == signature(3, 7)
    different = [
        signature(3),
        signature(3, 2),
        signature(3, name="V"),
        signature(3, transposed=True),
    ]
    assert len(set(different)) == len(different)


def pulled(weight, a, g):
    use = Use("W", OuterProduct(weight.shape), a, None, "linear")
    return Pulled(use, g)


@pytest.mark.parametrize("n_uses", [1, 2, 3])
def test_gradients_of_several_uses_add_up_before_they_are_squared(n_uses):
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(2, 4)
    pairs = [
        (
            torch.randn(5, 3, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 3, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(n_uses)
    ]
    uses = [pulled(weight, a, g) for a, g in pairs]
    expected = sum(torch.einsum("nti,ntj->nij", g, a) for a, g in pairs)
    weights = torch.randn(5, generator=generator, dtype=torch.float64)
    assert torch.allclose(gradients(uses), expected, rtol=1e-12, atol=1e-13)
    assert torch.allclose(gradients(uses, slice(1, 3)), expected[1:3], rtol=1e-12, atol=1e-13)
    assert torch.allclose(squares(uses), expected.square().sum(0), rtol=1e-12, atol=1e-13)
    total = torch.stack([use.total(weights) for use in uses]).sum(0)
    assert torch.allclose(
        total, torch.einsum("n,nij->ij", weights, expected), rtol=1e-12, atol=1e-13
    )


def test_conversion_keeps_the_indices_of_a_table():
    tokens = torch.tensor([[0, 1]])
    use = Use("E", Rows(torch.Size([3, 2])), tokens, None, "embedding")
    converted = Pulled(use, torch.ones(1, 2, 2, dtype=torch.float16)).to(torch.float32)
    assert converted.gradient.dtype == torch.float32
    assert converted.use.input.dtype == torch.int64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_at_least_in_single_precision(given, expected):
    assert sum_dtype(torch.ones((), dtype=given)) == expected


def test_functions_that_hide_their_operations_are_seen_as_a_whole():
    """Inside of a function that torch lets one override as a whole, nothing is seen."""
    case = SCENARIOS["multihead_attention"]()
    watched = {n: p for n, p in case.model.named_parameters()}
    with Recorder(watched, N) as recorder:
        case.model(case.x)
    assert recorder.unknown == {n for n in watched if n.startswith("attention.")}
    assert {use.name for use in recorder.uses} == {"head.weight", "head.bias"}
