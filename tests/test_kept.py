"""What a penalty keeps of a model that changes between tasks."""

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from ewc_lib import EWC, fisher_information
from ewc_lib.fisher import BlockDiagonal
from ewc_lib.regularizers import L2, SI, KroneckerLaplace
from tests.regularizers.cases import (
    QUADRATIC,
    after_one_task,
    copies,
    learn,
    move,
    network,
    sgd,
    task,
)
from tests.scenarios import PROPERTY, same

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SUMS = ["diagonal", "block", "module", "dense", "lowrank"]
each_quadratic = pytest.mark.parametrize("name", QUADRATIC)


def grow(layer, more=0, inputs=0):
    """Return a larger layer with the old one in it, frozen where that was."""
    larger = nn.Linear(layer.in_features + inputs, layer.out_features + more).to(layer.weight)
    with torch.no_grad():
        larger.weight[: layer.out_features, : layer.in_features] = layer.weight
        larger.bias[: layer.out_features] = layer.bias
    larger.weight.requires_grad_(layer.weight.requires_grad)
    larger.bias.requires_grad_(layer.bias.requires_grad)
    return larger


def gradient(model, value):
    """The gradient of a number, zero for what it does not depend on."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
    return dict(zip(own, found, strict=True))


# Against the sum of one penalty for each task


class Growing(nn.Module):
    """A body with heads that come, grow and go."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 2)})

    def forward(self, x):
        features = self.body(x)
        return torch.cat([head(features) for head in self.heads.values()], 1)


class Tasks:
    """A model that changes, one merged penalty, and what each task alone says."""

    def __init__(self, structure, seed):
        torch.manual_seed(seed)
        self.model, self.names = Growing().double(), iter("bcdefghijk")
        self.ewc = EWC(self.model, 3.0, kind="empirical", structure=structure)
        self.terms = []
        self.finish()

    def finish(self):
        x = torch.randn(6, 3, dtype=DOUBLE)
        y = torch.arange(6) % self.model(x).shape[1]
        own = copies(self.model)
        found = self.ewc.consolidate((x, y))
        self.terms.append((found, {name: own[name] for name in found.shapes}, {}))
        self.move()

    def move(self):
        with torch.no_grad():
            for p in self.model.parameters():
                p += p.requires_grad * torch.randn_like(p)

    def freeze(self):
        self.model.body[2].bias.requires_grad_(False)
        self.model.heads["a"].weight.requires_grad_(False)

    def freeze_a_layer(self):
        self.model.body[0].requires_grad_(False)

    def unfreeze(self):
        self.model.requires_grad_(True)

    def add(self):
        width = self.model.body[2].out_features
        self.model.heads[next(self.names)] = nn.Linear(width, 2).double()

    def grow(self):
        last = list(self.model.heads)[-1]
        self.model.heads[last] = grow(self.model.heads[last], more=1)

    def widen(self):
        self.model.body[2] = grow(self.model.body[2], more=1)
        for name, head in self.model.heads.items():
            self.model.heads[name] = grow(head, inputs=1)

    def forget(self, remove=False):
        """The terms keep what is forgotten where the merged penalty is smallest."""
        *_, last = self.model.heads
        held = [n for n in self.ewc.anchor if n.startswith(f"heads.{last}.")]
        if not held or len(self.model.heads) == 1:
            return
        self.ewc.penalty()  # follows what has grown
        where = self.ewc.anchor
        for _, _, fixed in self.terms:
            fixed.update({n: fixed.get(n, where[n]) for n in held})
        if remove:
            del self.model.heads[last]
            self.names = iter(set(self.names) - {last})
        self.ewc.forget(f"heads.{last}.*")

    def remove(self):
        self.forget(remove=True)

    def sum(self):
        now, total = dict(self.model.named_parameters()), 0
        for fisher, anchor, fixed in self.terms:
            places = {n: fixed[n] if n in fixed else now[n] for n in fisher.shapes}
            own = {n: p[tuple(map(slice, anchor[n].shape))] for n, p in places.items()}
            total += fisher.quadratic({n: p - anchor[n] for n, p in own.items()})
        return 0.5 * 3.0 * total


CHANGES = [
    *("freeze", "freeze_a_layer", "unfreeze", "add", "grow", "widen", "forget", "remove"),
    *("finish", "finish", "finish"),
]


