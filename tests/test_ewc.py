"""Elastic weight consolidation: the penalty, many tasks in one, and its state."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors.torch import load, save
from torch import nn

from ewc_lib import EWC, Gaussian, fisher_information
from ewc_lib.data import digits
from ewc_lib.fisher import Diagonal
from ewc_lib.score.gradcheck import GradientCheck
from tests.budgets import set_budget
from tests.scenarios import PROPERTY, same, trace_of

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
STRUCTURES = ["diagonal", "dense", "block", "module", "lowrank"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def network(dtype=DOUBLE, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def task(seed=0, n=12, dtype=DOUBLE, blank=None, scale=1.0):
    """Inputs and labels; a ``blank`` input is always zero, so its weights have Fisher zero."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, 3, generator=generator, dtype=DOUBLE)
    if blank is not None:
        x[:, blank] = 0
    return x.to(dtype), torch.randint(3, (n,), generator=generator)


def move(model, seed, size=0.5):
    """Change the parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += (size * torch.randn(p.shape, generator=generator, dtype=DOUBLE)).to(p.dtype)


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def flat(values):
    return torch.cat([value.reshape(-1) for value in values.values()])


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.reshape(-1) for g in found])


def explicit(model, strength, remembered):
    """The sum of one penalty for each task, from all matrices and anchors."""
    theta = flat(dict(model.named_parameters()))
    total = 0
    for weight, matrix, anchor in remembered:
        d = theta - anchor
        total = total + weight * (d @ (matrix @ d))
    return strength / 2 * total


def consolidated(n_tasks=1, structure="diagonal", strength=3.0, **options):
    """A model after some tasks, its EWC, and what each task would have to be remembered by."""
    model = network()
    ewc = EWC(model, strength, structure=structure, **options)
    remembered = []
    for t in range(n_tasks):
        anchor = flat(copies(model))
        fisher = ewc.consolidate(task(t, blank=t % 3))
        remembered.append((1.0, fisher.to_dense(), anchor))
        move(model, t)
    return model, ewc, remembered


# The penalty


@pytest.mark.claim("def-ewc", "eq-ewc-loss")
def test_the_penalty_is_half_the_strength_times_the_weighted_squared_distance():
    model = nn.Linear(2, 1, bias=False).double()
    ewc = EWC(model, strength=4.0, likelihood=Gaussian(sigma=0.5))
    anchor = copies(model)["weight"]
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]], dtype=DOUBLE)
    ewc.consolidate((x, torch.zeros(2, 1, dtype=DOUBLE)))
    with torch.no_grad():
        model.weight.copy_(anchor + torch.tensor([[0.5, -1.0]]))
    first, second = (1 + 9) / 2 / 0.25, (0 + 4) / 2 / 0.25
    by_hand = 4 / 2 * (first * 0.5**2 + second * 1.0**2)
    assert ewc.penalty().item() == pytest.approx(by_hand, rel=1e-12)
    ewc.penalty().backward()
    expected = torch.tensor([[4 * first * 0.5, -4 * second * 1.0]], dtype=DOUBLE)
    torch.testing.assert_close(model.weight.grad, expected, **TIGHT)


@each_structure
def test_the_penalty_is_zero_with_zero_gradient_at_the_anchor(structure):
    model = network()
    ewc = EWC(model, strength=10.0, structure=structure)
    ewc.consolidate(task())
    assert ewc.penalty().item() == 0
    assert not gradients(model, ewc.penalty()).any()
    assert same(ewc.anchor, copies(model))


def test_the_fisher_of_a_task_is_that_of_fisher_information():
    model = network()
    fisher = EWC(model, 1.0).consolidate(task())
    assert same(fisher.diagonal(), fisher_information(model, task()).diagonal())


def test_before_the_first_task_the_penalty_is_zero_and_adds_no_gradient():
    model = network()
    ewc = EWC(model, strength=10.0)
    x, y = task()
    assert ewc.penalty().shape == ()
    assert ewc.penalty().item() == 0
    assert (ewc.precision, ewc.anchor, ewc.n_tasks) == (None, {}, 0)
    (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    ewc.add_gradient_()
    assert same({name: p.grad for name, p in model.named_parameters()}, before)


def test_the_strength_may_be_changed_at_any_time():
    _, ewc, _ = consolidated(strength=2.0)
    at_two = ewc.penalty().item()
    ewc.strength = 6
    assert ewc.strength == 6.0
    assert ewc.penalty().item() == pytest.approx(3 * at_two, rel=1e-12)
    ewc.strength = 0
    assert ewc.penalty().item() == 0


# Several tasks in one quadratic


@each_structure
def test_separate_penalties_merge_into_one_exactly(structure):
    model, ewc, remembered = consolidated(5, structure)
    diagonals = torch.stack([matrix.diagonal() for _, matrix, _ in remembered])
    assert (diagonals == 0).any()
    assert ewc.n_tasks == 5
    for seed in range(3):
        found, expected = ewc.penalty(), explicit(model, 3.0, remembered)
        assert found.item() > 0.01
        torch.testing.assert_close(found, expected, **TIGHT)
        torch.testing.assert_close(gradients(model, found), gradients(model, expected), **TIGHT)
        move(model, 100 + seed)
    total = sum(matrix for _, matrix, _ in remembered)
    torch.testing.assert_close(ewc.precision.to_dense(), total, **TIGHT)


@given(
    structure=st.sampled_from(STRUCTURES),
    tasks=st.lists(
        st.tuples(
            st.integers(0, 999),
            st.sampled_from([None, 0, 1, 2]),
            st.sampled_from([1e-2, 1.0, 1e2]),
            st.integers(1, 4),
        ),
        min_size=2,
        max_size=6,
    ),
    strength=st.floats(0.1, 1e3),
)
@PROPERTY
@pytest.mark.claim("thm-merge", "eq-ewc-merge")
@pytest.mark.filterwarnings("ignore:the Fisher information of this task is zero")
def test_merging_is_exact_for_any_tasks(structure, tasks, strength):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 3).double()
    ewc = EWC(model, strength, structure=structure)
    remembered = []
    for seed, blank, scale, n in tasks:
        move(model, seed)
        fisher = ewc.consolidate(task(seed, n, blank=blank, scale=scale))
        remembered.append((1.0, fisher.to_dense(), flat(copies(model))))
    move(model, 1000)
    found, expected = ewc.penalty(), explicit(model, strength, remembered)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    a, b = gradients(model, found), gradients(model, expected)
    assert (a - b).norm() <= 1e-10 * b.norm()


def test_a_direction_that_no_task_cares_about_stays_free():
    model, x = network(), task(blank=0)
    ewc = EWC(model, 1.0)
    for _ in range(3):
        ewc.consolidate(x)
        move(model, 1)
    ewc.penalty().backward()
    assert not model[0].weight.grad[:, 0].any()
    assert model[0].weight.grad[:, 1:].all()


@pytest.mark.parametrize("structure", ["diagonal", "dense", "block", "module"])
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_memory_does_not_grow_with_the_number_of_tasks(structure, mode):
    def sizes(ewc):
        return {key: (t.shape, t.dtype) for key, t in ewc.state_dict().items()}

    _, one, _ = consolidated(1, structure, mode=mode)
    _, five, _ = consolidated(5, structure, mode=mode)
    assert sizes(one) == sizes(five)
    assert vars(one).keys() == vars(five).keys()


@each_structure
@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
def test_the_online_penalty_decays_and_is_anchored_at_the_latest_optimum(structure, decay):
    model, ewc, remembered = consolidated(3, structure, mode="online", decay=decay)
    latest = remembered[-1][2]
    expected = explicit(
        model,
        3.0,
        [(decay ** (2 - t), matrix, latest) for t, (_, matrix, _) in enumerate(remembered)],
    )
    torch.testing.assert_close(ewc.penalty(), expected, **TIGHT)
    torch.testing.assert_close(flat(ewc.anchor), latest, **TIGHT)


def test_online_without_decay_is_not_the_same_as_separate():
    _, separate, _ = consolidated(3)
    _, online, _ = consolidated(3, mode="online")
    assert same(separate.precision.diagonal(), online.precision.diagonal())
    assert abs(separate.penalty() - online.penalty()).item() > 1e-3


@each_structure
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_tasks_are_merged_as_exactly_in_a_region_of_autocast(structure, mode):
    def merged(enabled):
        model = network(torch.float32)
        ewc = EWC(model, 3.0, structure=structure, mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for t in range(2):
                x, y = task(t)
                ewc.consolidate((x.float(), y))
                move(model, t)
        return ewc.state_dict()

    assert same(merged(enabled=True), merged(enabled=False))


# The gradient without a graph


@each_structure
@pytest.mark.parametrize("existing", [True, False])
def test_adding_the_gradient_equals_the_penalty_in_the_loss(structure, existing):
    model, ewc, _ = consolidated(2, structure)
    twin = copy.deepcopy(model)
    x, y = task(7)
    if existing:
        for m in (model, twin):
            F.cross_entropy(m(x), y).backward()
    objects = [p.grad for p in model.parameters()]
    ewc.add_gradient_()
    ewc.model = twin
    ewc.penalty().backward()
    for p, q, before in zip(model.parameters(), twin.parameters(), objects, strict=True):
        torch.testing.assert_close(p.grad, q.grad, **TIGHT)
        assert not p.grad.requires_grad
        assert p.grad is before or before is None


@pytest.mark.claim("eq-gradient-step")
@each_structure
def test_a_step_on_the_penalty_alone_is_linear_in_the_distance_from_the_anchor(structure):
    model, ewc, _ = consolidated(1, structure)
    anchor, A = flat(ewc.anchor), ewc.precision.to_dense()
    distance = flat(copies(model)) - anchor
    ewc.add_gradient_()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = distance - 0.1 * 3.0 * A @ distance
    torch.testing.assert_close(flat(copies(model)) - anchor, expected, **TIGHT)


def test_adding_the_gradient_leaves_other_parameters_alone():
    model = network()
    ewc = EWC(model, 1.0, params="2.*")
    ewc.consolidate(task())
    move(model, 1)
    ewc.add_gradient_()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_remembered_in_single_precision(dtype):
    model = network(dtype)
    ewc = EWC(model, strength=100.0)
    for seed in range(3):
        ewc.consolidate(task(seed, dtype=dtype))
        move(model, seed)
    assert {t.dtype for t in ewc.anchor.values()} == {torch.float32}
    assert {t.dtype for t in ewc.precision.diagonal().values()} == {torch.float32}
    penalty = ewc.penalty()
    assert penalty.dtype == torch.float32
    assert penalty.item() > 0
    penalty.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ewc.add_gradient_()
    assert {g.dtype for g in found} == {dtype}
    assert same(found, [p.grad for p in model.parameters()])


def test_a_half_precision_penalty_is_close_to_the_double_one():
    half, double = network(torch.bfloat16), network()
    double.load_state_dict(half.state_dict())
    penalties = []
    for model in (half, double):
        dtype = next(model.parameters()).dtype
        x, y = task(dtype=torch.bfloat16)
        ewc = EWC(model, 1.0)
        ewc.consolidate((x.to(dtype), y))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.5
        penalties.append(ewc.penalty().item())
    assert penalties[0] == pytest.approx(penalties[1], rel=0.03)


# Structures without a sum

without_sum = pytest.mark.parametrize(
    "structure", ["kronecker", "kronecker-reduce", "eigenkronecker"]
)


@without_sum
def test_a_kronecker_structure_remembers_one_task(structure):
    model, ewc, remembered = consolidated(1, structure)
    torch.testing.assert_close(ewc.penalty(), explicit(model, 3.0, remembered), **TIGHT)
    assert ewc.penalty() > 0
    ewc.add_gradient_()
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, gradients(model, ewc.penalty()), **TIGHT)
    restored = EWC(model, 3.0, structure=structure)
    restored.load_state_dict(load(save(ewc.state_dict())))
    assert same(restored.penalty(), ewc.penalty())


@without_sum
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_second_task_in_a_structure_without_a_sum_is_refused_before_it_costs(structure, mode):
    _, ewc, _ = consolidated(1, structure, mode=mode)
    state = ewc.state_dict()
    with pytest.raises(
        ValueError, match=f"structure='{structure}' holds one task: .*KroneckerLaplace"
    ):
        ewc.consolidate(())  # empty data, at which nobody looks
    assert same(ewc.state_dict(), state)


# A Fisher information that was computed elsewhere


@pytest.mark.parametrize("mode", ["separate", "online"])
@each_structure
def test_what_was_computed_elsewhere_is_remembered_as_if_it_were_computed_here(structure, mode):
    model = network()
    one, other = (EWC(model, 3.0, mode, structure=structure) for _ in range(2))
    for t in range(2):
        one.consolidate(task(seed=t))
        other.remember(fisher_information(model, task(seed=t), structure=structure))
        move(model, seed=t)
    assert one.penalty() > 0
    assert same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "dense"}, "has structure='diagonal', got .* a Dense"),
        ({"kind": "empirical"}, "this EWC is of kind 'exact', got a Fisher of 'empirical'"),
        ({"params": "*.bias"}, "'0.weight' is missing"),
    ],
)
@pytest.mark.parametrize("n_tasks", [0, 1])
def test_what_this_ewc_could_not_compute_is_refused_and_nothing_changes(n_tasks, options, message):
    model, ewc, _ = consolidated(n_tasks)
    state = ewc.state_dict()
    with pytest.raises(ValueError, match=message):
        ewc.remember(fisher_information(model, task(), **options))
    assert same(ewc.state_dict(), state)


@without_sum
def test_a_second_task_from_elsewhere_is_refused_in_a_structure_without_a_sum(structure):
    model, ewc, _ = consolidated(1, structure)
    state = ewc.state_dict()
    with pytest.raises(ValueError, match="holds one task"):
        ewc.remember(fisher_information(model, task(), structure=structure))
    assert same(ewc.state_dict(), state)


# Which parameters


def test_only_the_chosen_parameters_are_held():
    model = network()
    ewc = EWC(model, 1.0, params=["0.weight", "*.bias"])
    ewc.consolidate(task())
    chosen = ["0.weight", "0.bias", "2.bias"]
    assert list(ewc.anchor) == list(ewc.precision.diagonal()) == chosen
    with torch.no_grad():
        model[2].weight += 1
    assert ewc.penalty().item() == 0
    with torch.no_grad():
        model[2].bias += 1
    assert ewc.penalty().item() > 0


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    ewc = EWC(model, 1.0)
    ewc.consolidate(task())
    assert list(ewc.anchor) == ["2.weight", "2.bias"]
    ewc.add_gradient_()
    assert model[0].weight.grad is None


def test_a_model_that_is_smaller_is_refused_by_name_and_told_the_way_out():
    model, ewc, _ = consolidated()
    model[2] = nn.Linear(4, 2).double()
    for use in (ewc.penalty, ewc.add_gradient_, lambda: ewc.consolidate(task())):
        with pytest.raises(
            ValueError, match=r"'2.weight' has shape \(2, 4\).*holds \(3, 4\)"
        ) as why:
            use()
        assert 'ewc.forget("2.weight")' in str(why.value)
    ewc.forget("2.*")
    assert list(ewc.anchor) == ["0.weight", "0.bias"]
    ewc.penalty().backward()


def test_a_model_without_values_is_refused_and_nothing_is_lost():
    model, ewc, _ = consolidated(2)
    before, penalty = ewc.state_dict(), ewc.penalty()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    for use in (
        ewc.penalty,
        ewc.add_gradient_,
        lambda: ewc.proximal_step_(torch.optim.SGD(model.parameters())),
    ):
        with pytest.raises(ValueError, match=r"parameter '0\.weight' is on the meta device"):
            use()
    model.to_empty(device="cpu").load_state_dict(values)
    assert same(ewc.state_dict(), before)
    assert same(ewc.penalty(), penalty)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "module", "kronecker"])
def test_a_parameter_that_was_frozen_since_is_a_constant(structure):
    model, ewc, _ = consolidated(structure=structure)
    for p in model.parameters():
        p.data += 0.1
    before = ewc.penalty().item()
    everywhere = torch.autograd.grad(ewc.penalty(), list(model.parameters()))
    model[0].requires_grad_(False)
    assert ewc.penalty().item() == before
    ewc.penalty().backward()
    first = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    ewc.add_gradient_()
    assert first[:2] == [None, None] == [p.grad for p in model[0].parameters()]
    for p, g, whole in zip(model[2].parameters(), first[2:], everywhere[2:], strict=True):
        torch.testing.assert_close(g, whole)
        torch.testing.assert_close(p.grad, 2 * whole)


def test_everything_moves_to_another_device():
    _, ewc, _ = consolidated(2)
    ewc._follow(torch.device("meta"))
    assert ewc._offset.device.type == "meta"
    assert {t.device.type for t in ewc.anchor.values()} == {"meta"}
    assert {t.device.type for t in ewc.precision.diagonal().values()} == {"meta"}


# State


@each_structure
@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("n_tasks", [0, 1, 3])
def test_the_state_survives_safetensors_bit_by_bit(structure, mode, n_tasks):
    model, ewc, _ = consolidated(n_tasks, structure, mode=mode)
    restored = EWC(model, 3.0, mode, structure=structure)
    restored.load_state_dict(load(save(ewc.state_dict())))
    assert same(restored.state_dict(), ewc.state_dict())
    assert same(restored.penalty(), ewc.penalty())
    assert restored.n_tasks == n_tasks
    for either in (ewc, restored):
        either.consolidate(task(9))
    move(model, 9)
    assert same(restored.penalty(), ewc.penalty())
    assert restored.bayesian_strength(4) == ewc.bayesian_strength(4)


def test_the_state_of_weights_in_another_memory_layout_can_be_saved():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    model = model.to(memory_format=torch.channels_last)
    ewc = EWC(model, 1.0)
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ewc.consolidate((x, torch.tensor([0, 1, 0, 1, 1, 0])))
    move(model, 1)
    restored = EWC(model, 1.0)
    restored.load_state_dict(load(save(ewc.state_dict())))
    torch.testing.assert_close(restored.penalty(), ewc.penalty())


@each_structure
def test_a_state_is_a_copy_on_the_way_out_and_in(structure):
    model, ewc, _ = consolidated(2, structure)
    expected = ewc.penalty().item()
    state = ewc.state_dict()
    restored = EWC(model, 3.0, structure=structure)
    restored.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert (ewc.penalty().item(), restored.penalty().item()) == (expected, expected)


def test_loading_a_state_before_the_first_task_forgets_everything():
    model, ewc, _ = consolidated(2)
    ewc.load_state_dict(EWC(model, 1.0).state_dict())
    assert ewc.penalty().item() == 0
    assert (ewc.n_tasks, ewc.anchor) == (0, {})


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("0", nn.Linear(3, 7))
        self.add_module("2", nn.Linear(7, 3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(getattr(self, "2")(getattr(self, "0")(x)))


def test_the_state_of_another_model_is_refused_with_a_short_list_and_nothing_changes():
    _, ewc, _ = consolidated(2)
    other = EWC(Other().double(), 1.0)
    other.consolidate(task())
    before, penalty = ewc.state_dict(), ewc.penalty()
    with pytest.raises(ValueError, match="parameters do not match") as error:
        ewc.load_state_dict(other.state_dict())
    for problem in (
        "'head.weight' is not expected",
        "'head.bias' is not expected",
        "'0.weight' is given in shape (7, 3) instead of (4, 3)",
        "and 2 more",
    ):
        assert problem in str(error.value)
    assert same(ewc.state_dict(), before)
    assert same(ewc.penalty(), penalty)


def test_a_model_that_has_more_than_a_state_loads_it_and_the_rest_is_free():
    _, ewc, _ = consolidated(2)
    larger = EWC(Other().double(), 1.0)
    larger.load_state_dict(ewc.state_dict())
    assert "head.weight" not in larger.anchor
    assert larger.penalty() > 0


def test_a_state_without_the_name_of_its_structure_still_loads():
    model, ewc, _ = consolidated(2, "dense")
    state = ewc.state_dict()
    del state["structure"]
    restored = EWC(model, 3.0, structure="dense")
    restored.load_state_dict(state)
    assert same(restored.penalty(), ewc.penalty())
    with pytest.raises(ValueError, match="the state is dense, but this EWC is diagonal"):
        EWC(model, 3.0).load_state_dict(state)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("offset", r"not the state of EWC: it has no \['offset'\]"),
        ("n_tasks", r"\['n_tasks'\]"),
        ("anchor.0.weight", "'0.weight' is missing"),
        ("precision.kind", "not the state of a Fisher"),
        ("precision.diagonal.2.bias", "2.bias"),
    ],
)
def test_an_incomplete_state_is_refused_and_nothing_changes(dropped, message):
    _, ewc, _ = consolidated(2)
    before = ewc.state_dict()
    state = {key: value for key, value in before.items() if key != dropped}
    assert len(state) == len(before) - 1
    with pytest.raises(ValueError, match=message):
        ewc.load_state_dict(state)
    assert same(ewc.state_dict(), before)


def test_an_online_penalty_is_zero_at_its_anchor_also_after_an_old_state_of_separate_tasks():
    model, separate, _ = consolidated(2)
    online = EWC(model, strength=3.0, mode="online")
    state = separate.state_dict()
    del state["mode"]  # as states were that did not say it
    online.load_state_dict(state)
    assert online.penalty() > 0
    online.consolidate(task())
    assert online.penalty() == 0


def test_the_state_of_another_structure_is_refused_and_nothing_changes():
    _, diagonal, _ = consolidated(structure="diagonal")
    _, dense, _ = consolidated(structure="dense")
    before = diagonal.state_dict()
    with pytest.raises(ValueError, match="the state is dense, but this EWC is diagonal"):
        diagonal.load_state_dict(dense.state_dict())
    assert same(diagonal.state_dict(), before)


def test_the_state_of_the_model_itself_is_refused():
    model, ewc, _ = consolidated()
    with pytest.raises(ValueError, match="not the state of EWC"):
        ewc.load_state_dict(model.state_dict())


# Consolidation


def bad_data():
    x, y = task()
    nan, label = x.clone(), y.clone()
    nan[5] = math.nan
    label[5] = 3
    return {
        "NaN": ((nan, y), "observation 5 holds NaN"),
        "label": ([(x[:4], y[:4]), (x[4:], label[4:])], "label 3 of observation 5"),
        "empty": ([], "data is empty"),
        "lengths": ((x, y[:3]), "different lengths"),
    }


@pytest.mark.parametrize("n_tasks", [0, 2])
@pytest.mark.parametrize("name", bad_data())
def test_a_consolidation_that_fails_changes_nothing(name, n_tasks):
    data, message = bad_data()[name]
    model, ewc, _ = consolidated(n_tasks)
    state, trace = ewc.state_dict(), trace_of(model)
    with pytest.raises(ValueError, match=message):
        ewc.consolidate(data)
    assert same(ewc.state_dict(), state)
    assert same(trace_of(model), trace)


def test_a_task_of_another_kind_is_refused_and_changes_nothing():
    _, ewc, _ = consolidated(2)
    state = ewc.state_dict()
    ewc.kind = "empirical"
    with pytest.raises(ValueError, match="kind 'empirical'"):
        ewc.consolidate(task())
    assert same(ewc.state_dict(), state)


def test_a_consolidation_leaves_no_trace_in_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model.double()[1].eval()
    before = trace_of(model)
    EWC(model, 1.0).consolidate(task())
    assert same(trace_of(model), before)


def test_a_fisher_of_zero_everywhere_warns():
    model = nn.Linear(3, 3).double()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2000.0, 0.0, 0.0]))
    ewc = EWC(model, 1.0)
    with pytest.warns(RuntimeWarning, match="zero everywhere: the penalty protects nothing") as w:
        ewc.consolidate(task())
    assert w[0].filename == __file__
    assert ewc.n_tasks == 1
    move(model, 1)
    assert ewc.penalty().item() == 0


def test_options_reach_the_fisher_information():
    model = network()
    ewc = EWC(model, 1.0, kind="sampled", structure="dense")
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, again, other = (ewc.consolidate(task(), n_samples=5, generator=g) for g in seeds)
    assert (one.kind, one.n_samples) == ("sampled", 5)
    assert torch.equal(one.to_dense(), again.to_dense())
    assert not torch.equal(one.to_dense(), other.to_dense())


def test_no_two_tasks_have_the_same_random_numbers_unless_their_generators_say_so():
    ewc = EWC(network(), 1.0, kind="sampled", mode="online")
    assert not torch.equal(*(ewc.consolidate(task()).to_dense() for _ in range(2)))


def test_the_settings_of_the_fisher_information_are_those_of_every_task():
    model = network()
    options = {"kind": "sampled", "structure": "lowrank", "n_samples": 5, "draws": 3, "rank": 2}
    ewc = EWC(model, 1.0, dtype=torch.float32, device="cpu", **options)
    for t in range(2):
        found = ewc.consolidate(task(t))
        generator = torch.Generator().manual_seed(t)
        expected = fisher_information(
            model, task(t), dtype=torch.float32, generator=generator, **options
        )
        assert same(found.state_dict(), expected.state_dict())
        assert (found.n_samples, len(found.eigenvalues)) == (5, 2)
    assert {value.dtype for value in ewc.anchor.values()} == {torch.float32}
    assert ewc.consolidate(task(2), n_samples=6).n_samples == 6


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_state_says_nothing_of_the_settings(mode):
    """Those of earlier versions load, and so does one that was summed in another precision."""
    model, plain, _ = consolidated(mode=mode)
    fine = EWC(model, 1.0, mode, dtype=torch.float64, n_samples=4, draws=2, rank=3, device="cpu")
    state = plain.state_dict()
    assert not {"n_samples", "draws", "rank", "dtype", "device"} & state.keys()
    fine.load_state_dict(state)
    assert same(fine.state_dict(), state)
    assert fine.consolidate(task()).n_samples == 4


def test_it_is_shown_in_one_line():
    ewc = EWC(network(), 100, mode="online", structure="block", kind="sketch")
    shown = "EWC(strength=100.0, n_tasks={}, structure='block', mode='online', kind='sketch')"
    assert repr(ewc) == shown.format(0)
    ewc.consolidate(task())
    assert repr(ewc) == shown.format(1)


# Settings


@pytest.mark.parametrize("strength", [-1.0, math.inf, math.nan, -math.inf])
def test_a_strength_that_is_negative_or_not_finite_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be non-negative and finite"):
        EWC(network(), strength)
    ewc = EWC(network(), 1.0)
    with pytest.raises(ValueError, match="strength must be"):
        ewc.strength = strength
    assert ewc.strength == 1.0


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_a_decay_outside_zero_and_one_is_refused(mode, decay):
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        EWC(network(), 1.0, mode, decay=decay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.5}, "decay belongs to mode='online'"),
        (
            {"mode": "offline"},
            "mode must be one of 'separate', 'online', got 'offline'; did you mean 'online'",
        ),
        ({"params": "3.weight"}, "no trainable parameter is named '3.weight'"),
        ({"likelihood": "softmax"}, "likelihood must be one of .* did you mean 'categorical'"),
        ({"kind": "guess"}, "kind must be one of"),
        ({"structure": "full"}, "structure must be one of .* did you mean 'dense'"),
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"rank": 1.5}, "rank must be a whole number, got 1.5"),
        ({"certify": "never"}, "certify must be one of 'auto', 'always', got 'never'"),
        ({"dtype": torch.int64}, "dtype must be a real"),
        ({"device": "gpu"}, "device must be one of PyTorch, got 'gpu'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EWC(network(), 1.0, **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        EWC(network().requires_grad_(False), 1.0)


def test_the_bayesian_strength_is_the_ratio_of_the_sizes():
    model = network()
    ewc = EWC(model, 1.0)
    assert ewc.bayesian_strength(50, n_a=200) == 4.0
    ewc.consolidate(task(n=12))
    assert ewc.bayesian_strength(6) == 2.0
    ewc.consolidate(task(n=24))
    assert ewc.bayesian_strength(6) == 3.0
    assert ewc.bayesian_strength(6, n_a=60) == 10.0


@pytest.mark.claim("thm-ewc-bayes", "eq-bayesian-strength")
def test_the_bayesian_penalty_is_the_prior_in_the_mean_loss():
    n_a, n_b = 12, 30
    model = network()
    ewc = EWC(model, 0.0)
    fisher = ewc.consolidate(task(n=n_a))
    anchor = flat(copies(model))
    move(model, 3)
    ewc.strength = ewc.bayesian_strength(n_b)
    d = flat(dict(model.named_parameters())) - anchor
    log_prior = -0.5 * (n_a * flat(fisher.diagonal()) * d.square()).sum()
    torch.testing.assert_close(n_b * ewc.penalty(), -log_prior, **TIGHT)


@pytest.mark.parametrize(
    ("n_b", "n_a", "message"),
    [
        (5, None, "no task is consolidated yet, so give n_a"),
        (0, 5, "must be positive and finite, got 5 and 0"),
        (-1, 5, "must be positive"),
        (5, 0, "must be positive and finite, got 0 and 5"),
        (5, -2, "must be positive"),
        (math.nan, 5, "got 5 and nan"),
        (5, math.nan, "got nan and 5"),
        (5, math.inf, "got inf and 5"),
    ],
)
def test_numbers_of_observations_that_are_not_positive_and_finite_are_refused(n_b, n_a, message):
    with pytest.raises(ValueError, match=message):
        EWC(network(), 1.0).bayesian_strength(n_b, n_a)


# The second moments of an optimizer


def with_moments():
    """A model, a penalty for the second moments of its optimizer, and these."""
    model, (x, y) = network(), task()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    moments = Diagonal.from_optimizer(optimizer, model, batch_size=len(x))
    return model, EWC(model, strength=2.0, kind="second moments"), moments


def test_second_moments_are_remembered_and_not_computed():
    model, ewc, moments = with_moments()
    with pytest.raises(ValueError, match="those of an optimizer, not of data"):
        ewc.consolidate(task())
    ewc.remember(moments)
    with torch.no_grad():
        model[2].bias += 0.5
    torch.testing.assert_close(ewc.penalty(), 0.25 * moments.values["2.bias"].sum())
    with pytest.raises(ValueError, match="is of kind 'second moments', got a Fisher of 'exact'"):
        ewc.remember(fisher_information(model, task()))


def test_second_moments_are_stored_and_pooled_as_any_other_diagonal():
    model, ewc, moments = with_moments()
    other = EWC(model, strength=2.0, kind="second moments")
    ewc.remember(moments.pool(moments))
    other.load_state_dict(ewc.state_dict())
    torch.testing.assert_close(other.precision.values, moments.values)


# What it is for


def train(model, x, y, ewc=None, steps=150, by_gradient=False):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        if ewc is not None and not by_gradient:
            loss = loss + ewc.penalty()
        loss.backward()
        if ewc is not None and by_gradient:
            ewc.add_gradient_()
        optimizer.step()


@pytest.fixture(scope="module")
def one_thread():
    """Train tiny networks on one thread: several would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_tasks(one_thread):
    """Real digits, the same with permuted pixels, and a network that has learned the first."""
    data = digits()
    permutation = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    train(model, *data.train)
    return data, permutation, model


