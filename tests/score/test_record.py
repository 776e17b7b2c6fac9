"""What is seen of a forward pass."""

import pytest
import torch
import torch.nn.functional as F

from ewc_lib.score.batch_axis import BatchAxis
from ewc_lib.score.record import ParameterUse, Recorder
from ewc_lib.score.rules import Broadcast, Einsum, OuterProduct, Rows, Scale
from tests.scenarios import SCENARIOS

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[0, 1], [1, 2], [0, 0]])
UNKNOWN = None
"""What is returned for a parameter that some operation without a rule uses."""


def parameters(**shapes):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


class Watched:
    """A recorder, the parameters it watched, and what the forward pass returned."""

    def __init__(self, forward, constants=(), **shapes):
        self.parameters = parameters(**shapes)
        with Recorder(self.parameters, [*self.parameters.values(), *constants]) as self.recorder:
            self.output = forward(**self.parameters)

    @property
    def uses(self):
        return self.recorder.uses

    def seen(self, name, rows=None):
        """Rules of the uses of a parameter, where ``rows`` are those with observations."""
        axes = [BatchAxis() if rows is None or i in rows else None for i in range(len(self.uses))]
        numbers = self.recorder.uses_of(name, axes)
        if numbers is None:
            return UNKNOWN
        return [type(self.uses[i].rule) for i in sorted(set(numbers))]

    def seen_of_data(self, name):
        """The same, where only operations on data have observations."""
        rows = {i for i, use in enumerate(self.uses) if use.shape[:1] == (len(X),)}
        return self.seen(name, rows)


def test_every_use_is_recorded_in_order_with_its_other_input():
    watched = Watched(
        lambda W, b, E: F.linear(X, W, b) + F.linear(F.embedding(TOKENS, E).sum(1), W),
        W=(2, 4),
        b=(2,),
        E=(5, 4),
    )
    W, b, E = watched.parameters.values()
    found = [(use.source, type(use.rule), use.operation, use.shape) for use in watched.uses]
    assert found == [
        (W, OuterProduct, "linear", (3, 2)),
        (b, Broadcast, "linear", (3, 2)),
        (E, Rows, "embedding", (3, 2, 4)),
        (W, OuterProduct, "linear", (3, 2)),
    ]
    assert watched.seen("W") == [OuterProduct, OuterProduct]
    assert watched.seen("b") == [Broadcast]
    assert watched.seen("E") == [Rows]
    assert watched.uses[0].input.data_ptr() == X.data_ptr()
    assert torch.equal(watched.uses[2].input, TOKENS)
    assert watched.uses[1].input.shape == (3, 2)
    assert not any(use.input.requires_grad for use in watched.uses)


def test_the_edge_of_a_use_is_where_the_gradient_of_its_output_arrives():
    def forward(W, b):
        h = F.linear(X, W, b)
        h.mul_(2)  # what happens to the result in place comes after
        return torch.tanh(h).sum()

    watched = Watched(forward, W=(2, 4), b=(2,))
    W, b = watched.parameters.values()
    output_gradients, direct = torch.autograd.grad(
        watched.output, [watched.uses[0].edge, b], retain_graph=True
    )
    assert torch.allclose(output_gradients.sum(0), direct)
    assert torch.allclose(output_gradients.mT @ X, torch.autograd.grad(watched.output, W)[0])


@pytest.mark.parametrize(
    "forward",
    [
        lambda W: torch.maximum(X[:, :2], W[:, 0]),
        lambda W: F.bilinear(X, X, torch.stack([W.mT, W.mT]).expand(2, 4, 2).repeat(1, 1, 2)),
        lambda W: torch.cdist(X, W),
        lambda W: torch.add(X, W[0], alpha=2),
        lambda W: X.clone().mul_(W[0]),
        lambda W: torch.einsum("ni,oi,i->no", X, W, X[0]),
        lambda W: W[TOKENS * X[:, :2].long().clamp(0, 0), 1:],
        lambda W: torch.cat([X, W]),
        lambda W: F.linear(X, W) + torch.cdist(X, W),
        lambda W: F.linear(W, X),
    ],
)
def test_an_operation_without_a_rule_on_a_parameter_and_data_is_known_to_be_unknown(forward):
    assert Watched(forward, W=(2, 4)).seen_of_data("W") is UNKNOWN


