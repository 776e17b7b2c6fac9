"""What a training step does with parameters, their anchor and a precision."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from ewc_lib import EWC
from tests.counting import operations

DOUBLE = torch.float64
STRUCTURES = ["diagonal", "dense", "block", "kronecker", "lowrank"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def network(layers=3, dtype=DOUBLE, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [m for _ in range(layers) for m in (nn.Linear(3, 3, **options), nn.Tanh())]
    return nn.Sequential(*found[:-1]).to(dtype)


def task(seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, generator=generator, dtype=DOUBLE).to(dtype), torch.arange(8) % 3


def move(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=DOUBLE).to(p.dtype)


def held(model, tasks=1, **options):
    """A penalty of a model that has gone on since."""
    ewc = EWC(model, 3.0, kind="empirical", **options)
    for seed in range(tasks):
        ewc.consolidate(task(seed, next(model.parameters()).dtype))
        move(model, seed)
    return ewc


def sgd(model):
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)


def set_gradients(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def by_autograd(model, ewc):
    """The gradients that the penalty has in a loss, beside those that are there."""
    before = [p.grad for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients(model), strict=True):
        p.grad = g
    ewc.penalty().backward()
    found = gradients(model)
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g
    return found


# How much there is to do

FORMS = {
    "penalty": (lambda ewc, optimizer: ewc.penalty(), 7),
    "gradient": (lambda ewc, optimizer: ewc.add_gradient_(), 2),
    "proximal": (lambda ewc, optimizer: ewc.proximal_step_(optimizer), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_operations_are_few_and_constant_whatever_the_number_of_parameters(form, dtype):
    step, most = FORMS[form]

    def count(layers, tasks):
        model = network(layers, dtype)
        assert len(list(model.parameters())) == 2 * layers
        ewc, optimizer = held(model, tasks), sgd(model)
        set_gradients(model)
        step(ewc, optimizer)
        return operations(lambda: step(ewc, optimizer))

    converted = {"penalty": 1, "gradient": 6, "proximal": 5}[form]  # and what was rounded away
    assert count(3, tasks=1) == most + (dtype == torch.bfloat16) * converted
    assert count(28, tasks=1) == count(3, tasks=2) == count(3, tasks=1)


def test_rates_of_entries_take_a_constant_number_of_operations_too():
    def count(layers):
        model = network(layers, torch.float32)
        ewc, optimizer = held(model), torch.optim.Adam(model.parameters(), lr=0.1)
        set_gradients(model)
        optimizer.step()
        return operations(lambda: ewc.proximal_step_(optimizer))

    assert count(3) == count(28) == 8


def test_gradients_that_are_missing_take_a_constant_number_of_operations_too():
    def count(layers):
        model = network(layers, torch.float32)
        return operations(held(model).add_gradient_)

    assert count(3) == count(28) == 3


def test_the_gradient_of_a_penalty_in_the_loss_is_one_operation_for_all_parameters():
    """But for the sums with the gradients of the loss, which autograd makes one by one."""

    def count(layers):
        model = network(layers, torch.float32)
        ewc = held(model)
        penalty, own = ewc.penalty(), list(model.parameters())
        return operations(lambda: torch.autograd.grad(penalty, own))

    assert count(3) == count(28) <= 6


def test_memory_in_another_layout_is_laid_out_as_the_parameters_are():
    model = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    model = model.to(memory_format=torch.channels_last)
    ewc = EWC(model, 1.0)
    ewc.consolidate((torch.randn(6, 3, 3, 3), torch.arange(6) % 3))
    restored = EWC(model, 1.0)
    restored.load_state_dict(ewc.state_dict())
    for found in (ewc, restored):
        for vector in (found.anchor, found.precision.values):
            strides = {name: value.stride() for name, value in vector.items()}
            assert strides == {name: p.stride() for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_without_operations_on_lists_the_numbers_are_the_same(form, dtype, monkeypatch):
    lists = [name for name in vars(torch) if name.startswith("_foreach_")]

    def after(without):
        model = network(dtype=dtype)
        ewc, optimizer = held(model, tasks=2), sgd(model)
        set_gradients(model)
        with monkeypatch.context() as patch:
            for name in without:
                patch.delattr(torch, name)
            value = FORMS[form][0](ewc, optimizer)
            if value is not None:
                value.backward()
        return [*gradients(model), *model.parameters()]

    for found, expected in zip(after(lists), after([]), strict=True):
        torch.testing.assert_close(found, expected)


# Derivatives


@each_structure
def test_a_penalty_can_be_differentiated_twice(structure):
    model = network()
    ewc, own = held(model, structure=structure), list(model.parameters())
    first = torch.autograd.grad(ewc.penalty(), own, create_graph=True)
    direction = [torch.randn_like(p) for p in own]
    product = sum((g * v).sum() for g, v in zip(first, direction, strict=True))
    second = torch.autograd.grad(product, own)
    v = torch.cat([v.reshape(-1) for v in direction])
    expected = ewc.strength * (ewc.precision.to_dense() @ v)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in second]), expected)


@each_structure
def test_a_region_of_autocast_rounds_nothing_of_a_step(structure):
    def steps(enabled):
        model = network(dtype=torch.float32)
        ewc, optimizer = held(model, structure=structure), sgd(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            penalty = ewc.penalty()
            ewc.add_gradient_()
            ewc.proximal_step_(optimizer)
        return penalty, *gradients(model), *model.parameters()

    for found, expected in zip(steps(enabled=True), steps(enabled=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Penalty(nn.Module):
    """A penalty as a function of the parameters."""

    def __init__(self, ewc):
        super().__init__()
        self.model, self.ewc = ewc.model, ewc

    def forward(self):
        return self.ewc.penalty()


def test_a_penalty_is_a_function_for_functional_transformations():
    model = network()
    ewc = held(model)
    module = Penalty(ewc)
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}
    diagonal = {f"model.{n}": 3 * v for n, v in ewc.precision.values.items()}
    moved = {f"model.{n}": p.detach() - ewc.anchor[n] for n, p in model.named_parameters()}

    def penalty(theta):
        return functional_call(module, theta, ())

    found = grad(penalty)(theta)
    torch.testing.assert_close(found, {n: diagonal[n] * moved[n] for n in theta})
    name = "model.0.bias"
    torch.testing.assert_close(hessian(penalty)(theta)[name][name], diagonal[name].diag())
    many = {n: torch.stack([value, value + 1]) for n, value in theta.items()}
    both = vmap(grad(penalty))(many)
    torch.testing.assert_close(both[name][1], diagonal[name] * (moved[name] + 1))


def test_a_penalty_has_a_derivative_along_a_direction():
    model = network()
    module = Penalty(held(model))
    own = dict(module.named_parameters())
    slope = torch.autograd.grad(module(), own.values())
    direction = {name: torch.randn_like(p) for name, p in own.items()}
    with forward_mode.dual_level():
        dual = {n: forward_mode.make_dual(p, direction[n]) for n, p in own.items()}
        found = forward_mode.unpack_dual(functional_call(module, dual, ())).tangent
    expected = sum((g * v).sum() for g, v in zip(slope, direction.values(), strict=True))
    torch.testing.assert_close(found, expected)


@each_structure
def test_derivatives_of_the_first_and_second_order_are_those_of_differences(structure):
    model = network()
    module = Penalty(held(model, structure=structure))
    names = [name for name, _ in module.named_parameters()]

    def penalty(*values):
        return functional_call(module, dict(zip(names, values, strict=True)), ())

    own = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(penalty, own, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(penalty, own)


@pytest.mark.parametrize("params", [None, ["2.*"]])
def test_tensors_that_ask_for_no_gradient_may_take_the_place_of_parameters(params):
    model = network()
    model[0].requires_grad_(False)
    module = Penalty(held(model, params=params))
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in theta.items()}
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(module(), own.values(), materialize_grads=True)
    expected = sum((g * directions[n]).sum() for n, g in zip(own, slopes, strict=True))

    def penalty(theta):
        return functional_call(module, theta, ())

    torch.testing.assert_close(penalty(theta), module().detach())
    torch.testing.assert_close(jvp(penalty, (theta,), (directions,)), (module(), expected))
    found = grad(penalty)(theta)
    for name, g in zip(own, slopes, strict=True):
        torch.testing.assert_close(found[name], g)
    module().backward()  # the parameters are back


def test_an_optimizer_may_ask_for_the_penalty_again_and_again():
    """L-BFGS finds the anchor, where the penalty is smallest."""
    model = network()
    ewc = held(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=50, tolerance_grad=1e-14)

    def closure():
        optimizer.zero_grad()
        penalty = ewc.penalty()
        penalty.backward()
        return penalty

    first = closure().item()
    for _ in range(5):
        optimizer.step(closure)
    assert closure().item() < 1e-6 * first


# Gradients of all kinds


@each_structure
def test_gradients_that_are_missing_for_some_are_made_and_the_others_kept(structure):
    model = network()
    ewc = held(model, structure=structure)
    set_gradients(model)
    model[0].bias.grad = model[2].weight.grad = None
    there, expected = [p.grad for p in model.parameters()], by_autograd(model, ewc)
    ewc.add_gradient_()
    for p, g, before in zip(model.parameters(), expected, there, strict=True):
        torch.testing.assert_close(p.grad, g)
        assert before is None or p.grad is before


class Words(nn.Module):
    def __init__(self, sparse=False, tied=False):
        super().__init__()
        self.embed = nn.Embedding(5, 3, sparse=sparse)
        self.head = nn.Linear(3, 5)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def words(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words(**options).double()
    x, y = torch.arange(8) % 4, torch.arange(8) % 5
    ewc = EWC(model, 3.0)
    ewc.consolidate((x, y))
    move(model)
    F.cross_entropy(model(x), y).backward()
    return model, ewc


@pytest.mark.parametrize("options", [{"sparse": True}, {"tied": True}], ids=str)
def test_a_gradient_that_is_sparse_and_one_that_is_shared_are_those_of_the_loss(options):
    model, ewc = words(**options)
    twin, other = words(**options)
    other.penalty().backward()
    ewc.add_gradient_()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="PyTorch before 2.10")
@each_structure
@pytest.mark.parametrize("missing", [True, False])
def test_a_gradient_has_the_dtype_that_its_parameter_wants(structure, missing):
    model = network(dtype=torch.bfloat16)
    ewc = held(model, structure=structure)
    for p in model.parameters():
        p.grad_dtype = torch.float32
        p.grad = None if missing else torch.ones_like(p, dtype=torch.float32)
    ewc.add_gradient_()
    first = 0.0 if missing else 1.0
    own = torch.autograd.grad(ewc.penalty(), list(model.parameters()))
    for p, g in zip(model.parameters(), own, strict=True):
        torch.testing.assert_close(p.grad, first + g.float(), rtol=1e-2, atol=1e-2)


class Mixed(nn.Module):
    """Parameters of four dtypes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3).double()
        self.small = nn.Linear(3, 3).bfloat16()
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x):
        h = self.small(self.first(x).bfloat16()).double()
        return self.last(h) + (self.complex * x).real