def after_the_second_task(two_tasks, strength, by_gradient=False):
    data, permutation, first = two_tasks
    model = copy.deepcopy(first)
    ewc = None
    if strength is not None:
        ewc = EWC(model, strength)
        ewc.consolidate(data.train)
    train(model, data.x_train[:, permutation], data.y_train, ewc, by_gradient=by_gradient)
    return model


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def test_it_protects_the_first_task_while_the_second_is_learned(two_tasks):
    data, permutation, first = two_tasks
    x, y = data.test
    plain, held = (after_the_second_task(two_tasks, s) for s in (None, 30.0))
    assert accuracy(first, x, y) > 0.9
    assert accuracy(plain, x, y) < 0.75
    assert accuracy(held, x, y) > accuracy(plain, x, y) + 0.15
    assert accuracy(held, x[:, permutation], y) > 0.7
    assert accuracy(first, x[:, permutation], y) < 0.3


def test_a_strength_of_zero_is_plain_training_and_others_are_not(two_tasks):
    plain, zero, held = (
        after_the_second_task(two_tasks, strength) for strength in (None, 0.0, 1.0)
    )
    assert same(copies(zero), copies(plain))
    assert not same(copies(held), copies(plain))


def test_training_by_gradient_is_training_by_loss(two_tasks):
    by_loss, by_gradient = (after_the_second_task(two_tasks, 100.0, b) for b in (False, True))
    distance = (flat(copies(by_loss)) - flat(copies(by_gradient))).norm()
    moved = (flat(copies(by_loss)) - flat(copies(two_tasks[2]))).norm()
    assert distance < 0.01 * moved


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_a_task_that_is_consolidated_twice_counts_twice(mode):
    model = network()
    once, twice = EWC(model, 3.0, mode), EWC(model, 3.0, mode)
    once.consolidate(task())
    for _ in range(2):
        twice.consolidate(task())
    move(model, seed=1)
    torch.testing.assert_close(twice.penalty(), 2 * once.penalty(), **TIGHT)