@pytest.mark.parametrize(
    "forward",
    [
        lambda W: (W.shape, W.size(0), W.dim(), W.dtype, W.device, len(W), W.requires_grad),
        lambda W: W.numel() * X,
        lambda W: X.to(W),
        lambda W: torch.zeros_like(W) + 1,
        lambda W: W.detach() * 2,
        lambda W: X[:2] * (W > 0),
        lambda W: W.grad,
        lambda W: repr(W),
    ],
)
def test_asking_about_a_parameter_is_no_use(forward):
    watched = Watched(forward, W=(2, 4))
    assert watched.seen("W") == []
    assert watched.uses == []


def test_what_happens_without_gradients_is_no_use():
    def forward(W):
        with torch.no_grad():
            return F.linear(X, W) + W.sum()

    watched = Watched(forward, W=(2, 4))
    assert watched.seen("W") == []
    assert watched.uses == []


@pytest.mark.parametrize(
    ("forward", "rules"),
    [
        (lambda W: W @ W, [OuterProduct, OuterProduct]),
        (lambda W: W + W, [Broadcast, Broadcast]),
        (lambda W: W - W, [Broadcast, Scale]),
        (lambda W: torch.einsum("ni,io->no", W, W), [Einsum, Einsum]),
        (lambda W: F.layer_norm(X.expand(4, 3, 4), (3, 4), W[:3], W[:3]), [Scale, Broadcast]),
        (lambda W: F.linear(W, W), []),  # one rule, for the weight
        (lambda W: torch.stack([W, W]), []),
        (lambda W: torch.addcmul(X[0], W, W), UNKNOWN),
    ],
)
def test_a_parameter_used_twice_in_one_operation_needs_two_rules(forward, rules):
    """Here only square matrices that are no data, and their products with data, have an axis."""
    watched = Watched(forward, W=(4, 4))
    assert watched.seen("W", {i for i, use in enumerate(watched.uses) if use.shape}) == rules


def test_a_use_without_observations_of_its_own_is_unknown():
    watched = Watched(lambda W: F.linear(X, W), W=(2, 4))
    assert watched.seen("W", rows={0}) == [OuterProduct]
    assert watched.seen("W", rows=set()) is UNKNOWN


def test_two_names_of_different_parameters_are_not_confused():
    watched = Watched(lambda V, W: F.linear(F.linear(X, V), W), V=(4, 4), W=(4, 4))
    V = watched.parameters["V"]
    assert [use.source is V for use in watched.uses] == [True, False]
    assert watched.recorder.uses_of("V", [BatchAxis(), BatchAxis()]) == [0]
    assert watched.recorder.uses_of("W", [BatchAxis(), BatchAxis()]) == [1]


def test_only_the_parameters_asked_for_are_watched():
    p = parameters(V=(4, 4), W=(4, 4), b=(4,))
    with Recorder({"W": p["W"]}, p.values()) as recorder:
        F.linear(F.linear(X, p["V"]), p["W"], p["b"])
    assert [use.source is p["W"] for use in recorder.uses] == [True]


def test_in_place_sums_are_uses():
    def forward(b):
        h = X.clone()
        h += b
        return h.add_(b)

    assert Watched(forward, b=(4,)).seen("b") == [Broadcast, Broadcast]


def test_nothing_is_watched_after_the_forward_pass():
    watched = Watched(lambda W: F.linear(X, W), W=(2, 4))
    F.linear(X, watched.parameters["W"])
    assert len(watched.uses) == 1


def test_an_exception_ends_the_watch():
    p = parameters(W=(2, 4))
    recorder = Recorder(p, p.values())
    with pytest.raises(RuntimeError, match="shapes"), recorder:
        F.linear(X, p["W"].T)
    F.linear(X, p["W"])
    assert recorder.uses == []