@pytest.mark.filterwarnings("ignore:vmap cannot follow:RuntimeWarning")
@pytest.mark.parametrize("form", ["gradient", "proximal", "Adam"])
def test_parameters_of_several_dtypes_each_keep_theirs(form):
    with torch.random.fork_rng():
        model = Mixed()
    ewc = EWC(model, 3.0)
    ewc.consolidate((torch.randn(8, 3), torch.arange(8) % 3))
    move(model)
    dtypes = [p.dtype for p in model.parameters()]
    A, m = ewc.precision.values, ewc.anchor
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if form == "gradient":
        expected = by_autograd(model, ewc)
        ewc.add_gradient_()
        found = gradients(model)
    else:
        optimizer, divisor = sgd(model), 1.0
        if form == "Adam":  # the roots of the means of squares are 2, of both parts of a number
            optimizer, divisor = torch.optim.Adam(model.parameters(), lr=0.1), 2.0
            for p in model.parameters():
                p.grad = torch.full_like(p, complex(2, -2) if p.is_complex() else 2.0)
            optimizer.step()
            for name, p in model.named_parameters():
                p.detach().copy_(start[name])
        pull = {n: 0.1 * 3.0 * A[n] / divisor for n in A}
        expected = [((p + pull[n] * m[n]) / (1 + pull[n])).to(p.dtype) for n, p in start.items()]
        ewc.proximal_step_(optimizer)
        found = [p.detach() for p in model.parameters()]
    assert [value.dtype for value in found] == dtypes
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_a_model_of_another_precision_since_is_held_in_that_of_the_anchor():
    model = network(dtype=torch.float32)
    ewc = held(model)
    before = ewc.penalty().item()
    model.double()
    assert ewc.penalty().item() == pytest.approx(before, rel=1e-5)
    expected = by_autograd(model, ewc)
    ewc.add_gradient_()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad.dtype == DOUBLE
        torch.testing.assert_close(p.grad, g)