def test_every_batch_of_a_task_is_compared_if_asked_for(monkeypatch):
    posed, pose = [], GradientCheck.pose

    def counted(output, *rest):
        posed.append(len(output))
        return pose(output, *rest)

    monkeypatch.setattr(GradientCheck, "pose", counted)
    set_budget(monkeypatch, batch=0)
    x, y = task()
    data = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 6, 2)]
    EWC(network(), 1.0).consolidate(data)
    assert posed == [2, 2]  # the first and the last
    posed.clear()
    EWC(network(), 1.0, certify="always").consolidate(data)
    assert posed == [2, 2, 2]


class Filter(nn.Module):
    """A filter of frequencies with complex weights, and a real layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))


def test_complex_parameters_are_held_by_their_squared_distance():
    model, data = Filter(), (torch.randn(20, 4).double(), torch.arange(20) % 3)
    ewc, parts, expected = EWC(model, 2.0), [], 0.0
    for _ in range(2):
        F = ewc.consolidate(data).diagonal()
        parts.append((F, {n: p.detach().clone() for n, p in model.named_parameters()}))
        with torch.no_grad():
            model.filter += 0.5 - 0.3j
            model.head.weight += 0.1
    for F, old in parts:
        for name, p in model.named_parameters():
            expected += float((F[name] * (p.detach() - old[name]).abs().square()).sum())
    assert ewc.penalty().item() == pytest.approx(expected)
    ewc.penalty().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ewc.add_gradient_()
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)
    again = EWC(model, 2.0)
    again.load_state_dict(ewc.state_dict())
    assert torch.equal(again.penalty(), ewc.penalty())
    theta, step = model.filter.detach().clone(), 0.1 * 2.0 * ewc.precision.diagonal()["filter"]
    ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = (theta + step * ewc.anchor["filter"]) / (1 + step)
    torch.testing.assert_close(model.filter.detach(), expected)


def adapted(trained):
    """A network with adapters of peft, of which the second factors are zero at first."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    if trained:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    return model, (torch.randn(8, 3), torch.arange(8) % 2)