# What is computed from parameters alone


DERIVED = {
    "transpose": lambda W: W.T,
    "t": lambda W: W.t(),
    "mT": lambda W: W.mT,
    "scaled": lambda W: 2 * W.mT,
    "copy": lambda W: W.mT.clone(),
    "view": lambda W: W.reshape(4, 2),
    "slice": lambda W: torch.cat([W, W], 1).mT[:4],
    "one of several": lambda W: W.mT.split(4)[0],
    "of buffers": lambda W: W.mT * SCALE,
    "normalised": lambda W: (W / W.norm(dim=1, keepdim=True)).mT,
    "looked up": lambda W: W.mT[torch.arange(4)],
    "random": lambda W: F.dropout(W.mT, 0.5, training=True),
    "in a list": lambda W: torch.stack([W[0], W[1]], 1),
}
SCALE = torch.ones(4, 2)


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_a_tensor_computed_from_parameters_is_watched_like_one(derive):
    watched = Watched(lambda W: X @ derive(W), constants=[SCALE], W=(2, 4))
    assert watched.seen_of_data("W") == [OuterProduct]
    (use,) = (use for use in watched.uses if use.shape[:1] == (3,))
    assert use.source is not watched.parameters["W"]
    assert use.source.shape == (4, 2)


def test_all_uses_of_what_was_computed_count():
    def forward(V, W):
        both = torch.cat([V, W.T])
        return F.linear(X, both) + (X @ both.T) * W[0, 0]

    watched = Watched(forward, V=(1, 4), W=(4, 1))
    assert watched.seen_of_data("V") == [OuterProduct, OuterProduct]
    assert watched.seen_of_data("W") == [OuterProduct, OuterProduct, Scale]


def test_one_unknown_use_of_what_was_computed_makes_all_of_it_unknown():
    def forward(V, W):
        both = V * W.T
        return F.linear(X, both) + torch.cdist(X, both)

    watched = Watched(forward, V=(2, 4), W=(4, 2))
    assert watched.seen_of_data("V") is UNKNOWN
    assert watched.seen_of_data("W") is UNKNOWN


@pytest.mark.parametrize(
    "same",
    [
        lambda W: W.contiguous(),
        lambda W: W.to(W.dtype),
        lambda W: W.float(),
        lambda W: W.to(X),
        lambda W: W.type_as(W.detach()),
        lambda W: W.requires_grad_(),
    ],
)
def test_asking_for_what_a_tensor_already_is_changes_nothing(same):
    watched = Watched(lambda W: F.linear(X, same(W)), W=(2, 4))
    assert watched.uses[-1].source is watched.parameters["W"]
    assert watched.seen("W") in ([OuterProduct], UNKNOWN)
    alone = Watched(lambda W: F.linear(X, W.contiguous().float()), W=(2, 4))
    assert alone.seen("W") == [OuterProduct]


def test_an_operation_on_parameters_counts_where_observations_have_rows_of_their_own():
    """A parameter that is spread over the batch has one row for each observation."""
    watched = Watched(lambda W: torch.tanh(W.expand(3, 4) * 2 + X), W=(4,))
    (spread,) = (i for i, use in enumerate(watched.uses) if use.operation == "expand")
    added = next(i for i, use in enumerate(watched.uses) if use.source.shape == (3, 4))
    assert watched.recorder.uses_of("W", [BatchAxis()] * len(watched.uses)) == [spread]
    apart = [None if i == spread else BatchAxis() for i in range(len(watched.uses))]
    assert watched.recorder.uses_of("W", apart) == [added]


def test_what_is_forgotten_is_not_confused_with_what_follows():
    """A new tensor may have the address of one that no longer exists."""

    def forward(W):
        for _ in range(50):
            W * 2
            h = X * 1.5
        return h

    watched = Watched(forward, W=(4,))
    assert watched.uses == []
    assert watched.seen("W") == []


