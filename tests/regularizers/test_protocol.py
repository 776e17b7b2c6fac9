"""What holds for every method against forgetting, :class:`ewc_lib.EWC` among them."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from ewc_lib import EWC
from ewc_lib.regularizers import AdapterEWC, KroneckerLaplace, Regularizer, add_adapters
from tests.counting import operations
from tests.regularizers.cases import (
    FUNCTION,
    METHODS,
    QUADRATIC,
    TIGHT,
    after_one_task,
    copies,
    gradients,
    learn,
    move,
    network,
    sgd,
    task,
)
from tests.scenarios import same, trace_of

each = pytest.mark.parametrize("name", METHODS)
each_quadratic = pytest.mark.parametrize("name", QUADRATIC)
each_function = pytest.mark.parametrize("name", FUNCTION)


def noted(regularizer, seed=9):
    """Give a method the inputs of a step."""
    regularizer.before_step(task(seed)[0])
    return regularizer


@each
def test_it_is_a_regularizer(name):
    assert isinstance(METHODS[name](network(), 1.0), Regularizer)


@pytest.mark.parametrize("wrong", [{"kind": "mc"}, {"likelihood": "regression"}], ids=str)
@pytest.mark.parametrize("method", [EWC, KroneckerLaplace, AdapterEWC])
def test_an_unknown_word_is_refused_when_a_method_is_made(method, wrong):
    model = nn.Sequential(nn.Linear(2, 2))
    add_adapters(model, ["0"], 1)
    with pytest.raises(ValueError, match=r"did you mean '(sampled|gaussian)'"):
        method(model, 1.0, **wrong)


@pytest.mark.parametrize("name", ["L2", "MAS", "RWalk", "SI"])
def test_an_importance_of_complex_parameters_is_refused_when_a_method_is_made(name):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64)])
    with pytest.raises(ValueError, match=f"'1.weight' is complex: {name} knows real ones only"):
        METHODS[name](model, 1.0)
    model[1].requires_grad_(False)
    assert METHODS[name](model, 1.0)


@each
def test_it_is_shown_in_one_line(name):
    method = METHODS[name](network(), 3.0)
    shown = r"strength=3\.0, n_tasks=0(, structure='[\w ]+')?(, mode='\w+', kind='\w+')?"
    assert re.fullmatch(rf"{type(method).__name__}\({shown}\)", repr(method))


@each
def test_before_the_first_task_it_is_zero_and_adds_no_gradient(name):
    model = network()
    regularizer = METHODS[name](model, 3.0)
    x, y = task()
    F.cross_entropy(model(x), y).backward()
    regularizer.before_step(x)
    before = gradients(model)
    assert regularizer.penalty().shape == ()
    assert regularizer.penalty().item() == 0
    regularizer.add_gradient_()
    assert same(gradients(model), before)
    assert regularizer.n_tasks == 0


@each
def test_after_a_task_it_is_positive_at_moved_parameters(name):
    model, regularizer = after_one_task(name)
    move(model)
    assert regularizer.n_tasks == 1
    assert noted(regularizer).penalty().item() > 1e-4


@pytest.mark.parametrize("name", [*QUADRATIC, "LwF"])
def test_it_is_zero_with_zero_gradient_where_nothing_has_moved(name):
    model, regularizer = after_one_task(name)
    assert abs(noted(regularizer).penalty().item()) < 1e-14
    model.zero_grad()
    regularizer.add_gradient_()
    assert all(p.grad is None or p.grad.abs().max() < 1e-14 for p in model.parameters())


@each
@pytest.mark.parametrize("heads", [True, False])
def test_a_run_differs_from_the_plain_run_from_the_second_task_on(name, heads):
    def run(make):
        model = network()
        regularizer = None if make is None else make(model)
        optimizer, after = sgd(model, lr=0.02), []
        for t in range(2):
            model.outputs = range(2 * t, 2 * t + 2) if heads else range(2)
            learn(model, optimizer, regularizer, task(t))
            after.append(copies(model))
        return after

    plain, held = run(None), run(lambda model: METHODS[name](model, 3.0))
    free = run(lambda model: METHODS[name](model, 0.0))
    assert same(held[0], plain[0])
    difference = max((held[1][n] - p).abs().max() for n, p in plain[1].items())
    assert 1e-4 < difference < 1
    assert same(free[1], plain[1])


@each
@pytest.mark.parametrize("existing", [True, False])
def test_adding_the_gradient_equals_the_penalty_in_the_loss(name, existing):
    model, regularizer = after_one_task(name)
    move(model)
    noted(regularizer)
    model.zero_grad()
    if existing:
        for seed, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 * seed)
    before, objects = gradients(model), [p.grad for p in model.parameters()]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(regularizer.penalty(), parameters.values(), allow_unused=True)
    regularizer.add_gradient_()
    for (n, p), g in zip(parameters.items(), found, strict=True):
        expected = (0 if before[n] is None else before[n]) + (0 if g is None else g)
        torch.testing.assert_close(p.grad, expected, **TIGHT)
        assert not p.grad.requires_grad
    assert all(p.grad is g for p, g in zip(parameters.values(), objects, strict=True) if existing)


@each
def test_a_restored_method_has_the_same_penalty_and_goes_on_identically(name):
    model, regularizer = after_one_task(name)
    model.outputs = range(2, 4)
    learn(model, sgd(model), regularizer, task(1))
    state = load(save(regularizer.state_dict()))
    twin = copy.deepcopy(model)
    restored = METHODS[name](twin, 3.0)
    restored.load_state_dict(state)
    assert restored.n_tasks == 2
    for m, r in ((model, regularizer), (twin, restored)):
        m.outputs = range(0, 2)
        learn(m, sgd(m), r, task(2))
        move(m)
        noted(r)
    assert same(copies(model), copies(twin))
    assert regularizer.penalty().item() > 0
    assert torch.equal(regularizer.penalty(), restored.penalty())
    assert same(regularizer.state_dict(), restored.state_dict())


@each
def test_a_state_from_before_the_first_task_can_be_restored(name):
    model, regularizer = after_one_task(name)
    regularizer.load_state_dict(load(save(METHODS[name](model, 1.0).state_dict())))
    move(model)
    assert regularizer.n_tasks == 0
    assert noted(regularizer).penalty().item() == 0


@each
def test_a_state_does_not_change_when_training_goes_on(name):
    model, regularizer = after_one_task(name)
    state = regularizer.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    learn(model, sgd(model), regularizer, task(1))
    assert same(state, before)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("replay", "joint")])
def test_the_state_of_a_network_with_other_shapes_is_refused_and_changes_nothing(name):
    _, regularizer = after_one_task(name)
    _, other = after_one_task(name, n_outputs=6)
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match="is given in shape"):
        regularizer.load_state_dict(other.state_dict())
    assert same(regularizer.state_dict(), before)


@each
@pytest.mark.parametrize("other", ["SI", "Kronecker Laplace", "LwF", "joint"])
def test_the_state_of_another_method_is_refused(name, other):
    same_class = {"replay": "joint", "online EWC": "EWC"}
    if same_class.get(name, name) == same_class.get(other, other):
        pytest.skip("the same method")
    _, regularizer = after_one_task(name)
    _, its = after_one_task(other)
    with pytest.raises(ValueError, match="state"):
        regularizer.load_state_dict(its.state_dict())


@each
def test_frozen_parameters_are_left_alone(name):
    model = network()
    model.outputs = range(2)
    model.net[0].requires_grad_(False)
    regularizer = METHODS[name](model, 3.0)
    frozen = copies(model.net[0])
    for t in range(2):
        learn(model, sgd(model), regularizer, task(t))
    move(model.net[2])
    noted(regularizer).add_gradient_()
    assert regularizer.penalty().item() > 0
    assert same(copies(model.net[0]), frozen)
    assert all(p.grad is None for p in model.net[0].parameters())
    assert all(p.grad is not None for p in model.net[2].parameters())


@each
def test_a_head_that_was_never_read_is_free(name):
    if name == "L2":
        pytest.skip("it holds everything")
    model, regularizer = after_one_task(name)
    with torch.no_grad():
        model.net[2].weight[2:] += 1
        model.net[2].bias[2:] += 1
    model.outputs = range(2, 4)
    model.zero_grad()
    noted(regularizer).add_gradient_()
    assert all(not p.grad[2:].any() for p in model.net[2].parameters())


@each
def test_the_end_of_a_task_leaves_no_trace_in_the_model(name):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x))

    model = Noisy().double()
    regularizer = METHODS[name](model, 1.0)
    learn(model, sgd(model), regularizer, task(), finish=False)
    model.body[1].eval()
    before = trace_of(model)
    regularizer.consolidate(task())
    assert same(trace_of(model), before)


@each
def test_the_data_may_come_in_batches(name):
    def finished(data):
        model = network()
        model.outputs = range(2)
        regularizer = METHODS[name](model, 1.0)
        learn(model, sgd(model), regularizer, task(), finish=False)
        regularizer.consolidate(data)
        return regularizer.state_dict()

    x, y = task()
    batches = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
    once, parts = finished((x, y)), finished(batches)
    assert once.keys() == parts.keys()
    for key, value in once.items():
        torch.testing.assert_close(parts[key], value, **TIGHT)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("replay", "joint")])
def test_memory_does_not_grow_with_the_number_of_tasks(name):
    model, regularizer = after_one_task(name)

    def sizes():
        return {key: (t.shape, t.dtype) for key, t in regularizer.state_dict().items()}

    one = sizes()
    for t in range(3):
        learn(model, sgd(model, lr=0.01), regularizer, task(t))
    assert sizes() == one


@each_quadratic
def test_a_proximal_step_pulls_towards_the_anchor(name):
    def distance(proximal):
        model, regularizer = after_one_task(name)
        regularizer.strength, anchor = 1e3, copies(model)
        model.outputs = range(2, 4)
        optimizer = sgd(model, lr=0.02)
        learn(model, optimizer, regularizer if proximal else None, task(1), proximal=proximal)
        return sum((p - anchor[n]).square().sum() for n, p in copies(model).items())

    assert 0 < distance(True) < 0.99 * distance(False)


@each_quadratic
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_are_remembered_in_single_precision(name, dtype):
    model, regularizer = after_one_task(name, dtype=dtype)
    assert {v.dtype for v in regularizer.precision.diagonal().values()} == {torch.float32}
    assert {v.dtype for v in regularizer.anchor.values()} == {torch.float32}
    move(model)
    model.zero_grad()
    regularizer.add_gradient_()
    assert 0 < regularizer.penalty().item() < math.inf
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", [n for n in QUADRATIC if n != "L2"])
def test_an_importance_that_is_zero_everywhere_warns(name):
    model = nn.Linear(3, 2, bias=False).double()
    regularizer = METHODS[name](model, 1.0)
    x, y = task()
    with pytest.warns(RuntimeWarning, match="zero everywhere") as caught:
        regularizer.consolidate((0 * x, y))
    assert [w.filename for w in caught] == [__file__]


@each_quadratic
def test_only_the_chosen_parameters_are_held(name):
    if name in ("EWC", "online EWC"):
        make = lambda model: EWC(model, 1.0, params="net.2.*")  # noqa: E731
    else:
        make = lambda model: type(METHODS[name](model, 1.0))(model, 1.0, params="net.2.*")  # noqa: E731
    model = network()
    regularizer = make(model)
    learn(model, sgd(model), regularizer, task())
    assert set(regularizer.anchor) == {"net.2.weight", "net.2.bias"}
    move(model)
    model.zero_grad()
    regularizer.add_gradient_()
    assert all(p.grad is None for p in model.net[0].parameters())


@each
@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_a_strength_that_is_negative_or_not_finite_is_refused(name, strength):
    with pytest.raises(ValueError, match="strength must be non-negative and finite"):
        METHODS[name](network(), strength)


@each_function
def test_the_default_strength_is_the_number_of_earlier_tasks(name):
    model, regularizer = after_one_task(name)
    learn(model, sgd(model), regularizer, task(1))
    move(model)
    noted(regularizer)
    regularizer.strength = 1.0
    one = regularizer.penalty().item()
    regularizer.strength = None
    assert regularizer.penalty().item() == pytest.approx(2 * one, rel=1e-12)


@each_function
def test_a_penalty_without_a_step_says_what_to_call(name):
    _, regularizer = after_one_task(name)
    with pytest.raises(ValueError, match="before_step"):
        regularizer.penalty()


@each_function
def test_only_parameters_get_a_gradient_not_the_inputs(name):
    model, regularizer = after_one_task(name)
    move(model)
    x = task(4)[0].requires_grad_()
    regularizer.before_step(x)
    regularizer.add_gradient_()
    assert x.grad is None


@each_function
def test_a_parameter_without_influence_on_the_outputs_is_no_obstacle(name):
    model, regularizer = after_one_task(name)
    model.net.unused = nn.Identity()
    model.net.unused.weight = nn.Parameter(torch.zeros(2))
    model.net.__dict__["forward"] = lambda x: model.net[2](model.net[1](model.net[0](x)))
    move(model)
    noted(regularizer).add_gradient_()
    assert model.net.unused.weight.grad is None
    assert model.net[0].weight.grad is not None


@pytest.mark.parametrize("name", [n for n in QUADRATIC if n != "Kronecker Laplace"])
def test_the_operations_of_a_step_are_constant_whatever_the_number_of_parameters(name):
    def count(layers):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        method, optimizer, found = QUADRATIC[name](model, 3.0), sgd(model), []
        x, y = task(dtype=torch.float32)

        def before():
            method.before_step(x)
            method.add_gradient_()

        def after():
            method.proximal_step_(optimizer)
            method.after_step()

        for _ in range(2):
            method.before_task()
            for _ in range(8):  # among them all of an interval of RWalk
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                found.append(operations(before))
                optimizer.step()
                found.append(operations(after))
            method.consolidate((x, y))
        return found

    assert count(2) == count(9)
    assert max(count(2)) <= 20