def test_factors_of_adapters_without_information_are_named_with_the_way_out():
    model, data = adapted(trained=False)
    with pytest.warns(RuntimeWarning, match="AdapterEWC") as caught:
        EWC(model, 1.0).consolidate(data)
    (message,) = [str(w.message) for w in caught]
    assert message.count("lora_A") == 2
    assert "lora_B" not in message
    assert [w.filename for w in caught] == [__file__]


def test_trained_adapters_and_units_that_are_never_active_need_no_warning():
    model, data = adapted(trained=True)
    EWC(model, 1.0).consolidate(data)  # warnings are errors
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(dead[0].bias, -1e3)
    EWC(dead, 1.0).consolidate(data)


def test_adapters_that_are_not_active_need_no_warning():
    peft = pytest.importorskip("peft")
    model, data = adapted(trained=True)
    model.add_adapter("other", peft.LoraConfig(r=1, target_modules=["0"]))
    EWC(model, 1.0).consolidate(data)


# A budget

ALL_STRUCTURES = [*STRUCTURES, "kronecker", "eigenkronecker"]


def rates(model, *own):
    """An optimizer with a rate for each layer."""
    groups = [{"params": model[2 * i].parameters(), "lr": rate} for i, rate in enumerate(own)]
    return torch.optim.SGD(groups)