# Constants and data


def test_a_tensor_of_the_model_is_constant_until_data_are_written_to_it():
    scale = torch.ones(2, 4)

    def before(W):
        return F.linear(X, W * scale)

    def after(W):
        scale.mul_(X.mean())
        return F.linear(X, W * scale)

    assert Watched(before, constants=[scale], W=(2, 4)).seen_of_data("W") == [OuterProduct]
    assert Watched(after, constants=[scale], W=(2, 4)).seen_of_data("W") is UNKNOWN


def test_a_tensor_that_is_not_of_the_model_is_data():
    scale = torch.ones(2, 4)
    watched = Watched(lambda W: F.linear(X, W * scale), W=(2, 4))
    assert watched.seen_of_data("W") is UNKNOWN


def test_what_was_computed_from_parameters_may_become_data():
    def forward(W):
        w = W.clone()
        w.add_(X.mean())
        return F.linear(X, w)

    assert Watched(forward, W=(2, 4)).seen_of_data("W") is UNKNOWN


def test_entries_written_into_a_copy_are_seen():
    def forward(V, W):
        w = W.clone()
        w[0] = V
        return F.linear(X, w)

    watched = Watched(forward, V=(4,), W=(2, 4))
    assert watched.seen_of_data("W") == [OuterProduct]
    assert watched.seen_of_data("V") == [OuterProduct]


def _halves(W):
    whole = torch.zeros(4, 2)
    whole[:2] = W[:, :2]
    view = whole[2:]
    view.copy_(W[:, 2:])
    return whole


def _sums(W):
    total = torch.eye(4)[:, :2].clone()
    total += W.T
    return total.mul_(2).add_(W.mT)


def _each_other(W):
    first, second = W.mT * 2, W.mT * 3
    first.add_(second)
    second.add_(first)
    return second


@pytest.mark.parametrize("write", [_halves, _sums, _each_other])
def test_what_parameters_are_written_into_is_computed_from_them(write):
    watched = Watched(lambda W: X @ write(W), W=(2, 4))
    assert watched.seen_of_data("W") == [OuterProduct]
    assert watched.uses[-1].source.shape == (4, 2)