@pytest.mark.parametrize("structure", SUMS)
@given(changes=st.lists(st.sampled_from(CHANGES), max_size=8), seed=st.integers(0, 99))
@settings(PROPERTY, max_examples=12)
def test_merging_is_the_sum_of_the_penalties_of_the_tasks_whatever_has_changed(
    structure, changes, seed
):
    with torch.random.fork_rng():
        tasks = Tasks(structure, seed)
        for change in changes:
            getattr(tasks, change)()
        tasks.move()
    expected, found = tasks.sum(), tasks.ewc.penalty()
    torch.testing.assert_close(found, expected, **TIGHT)
    slope = gradient(tasks.model, expected)
    torch.testing.assert_close(gradient(tasks.model, found), slope, **TIGHT)
    tasks.ewc.add_gradient_()
    for name, p in tasks.model.named_parameters():
        if p.requires_grad:
            there = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(there, slope[name], **TIGHT)
        else:
            assert p.grad is None


@pytest.mark.parametrize("structure", SUMS)
def test_the_online_penalty_adds_what_each_task_has_around_the_latest_optimum(structure):
    with torch.random.fork_rng():
        tasks = Tasks(structure, 0)
    model = tasks.model
    ewc = EWC(model, 3.0, "online", decay=0.5, kind="empirical", structure=structure)
    data = torch.randn(6, 3, dtype=DOUBLE), torch.arange(6) % 2
    first = ewc.consolidate(data)
    model.body[0].requires_grad_(False)
    tasks.add()
    tasks.grow()
    tasks.move()
    second = ewc.consolidate(data)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = 0.5 * _in(first, shapes) + _in(second, shapes)
    torch.testing.assert_close(ewc.precision.to_dense(), expected, **TIGHT)
    assert list(ewc.precision.shapes) == list(shapes)
    assert same(ewc.anchor, whole)
    assert ewc.penalty() == 0


def _in(fisher, shapes):
    """The whole matrix in the space of more parameters, by products with unit vectors."""
    columns = []
    for unit in torch.eye(sum(s.numel() for s in shapes.values()), dtype=DOUBLE):
        parts = unit.split([s.numel() for s in shapes.values()])
        v = {n: part.reshape(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)}
        found = fisher @ {n: v[n][tuple(map(slice, s))] for n, s in fisher.shapes.items()}
        out = {n: torch.zeros_like(x) for n, x in v.items()}
        for n, x in found.items():
            out[n][tuple(map(slice, x.shape))] = x
        columns.append(torch.cat([x.reshape(-1) for x in out.values()]))
    return torch.stack(columns, 1)


# Every method


def learn_next(model, regularizer, proximal=True, finish=True):
    """Learn the second task with what requires grad; everything else stays."""
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    model.outputs = range(2, 4)
    optimizer = sgd(model)
    learn(model, optimizer, regularizer, task(1), proximal=proximal, finish=finish)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in fixed.items())


def diagonal_of(regularizer, name):
    return regularizer.precision.diagonal()[name]


@pytest.mark.parametrize("proximal", [True, False])
@each_quadratic
def test_what_is_frozen_needs_no_optimizer_and_keeps_its_importance(name, proximal):
    model, regularizer = after_one_task(name)
    model.net[0].requires_grad_(False)
    model.zero_grad()
    before = diagonal_of(regularizer, "net.0.weight").clone()
    learn_next(model, regularizer, proximal, finish=False)
    assert all(p.grad is None for p in model.net[0].parameters())
    regularizer.consolidate(task(1))
    assert regularizer.n_tasks == 2
    decay = 0.9 if name == "online EWC" else 1.0
    torch.testing.assert_close(diagonal_of(regularizer, "net.0.weight"), decay * before)
    model.requires_grad_(True)
    learn_next(model, regularizer, proximal)
    assert list(regularizer.anchor) == [n for n, _ in model.named_parameters()]


@each_quadratic
def test_what_is_new_is_free_until_the_next_task_is_finished(name):
    model, regularizer = after_one_task(name)
    held = list(regularizer.anchor)
    model.net.append(nn.Linear(4, 4).double())
    move(model.net[3])
    assert list(regularizer.anchor) == held
    assert not gradient(model, regularizer.penalty())["net.3.weight"].any()
    learn_next(model, regularizer)
    assert list(regularizer.anchor) == [n for n, _ in model.named_parameters()]
    assert diagonal_of(regularizer, "net.3.weight").any()