@pytest.mark.claim("thm-budget")
@pytest.mark.parametrize("structure", ALL_STRUCTURES)
@pytest.mark.parametrize("own", [(0.5, 0.5), (0.05, 0.5), None], ids=["one", "two", "Adam"])
def test_a_budget_is_kept_after_every_step_and_used(structure, own):
    model = network(torch.float32)
    ewc = EWC(model, budget=0.02, structure=structure)
    x, y = task(0, dtype=torch.float32, n=40)
    ewc.consolidate((x, y))
    optimizer, spent = rates(model, *own) if own else torch.optim.Adam(model.parameters(), 0.05), []
    ewc.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), (y + 1) % 3).backward()
        optimizer.step()
        spent.append(ewc.nats().item())
    assert max(spent) <= 0.02
    assert spent[-1] > 0.99 * 0.02
    assert ewc.largest_strength >= ewc.strength > 0


@pytest.mark.claim("thm-budget")
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_the_step_of_a_budget_is_the_nearest_place_within_it(structure):
    """In the metric of the rates; no step along the border comes nearer."""
    model = network()
    ewc = EWC(model, budget=0.01, structure=structure)
    F_ = ewc.consolidate(task(n=40)).to_dense()
    m, optimizer = flat(copies(model)), rates(model, 0.1, 0.3)
    move(model, 1)
    z, eta = flat(copies(model)), torch.tensor([0.1] * 16 + [0.3] * 15, dtype=DOUBLE)
    ewc.proximal_step_(optimizer)
    x = flat(copies(model))
    assert ewc.nats().item() <= 0.01
    pull = F_ @ (x - m)
    torch.testing.assert_close((z - x) / eta, ewc.strength * pull, rtol=1e-6, atol=1e-9)