def test_a_penalty_that_was_not_yet_differentiated_lets_the_optimizer_move():
    model = network()
    ewc = held(model)
    penalty, expected = ewc.penalty(), by_autograd(model, ewc)
    move(model, 1)
    penalty.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_wrapper_around_the_model_changes_nothing_but_names():
    model = network()
    wrapped = nn.DataParallel(copy.deepcopy(model))
    one, other = held(model), held(wrapped)
    assert torch.equal(one.penalty(), other.penalty())
    for penalty in (one, other):
        penalty.add_gradient_()
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# Compiled

BACKEND = "aot_eager"  # which needs no compiler of C++


@pytest.fixture
def fresh():
    """Forget what other tests have compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def train(form, compiled, structure="diagonal", params=None, backend=BACKEND):
    """Take some steps, among them a change of strength and another task; return the losses."""
    model = network()
    ewc = held(model, structure=structure, params=params)
    optimizer, (x, y) = torch.optim.Adam(model.parameters(), lr=0.01), task(9)

    def loss():
        plain = F.cross_entropy(model(x), y)
        return plain + ewc.penalty() if form == "penalty" else plain

    def proximal():
        ewc.proximal_step_(optimizer)

    parts = [loss, ewc.add_gradient_, proximal]
    if compiled:
        parts = [torch.compile(part, backend=backend, fullgraph=True) for part in parts]
    losses = []
    for step in range(6):
        if step == 2:
            ewc.strength = 10.0
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.02
        if step == 4 and structure != "kronecker":
            ewc.consolidate(task(5))
        optimizer.zero_grad()
        losses.append(parts[0]())
        losses[-1].backward()
        if form == "gradient":
            parts[1]()
        optimizer.step()
        if form == "proximal":
            parts[2]()
    return losses, list(model.parameters())


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("params", [None, ["*.weight", "0.bias"]])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_one_graph_for_the_compiler_with_the_same_numbers(form, params):
    torch.testing.assert_close(train(form, True, params=params), train(form, False, params=params))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("structure", STRUCTURES[1:])
@pytest.mark.parametrize("form", ["penalty", "gradient"])
def test_other_structures_are_one_graph_too(form, structure):
    torch.testing.assert_close(train(form, True, structure), train(form, False, structure))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("form", FORMS)
def test_the_default_compiler_finds_the_same_numbers(form):
    try:
        found = train(form, True, backend="inductor")
    except torch._inductor.exc.InductorError as problem:
        pytest.skip(f"no compiler here: {problem}")
    torch.testing.assert_close(found, train(form, False))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_compiled_step_breaks_no_more_than_without_a_penalty(form):
    """PyTorch's own ``zero_grad`` and ``backward`` break it."""

    def breaks(form):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = network()
        ewc, optimizer, (x, y) = held(model), sgd(model), task(9)

        def step():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + ewc.penalty() if form == "penalty" else loss).backward()
            if form == "gradient":
                ewc.add_gradient_()
            optimizer.step()
            if form == "proximal":
                ewc.proximal_step_(optimizer)

        compiled = torch.compile(step, backend="eager")
        for _ in range(2):
            compiled()
        return torch._dynamo.utils.counters["graph_break"]

    assert breaks(form) == breaks("plain")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["frozen", "grown", "one rate each"])
def test_a_compiled_step_follows_a_model_that_has_changed(change, form):
    def run(compiled):
        model = network()
        ewc = held(model, params=["*.weight"])
        step = FORMS[form][0]
        if compiled:
            step = torch.compile(step, backend=BACKEND, fullgraph=True)
        set_gradients(model)
        step(ewc, sgd(model))
        if change == "frozen":
            model[2].requires_grad_(False)
        elif change == "grown":
            larger = torch.ones(4, 3, dtype=DOUBLE)
            larger[:3] = model[4].weight.detach()
            model[4].weight = nn.Parameter(larger)
            model[4].bias = nn.Parameter(torch.ones(4, dtype=DOUBLE))
        optimizer = sgd(model)
        if change == "one rate each":
            optimizer = torch.optim.SGD(
                [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())]
            )
        model.zero_grad()
        F.cross_entropy(model(task(9)[0])[:, :3], task(9)[1]).backward()
        return step(ewc, optimizer), gradients(model), list(model.parameters())

    torch.testing.assert_close(run(compiled=True), run(compiled=False))