@each_quadratic
def test_what_was_frozen_at_first_is_held_from_the_next_task_on(name):
    model = network()
    model.net[0].requires_grad_(False)
    regularizer = QUADRATIC[name](model, 3.0)
    learn(model, sgd(model), regularizer, task(0))
    model.requires_grad_(True)
    move(model.net[0])
    assert regularizer.penalty().abs() < 1e-14
    learn_next(model, regularizer)
    assert list(regularizer.anchor) == [n for n, _ in model.named_parameters()]
    assert diagonal_of(regularizer, "net.0.weight").any()


@each_quadratic
def test_what_has_grown_keeps_its_old_entries_and_is_free_in_the_new_ones(name):
    model, regularizer = after_one_task(name)
    move(model)
    before, slope = regularizer.penalty(), gradient(model, regularizer.penalty())
    model.net[0] = grow(model.net[0], more=2)
    model.net[2] = grow(model.net[2], more=3, inputs=2)
    torch.testing.assert_close(regularizer.penalty(), before)
    for n, g in gradient(model, regularizer.penalty()).items():
        inside = tuple(map(slice, slope[n].shape))
        torch.testing.assert_close(g[inside], slope[n])
        g[inside] = 0
        assert not g.any()
    model.outputs = range(4, 7)
    learn(model, sgd(model), regularizer, (task(1)[0], torch.arange(20) % 3), proximal=True)
    assert diagonal_of(regularizer, "net.2.weight")[4:].any()
    assert diagonal_of(regularizer, "net.2.weight").shape == (7, 7)


@each_quadratic
def test_what_has_gone_is_named_and_can_be_forgotten(name):
    model, regularizer = after_one_task(name)
    move(model)
    before = regularizer.state_dict()
    first = model.net[0]
    model.net[0] = nn.Identity()
    for use in (
        regularizer.penalty,
        regularizer.add_gradient_,
        lambda: regularizer.proximal_step_(sgd(model)),
        lambda: regularizer.consolidate(task(1)),
    ):
        with pytest.raises(ValueError, match=r"'net\.0\.weight', 'net\.0\.bias'") as why:
            use()
        assert 'ewc.forget("net.0.*")' in str(why.value)
    assert same(regularizer.state_dict(), before)
    regularizer.forget("net.0.*")
    assert list(regularizer.anchor) == ["net.2.weight", "net.2.bias"]
    model.net[0] = first  # as a new one
    slope = gradient(model, regularizer.penalty())
    assert not slope["net.0.weight"].any()
    assert slope["net.2.weight"].any()
    learn_next(model, regularizer)
    assert list(regularizer.anchor) == [n for n, _ in model.named_parameters()]


@each_quadratic
def test_a_model_that_is_wrapped_later_is_still_the_same(name):
    model, regularizer = after_one_task(name)
    plain, expected = copy.deepcopy((model, regularizer))
    regularizer.model = nn.DataParallel(model)
    for net, method in ((model, regularizer), (plain, expected)):
        learn_next(net, method)
        move(net)
    assert regularizer.penalty() > 0
    assert torch.equal(regularizer.penalty(), expected.penalty())
    assert same(regularizer.state_dict(), expected.state_dict())


@each_quadratic
def test_a_penalty_that_has_forgotten_everything_is_as_before_the_first_task(name):
    model, regularizer = after_one_task(name)
    regularizer.forget(["net.*"])
    move(model)
    assert regularizer.penalty() == 0
    assert (regularizer.precision, regularizer.anchor, regularizer.n_tasks) == (None, {}, 0)
    learn_next(model, regularizer)
    assert regularizer.n_tasks == 1


# Kronecker factors