@pytest.mark.claim("thm-budget")
def test_the_step_of_a_budget_is_the_nearest_place_in_the_metric_of_adam():
    model = network()
    ewc = EWC(model, budget=1e-3)
    F_ = ewc.consolidate(task(n=40)).to_dense()
    m, optimizer = flat(copies(model)), torch.optim.Adam(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.linspace(0.1, 3, p.numel(), dtype=DOUBLE).reshape(p.shape)
    size = flat({n: p.grad.clone() for n, p in model.named_parameters()})
    optimizer.step()
    z = flat(copies(model))
    ewc.proximal_step_(optimizer)
    x = flat(copies(model))
    assert 0.99e-3 < ewc.nats().item() <= 1e-3
    pull = F_ @ (x - m)
    torch.testing.assert_close((z - x) * size / 0.1, ewc.strength * pull, rtol=1e-5, atol=1e-8)


def test_within_the_budget_nothing_is_held():
    model = network()
    ewc = EWC(model, budget=100.0)
    ewc.consolidate(task())
    move(model, 1, size=0.1)
    before = copies(model)
    ewc.proximal_step_(rates(model, 0.1, 0.1))
    assert same(copies(model), before)
    assert ewc.strength == 0


def test_a_budget_counts_all_tasks_and_can_always_be_kept():
    model = network(torch.float32)
    ewc = EWC(model, budget=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ewc.attach(optimizer)
    anchors = []
    for t in range(3):
        x, y = task(t, dtype=torch.float32, n=40)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            terms = [
                F_.quadratic({n: p - a[n] for n, p in copies(model).items()}) for F_, a in anchors
            ]
            assert sum(terms) / 2 <= 0.05 * 1.001
        anchors.append((ewc.consolidate((x, y)), copies(model)))


@pytest.mark.parametrize("frozen", ["0.weight", "2.bias"])
@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker"])
def test_what_does_not_move_is_part_of_what_a_budget_counts(structure, frozen):
    model = network()
    ewc = EWC(model, budget=0.05, structure=structure)
    ewc.consolidate(task(n=40))
    with torch.no_grad():
        model.get_parameter(frozen).add_(0.05)
    model.get_parameter(frozen).requires_grad_(False)
    fixed = ewc.nats().item()
    assert 0 < fixed < 0.05
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    ewc.proximal_step_(rates(model, 0.1, 0.1))
    assert 0.049 < ewc.nats().item() <= 0.05


def test_a_budget_has_no_penalty_and_no_gradient():
    model = network()
    ewc = EWC(model, budget=0.05)
    for forbidden in (
        ewc.penalty,
        ewc.add_gradient_,
        lambda: ewc.attach(rates(model, 0.1, 0.1), "gradient"),
    ):
        with pytest.raises(ValueError, match="kept by the proximal step"):
            forbidden()
    assert "budget=0.05" in repr(ewc)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_cannot_be_kept_is_refused(wrong):
    with pytest.raises(ValueError, match="budget"):
        EWC(network(), budget=wrong)


def test_either_a_strength_or_a_budget_is_given():
    for options in ({}, {"strength": 1.0, "budget": 1.0}):
        with pytest.raises(ValueError, match="either a strength or a budget"):
            EWC(network(), **options)


def test_a_resumed_budget_goes_on_with_the_same_bits():
    def run(stop):
        model, (x, y) = network(torch.float32), task(dtype=torch.float32, n=40)
        ewc = EWC(model, budget=0.01)
        ewc.consolidate((x, y))
        for step in range(10):
            if step == stop:
                state = load(save(ewc.state_dict()))
                ewc = EWC(model, budget=0.01)
                ewc.load_state_dict(state)
            model.zero_grad()
            F.cross_entropy(model(x), (y + 1) % 3).backward()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            optimizer.step()
            ewc.proximal_step_(optimizer)
        return copies(model)

    assert same(run(None), run(5))


# Half precision

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "dense"])
@pytest.mark.parametrize("strength", [1.0, 100.0, 1000.0])
def test_half_precision_moves_as_single_precision_does(dtype, structure, strength):
    def left(own):
        model = network(torch.float32)
        x, y = task(dtype=torch.float32, n=40)
        model.to(dtype).to(own)  # the same numbers
        ewc = EWC(model, strength, structure=structure)
        ewc.consolidate((x.to(dtype).to(own), y))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                step = (0.01 * p.float().abs() * torch.randn(p.shape, generator=generator)).to(
                    dtype
                )
                p.copy_((p.float() + step.float()).to(dtype))
        optimizer, before = torch.optim.SGD(model.parameters(), lr=1e-2), ewc.penalty().item()
        for _ in range(100):
            ewc.proximal_step_(optimizer)
        return ewc.penalty().item() / before

    assert left(dtype) == pytest.approx(left(torch.float32), rel=0.02)