class Product(torch.autograd.Function):
    """A product that nobody sees."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.mT, a.mT @ g


def test_what_a_custom_function_computes_from_parameters_alone_is_watched():
    watched = Watched(lambda V, W: F.linear(X, Product.apply(V, W.T) * 2), V=(2, 3), W=(4, 3))
    assert watched.seen_of_data("V") == watched.seen_of_data("W") == [OuterProduct]


def test_what_a_custom_function_computes_from_data_is_not():
    watched = Watched(lambda V, W: F.linear(Product.apply(X, V), W), V=(4, 3), W=(2, 3))
    assert watched.seen_of_data("V") == []
    assert watched.seen_of_data("W") == [OuterProduct]


@pytest.mark.parametrize(
    "derive",
    [
        lambda W, x: W.mT.to(x),
        lambda W, x: W.mT * torch.ones_like(x[:2].mT),
        lambda W, x: W.mT + x.new_zeros(4, 2),
        lambda W, x: W.reshape_as(x[:2].mT),
        lambda W, x: W.unsqueeze(0)[x.long().sum() * 0].mT,
    ],
)
def test_whatever_takes_only_form_or_choice_from_data_does_not_depend_on_them(derive):
    watched = Watched(lambda W: X.double() @ derive(W, X.double()).double(), W=(2, 4))
    assert watched.seen_of_data("W") == [OuterProduct]


def test_new_tensors_without_data_are_constant():
    watched = Watched(lambda W: F.linear(X, W * torch.arange(4.0) + torch.ones(2, 4)), W=(2, 4))
    assert watched.seen_of_data("W") == [OuterProduct]


# What must stay the same, and what is measured


def signature(n, *positions, kind=0):
    a = torch.ones(n, *positions, 4)
    forward, shape = [
        (lambda W: F.linear(a, W), (2, 4)),
        (lambda W: a @ W, (4, 2)),
        (lambda W: a + W, (4,)),
        (lambda W: a * W, (4,)),
    ][kind]
    (use,) = Watched(forward, W=shape).uses
    return use.signature(n)


def test_a_signature_ignores_the_number_of_observations_and_nothing_else():
    assert signature(3) == signature(5)
    assert signature(3, 2) == signature(3, 7) == signature(5, 2)
    different = [signature(3), signature(3, 2), *(signature(3, kind=kind) for kind in (1, 2, 3))]
    assert len(set(different)) == len(different)


def test_a_signature_shows_how_many_axes_the_input_has():
    rule, shape = Scale(torch.Size([4])), torch.Size([3, 4])
    found = [ParameterUse(X, rule, a, None, shape, "mul").signature(3) for a in (X, X.unsqueeze(1))]
    assert found[0] != found[1]


def test_a_signature_shows_whether_observations_are_flattened():
    a = torch.ones(6, 4)
    (use,) = Watched(lambda W: F.linear(a, W), W=(2, 4)).uses
    assert use.signature(6) != use.signature(3)


def test_the_steps_show_which_parameter_went_which_way():
    def steps(forward):
        return Watched(forward, V=(4, 4), W=(4, 4)).recorder.steps

    found = [
        steps(lambda V, W: F.linear(F.linear(X, V), W)),
        steps(lambda V, W: F.linear(F.linear(X, W), V)),
        steps(lambda V, W: F.linear(F.linear(X, V), V)),
        steps(lambda V, W: F.linear(torch.cdist(X, V), W)),
        steps(lambda V, W: F.linear(F.linear(X, V.T), W)),
    ]
    assert len(set(found)) == len(found)
    assert steps(lambda V, W: F.linear(F.linear(X[:2], V), W)) == found[0]


def test_the_coarsest_result_sets_the_precision():
    def eps(forward):
        return Watched(forward, W=(2, 4)).recorder.eps

    assert eps(lambda W: F.linear(X, W)) == torch.finfo(torch.float32).eps
    assert eps(lambda W: F.linear(X.double(), W.double())) == torch.finfo(torch.float64).eps
    coarse = torch.finfo(torch.bfloat16).eps
    assert eps(lambda W: F.linear(X.bfloat16(), W.bfloat16()).double()) == coarse
    assert eps(lambda W: (X > 0, X.argmax())) == 0


def test_the_size_of_all_results_is_counted():
    watched = Watched(lambda W: (F.linear(X, W).tanh(), X.split(1)), W=(2, 4))
    assert watched.recorder.nbytes == 2 * (3 * 2 * 4) + 3 * 4 * 4


def watch_attention(run):
    case = SCENARIOS["multihead_attention"]()
    watched = Watched(lambda: None)
    watched.parameters = dict(case.model.named_parameters())
    watched.recorder = Recorder(watched.parameters, watched.parameters.values())
    with watched.recorder:
        run(case)
    return case, watched


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_looked_into(need_weights):
    case, watched = watch_attention(
        lambda case: case.model.attention(case.x, case.x, case.x, need_weights=need_weights)
    )
    n = len(case.x)
    rows = {i for i, use in enumerate(watched.uses) if any(size % n == 0 for size in use.shape[:2])}
    found = {name: watched.seen(name, rows) for name in watched.parameters}
    assert found == {
        "attention.in_proj_weight": [OuterProduct],
        "attention.in_proj_bias": [Broadcast],
        "attention.out_proj.weight": [OuterProduct],
        "attention.out_proj.bias": [Broadcast],
        "head.weight": [],
        "head.bias": [],
    }


def test_what_is_looked_into_is_watched_only_within():
    """The watch continues after a composite operation, and ends where it should."""
    case, watched = watch_attention(lambda case: case.model(case.x))
    count = len(watched.uses)
    assert watched.uses[-1].source is case.model.head.bias
    case.model(case.x)
    assert len(watched.uses) == count