def layers(structure, strength=2.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    ewc = EWC(model, strength, structure=structure)
    ewc.consolidate((torch.randn(9, 3, dtype=DOUBLE), torch.arange(9) % 3))
    move(model)
    return model, ewc


@pytest.mark.parametrize("structure", ["kronecker", "eigenkronecker"])
def test_factors_grow_with_their_layer(structure):
    model, ewc = layers(structure)
    before, slope = ewc.penalty(), gradient(model, ewc.penalty())
    model[0], model[2] = grow(model[0], more=2), grow(model[2], more=1, inputs=2)
    torch.testing.assert_close(ewc.penalty(), before)
    found = gradient(model, ewc.penalty())
    torch.testing.assert_close(found["2.weight"][:3, :4], slope["2.weight"])
    assert [tuple(block.size) for block in ewc.precision.blocks] == [(6, 4), (4, 7)]
    ewc.proximal_step_(sgd(model))
    assert ewc.penalty() < before


def test_of_factors_the_weight_or_the_bias_can_be_forgotten():
    for part, left in (("bias", "weight"), ("weight", "bias")):
        _, ewc = layers("kronecker")
        whole = ewc.precision
        ewc.forget(f"*.{part}")
        v = {n: torch.zeros(s, dtype=DOUBLE) for n, s in whole.shapes.items()}
        own = {n: torch.randn_like(x) for n, x in v.items() if n.endswith(left)}
        torch.testing.assert_close(ewc.precision.quadratic(own), whole.quadratic(v | own))


def test_shared_eigenvectors_are_forgotten_together_or_not_at_all():
    _, ewc = layers("eigenkronecker")
    before = ewc.state_dict()
    with pytest.raises(ValueError, match=r"'0\.weight' and '0\.bias' share their eigenvectors"):
        ewc.forget("0.bias")
    assert same(ewc.state_dict(), before)
    ewc.forget("0.*")
    assert list(ewc.anchor) == ["2.weight", "2.bias"]


def test_averaged_factors_go_on_where_a_bias_is_frozen_and_a_layer_is_new():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    method, data = KroneckerLaplace(model, 1.0), (torch.randn(9, 3).double(), torch.arange(9) % 3)
    method.consolidate(data)
    whole = method.precision.to_dense().clone()
    model[0].requires_grad_(False)
    model.append(nn.Linear(3, 3).double())
    model[2].bias.requires_grad_(False)
    task = method.consolidate(data)
    assert isinstance(method.precision, BlockDiagonal)
    first = method.precision._within(["0.weight", "0.bias"]).to_dense()
    torch.testing.assert_close(first, whole[:16, :16])
    new = ["3.weight", "3.bias"]
    torch.testing.assert_close(
        method.precision._within(new).to_dense(), task._within(new).to_dense()
    )


# Other situations


def test_steps_may_be_frozen_in_all_that_is_held():
    model = network()
    method = SI(model, 1.0, params="net.0.*")
    learn(model, sgd(model), method, task(0))
    model.net[0].requires_grad_(False)
    before = method.penalty().item()
    learn(model, sgd(model), method, task(1), finish=False)
    learn(model, sgd(model), method, task(1), proximal=True, finish=False)
    assert method.penalty().item() == before
    with pytest.raises(ValueError, match="no trainable parameter is named"):
        method.consolidate()


def test_a_parameter_may_be_frozen_and_have_grown():
    model, regularizer = after_one_task("EWC")
    move(model)
    before = regularizer.penalty().item()
    model.net[2].requires_grad_(False)
    model.net[2] = grow(model.net[2], more=2)
    assert regularizer.penalty().item() == pytest.approx(before)
    regularizer.add_gradient_()
    assert model.net[2].weight.grad is None
    learn_next(model, regularizer)
    assert diagonal_of(regularizer, "net.2.weight").shape == (6, 5)


def test_a_tied_embedding_may_grow():
    class Words(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.embed, self.head = nn.Embedding(n, 3), nn.Linear(3, n, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x)))

    model = Words(5).double()
    ewc = EWC(model, 3.0)
    ewc.consolidate((torch.arange(5), torch.arange(5)))
    assert list(ewc.anchor) == ["embed.weight"]
    larger = Words(7).double()
    with torch.no_grad():
        larger.embed.weight[:5] = model.embed.weight + 1
    model.embed, model.head = larger.embed, larger.head
    slope = gradient(model, ewc.penalty())["embed.weight"]
    torch.testing.assert_close(slope[:5], 3.0 * ewc.precision.values["embed.weight"][:5])
    assert not slope[5:].any()
    ewc.consolidate((torch.arange(7), torch.arange(7)))
    assert ewc.anchor["embed.weight"].shape == (7, 3)


@pytest.mark.filterwarnings("ignore:the running statistics")
def test_scale_and_shift_of_a_norm_may_be_switched_off():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    ewc, data = EWC(model, 1.0), (torch.randn(8, 3).double(), torch.arange(8) % 2)
    ewc.consolidate(data)
    model[1] = nn.BatchNorm1d(4, affine=False).double()
    with pytest.raises(ValueError, match=re.escape('ewc.forget("1.*")')):
        ewc.penalty()
    ewc.forget("1.*")
    ewc.consolidate(data)
    assert list(ewc.anchor) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_predicate_chooses_for_the_next_task_and_takes_nothing_back():
    model, limit = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double(), ["0"]
    method = L2(model, 2.0, params=lambda name, p: name.split(".")[0] in limit)
    method.consolidate()
    limit[:] = ["1"]
    move(model)
    assert set(gradient(model, method.penalty())) >= {"0.weight"}
    assert gradient(model, method.penalty())["0.weight"].any()
    method.consolidate()
    assert list(method.anchor) == [name for name, _ in model.named_parameters()]