@pytest.mark.parametrize("dtype", HALF)
def test_a_resumed_model_of_half_precision_goes_on_with_the_same_bits(dtype):
    def run(stop):
        model = network(dtype)
        ewc = EWC(model, 300.0)
        ewc.consolidate(task(dtype=dtype))
        move(model, 0, size=0.02)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(50):
            if step == stop:
                state = load(save(ewc.state_dict()))
                ewc = EWC(model, 300.0)
                ewc.load_state_dict(state)
            ewc.proximal_step_(optimizer)
        return copies(model)

    assert same(run(None), run(25))


def test_what_half_precision_has_lost_ends_with_the_task():
    model = network(torch.bfloat16)
    ewc = EWC(model, 300.0)
    ewc.consolidate(task(dtype=torch.bfloat16))
    move(model, 0, size=0.02)
    ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=1e-2))
    online = EWC(model, 300.0, "online")
    online.load_state_dict({k: v for k, v in ewc.state_dict().items() if k != "mode"})
    assert any(key.startswith("rest.") for key in online.state_dict())
    online.consolidate(task(1, dtype=torch.bfloat16))
    assert not any(key.startswith("rest.") for key in online.state_dict())
    assert online.penalty() == 0


@pytest.mark.parametrize("dtype", HALF)
def test_small_gradients_add_up_in_gradients_of_half_precision(dtype):
    model = network(dtype)
    ewc = EWC(model, 1.0)
    ewc.consolidate(task(dtype=dtype))
    move(model, 0, size=0.02)
    reference = copy.deepcopy(model).float()
    anchor, precision = ewc.anchor, ewc.precision.diagonal()
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for _ in range(200):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        ewc.add_gradient_()
        for name, p in model.named_parameters():
            total[name] += p.grad.float() - 1
    for name, p in reference.named_parameters():
        wanted = precision[name] * (p.detach() - anchor[name])
        torch.testing.assert_close(total[name] / 200, wanted, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_what_was_lost_in_half_precision_is_no_more_in_single_precision(structure):
    model = network(torch.bfloat16)
    ewc = EWC(model, 300.0, structure=structure)
    ewc.consolidate(task(dtype=torch.bfloat16))
    move(model, 0, size=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(5):
        ewc.proximal_step_(optimizer)
    model.float()
    ewc.strength, before = 1e-9, copies(model)
    for _ in range(100):
        ewc.proximal_step_(torch.optim.SGD(model.parameters(), lr=1e-2))
    for name, p in copies(model).items():
        torch.testing.assert_close(p, before[name], rtol=1e-5, atol=1e-6)
    moved = flat(copies(model)) - flat(ewc.anchor)
    wanted = 0.5 * 1e-9 * moved @ ewc.precision.to_dense() @ moved
    torch.testing.assert_close(ewc.penalty(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("structure", ALL_STRUCTURES)
def test_a_step_without_a_rate_keeps_no_budget_and_moves_nothing(structure):
    model = network()
    ewc = EWC(model, budget=1e-4, structure=structure)
    ewc.consolidate(task(n=40))
    move(model, 1)
    before = copies(model)
    ewc.proximal_step_(rates(model, 0.0, 0.0))
    assert same(copies(model), before)
    ewc.budget = 0.99 * ewc.nats().item()
    ewc.proximal_step_(rates(model, 0.1, 0.0))
    assert torch.equal(copies(model)["2.weight"], before["2.weight"])
    assert not torch.equal(copies(model)["0.weight"], before["0.weight"])


def test_a_budget_that_cannot_be_kept_is_said_once_and_all_that_moves_is_held():
    model = network()
    ewc = EWC(model, budget=1e-4)
    ewc.consolidate(task(n=40))
    move(model, 1)
    model[0].requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        ewc.proximal_step_(rates(model, 0.1, 0.1))
    move(model, 2)
    ewc.proximal_step_(rates(model, 0.1, 0.1))
    held = ewc.precision.diagonal()["2.bias"] > 0
    assert (model[2].bias.detach() - ewc.anchor["2.bias"])[held].abs().max() < 1e-6


def test_a_budget_that_is_set_later_stops_the_gradient_form():
    model = network()
    ewc = EWC(model, 1.0)
    ewc.consolidate(task())
    optimizer = rates(model, 0.1, 0.1)
    ewc.attach(optimizer, "gradient")
    ewc.budget = 0.1
    with pytest.raises(ValueError, match="kept by the proximal step"):
        optimizer.step()
    with pytest.raises(ValueError, match="decides the strength"):
        ewc.strength = 2.0


def test_the_largest_strength_of_a_budget_outlives_steps_that_need_none_until_the_task_ends():
    model = network()
    ewc = EWC(model, budget=1e-3)
    ewc.consolidate(task(n=40))
    move(model, 1)
    ewc.proximal_step_(rates(model, 0.1, 0.1))
    needed = ewc.strength
    ewc.proximal_step_(rates(model, 0.1, 0.1))
    assert ewc.strength == 0 < needed == ewc.largest_strength
    ewc.consolidate(task(n=40))
    assert ewc.largest_strength == 0


def test_what_params_does_not_choose_is_not_loaded_in_silence():
    model = network()
    all_of_it, part = EWC(model, 1.0), EWC(model, 1.0, params="0.*")
    all_of_it.consolidate(task())
    with pytest.raises(ValueError, match=r"'2\.weight', '2\.bias', which params does not choose"):
        part.load_state_dict(all_of_it.state_dict())
    assert part.n_tasks == 0
    part.consolidate(task())
    all_of_it.load_state_dict(part.state_dict())
    model[0].requires_grad_(False)  # a constant, whoever chose it
    part.load_state_dict(part.state_dict())
    assert list(part.anchor) == list(all_of_it.anchor) == ["0.weight", "0.bias"]


def test_second_moments_are_one_more_kind_and_a_diagonal():
    with pytest.raises(ValueError, match=r"'batched', 'second moments', got .*; did you mean"):
        EWC(network(), 1.0, kind="second_moments")
    with pytest.raises(ValueError, match="are a diagonal, and 'kronecker' is another structure"):
        EWC(network(), 1.0, kind="second moments", structure="kronecker")


def test_an_optimizer_of_what_is_frozen_now_may_be_attached():
    model = network()
    ewc = EWC(model, 1.0)
    model[0].requires_grad_(False)
    ewc.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


@pytest.mark.parametrize("budget", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("structure", ["dense", "block", "kronecker"])
def test_rounding_does_not_cross_a_budget_of_several_tasks(structure, budget):
    model = network(torch.float32)
    ewc = EWC(model, budget=budget, structure=structure)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ewc.attach(optimizer)
    for t in range(1 if structure == "kronecker" else 3):
        x, y = task(t, dtype=torch.float32, n=40)
        ewc.consolidate((x, y))
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), (y + 1) % 3).backward()
            optimizer.step()
            assert ewc.nats().item() <= budget