def test_a_module_that_was_chosen_is_held_with_what_it_has_got_since():
    model = network()
    method = L2(model, 1.0, params=model.net)
    method.consolidate()
    model.net.append(nn.Linear(4, 4).double())
    method.consolidate()
    assert list(method.anchor) == [name for name, _ in model.named_parameters()]


def test_the_fisher_information_of_a_wrapped_model_can_be_remembered():
    model, data = nn.Linear(3, 2).double(), (torch.randn(8, 3).double(), torch.arange(8) % 2)
    wrapped = fisher_information(nn.DataParallel(model), data, structure="module")
    ewc = EWC(model, 1.0, structure="module")
    ewc.remember(wrapped)
    assert list(ewc.precision.shapes) == list(ewc.anchor) == ["weight", "bias"]
    assert list(wrapped.shapes) == ["module.weight", "module.bias"]
    model.bias.requires_grad_(False)
    ewc.remember(wrapped)  # of before it was frozen
    torch.testing.assert_close(ewc.precision.to_dense(), 2 * wrapped.to_dense())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.filterwarnings("ignore:the factors", "ignore:adapters of peft")
def test_adapters_come_and_go_and_come_again(in_place):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.randn(8, 3), torch.arange(8) % 2
    ewc = EWC(model, 3.0)
    ewc.consolidate(data)
    own = list(ewc.anchor)
    config = peft.LoraConfig(target_modules=["0"], r=2)
    adapted = peft.get_peft_model(model, config)
    ewc.model = model if in_place else adapted
    assert ewc.penalty() == 0
    assert not ewc.penalty().requires_grad  # the layers are frozen
    ewc.consolidate(data)
    lora = [name for name in ewc.anchor if "lora" in name]
    assert len(lora) == 2
    adapted.add_adapter("second", config)
    adapted.set_adapter("second")
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    F.cross_entropy(adapted(data[0]), data[1]).backward()
    optimizer.step()
    adapted.set_adapter("default")
    with pytest.raises(ValueError, match="holds none of the parameters of the penalty"):
        ewc.proximal_step_(optimizer)
    ewc.model = adapted.merge_and_unload()
    with pytest.raises(ValueError, match="lora"):
        ewc.penalty()
    ewc.forget("*lora*")
    assert list(ewc.anchor) == own
    assert ewc.penalty().item() >= 0


@pytest.mark.filterwarnings("ignore:the factors", "ignore:adapters of peft")
def test_a_head_that_an_adapter_trains_as_a_copy_is_still_held():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.randn(8, 3), torch.arange(8) % 2
    ewc = EWC(model, 3.0)
    ewc.consolidate(data)
    config = peft.LoraConfig(target_modules=["0"], r=2, modules_to_save=["2"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model[2].modules_to_save["default"].weight += 1
    found = gradient(model, ewc.penalty())
    assert [n for n, g in found.items() if g.any()] == ["2.modules_to_save.default.weight"]
    ewc.consolidate(data)
    assert {"2.weight", "2.bias"} < set(ewc.anchor)


def test_what_a_path_remembers_follows_a_model_that_changes_within_a_task():
    model, regularizer = after_one_task("RWalk")
    lasting = {k: v["net.0.weight"].clone() for k, v in regularizer._memory.items()}
    model.net[0].requires_grad_(False)
    learn_next(model, regularizer, finish=False)
    model.net[2] = grow(model.net[2], more=2)
    model.outputs = None
    optimizer = sgd(model)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(task(2)[0]), torch.arange(20) % 6).backward()
        regularizer.before_step()
        optimizer.step()
        regularizer.after_step()
    assert (regularizer._n_steps, regularizer._memory["start"]["net.2.weight"].shape[0]) == (15, 6)
    regularizer.consolidate()
    assert diagonal_of(regularizer, "net.2.weight")[4:].any()
    for quantity, values in lasting.items():
        assert torch.equal(regularizer._memory[quantity]["net.0.weight"], values)
    regularizer.forget("net.0.*")
    assert all("net.0.weight" not in values for values in regularizer._memory.values())


def test_an_unchanged_model_is_looked_at_once():
    model, ewc = layers("dense")
    held = ewc._held()
    assert ewc._held() is held
    model[0].bias.requires_grad_(False)
    assert ewc._held() is not held
