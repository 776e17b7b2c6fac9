"""Low-rank adapters and the penalty on the weights that they change, against formulas."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrize

from ewc_lib import EWC, Fisher, fisher_information
from ewc_lib.files import card
from ewc_lib.regularizers import AdapterEWC, Regularizer, add_adapters
from tests._adapted import cases
from tests.regularizers.cases import DOUBLE, TIGHT, copies, gradients, learn, task
from tests.scenarios import same, trace_of

LAYERS = "0", "2"


def plain(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(DOUBLE)


def adapted(seed=0, rank=2):
    model = plain(seed)
    add_adapters(model, LAYERS, rank, generator=torch.Generator().manual_seed(seed))
    return model


def shift(model, seed=0):
    """Move the adapters, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator, dtype=DOUBLE) / 3


def weights(model):
    return {layer: model.get_submodule(layer).weight for layer in LAYERS}


def test_a_network_with_new_adapters_computes_what_it_did():
    x, _ = task()
    assert torch.equal(adapted()(x), plain()(x))


def test_only_the_adapters_are_trainable_and_have_the_given_rank():
    model = adapted(rank=2)
    shift(model)
    trainable = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"A", "B"}
    before = weights(plain())
    for layer, weight in weights(model).items():
        assert torch.linalg.matrix_rank(weight - before[layer]) == 2


def test_removing_the_parametrization_leaves_the_update_in_the_weight():
    model, (x, _) = adapted(), task()
    shift(model)
    expected = model(x)
    for layer in LAYERS:
        parametrize.remove_parametrizations(model.get_submodule(layer), "weight")
    torch.testing.assert_close(model(x), expected, **TIGHT)
    assert {name for name, _ in model.named_parameters()} == {
        n for n, _ in plain().named_parameters()
    }


def test_the_first_values_follow_the_seed_and_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    one, again, other = adapted(0), adapted(0), plain(0)
    add_adapters(other, LAYERS, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(copies(one), copies(again))
    assert not same(copies(one), copies(other))
    bound = max(p.abs().max() for n, p in one.named_parameters() if n.endswith(".A"))
    assert 0 < bound <= 3**-0.5


@pytest.mark.parametrize(("layers", "rank"), [((), 2), (LAYERS, 0), (LAYERS, -1)])
def test_no_layer_or_no_rank_is_refused_and_changes_nothing(layers, rank):
    model = plain()
    with pytest.raises(ValueError, match="adapters need layers and a positive rank"):
        add_adapters(model, layers, rank)
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_without_two_dimensions_is_refused():
    with pytest.raises(ValueError, match="two dimensions"):
        add_adapters(nn.Sequential(nn.Conv1d(2, 3, 2)), ["0"], 1)


def test_an_unknown_layer_is_refused():
    with pytest.raises(AttributeError):
        add_adapters(plain(), ["5"], 1)


def test_the_penalty_is_that_of_ewc_at_the_merged_weights():
    model, data = adapted(), task(classes=4)
    held = AdapterEWC(model, 3.0)
    held.consolidate(data)
    shift(model)
    merged = plain()
    ewc = EWC(merged, 3.0, params=["0.weight", "2.weight"])
    ewc.consolidate(data)
    with torch.no_grad():
        for layer, weight in weights(model).items():
            merged.get_submodule(layer).weight.copy_(weight)
    assert ewc.penalty().item() > 1e-3
    torch.testing.assert_close(held.penalty(), ewc.penalty(), **TIGHT)


def test_tasks_add_up_and_the_last_weights_are_the_anchor():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    held.consolidate(task(0, classes=4))
    shift(model, 1)
    held.consolidate(task(1, classes=4))
    assert abs(held.penalty().item()) < 1e-14
    anchor = {layer: w.detach().clone() for layer, w in weights(model).items()}
    shift(model, 2)
    moved = weights(model)
    F = held.precision.diagonal()
    terms = [(F[f"{layer}.weight"] * (moved[layer] - anchor[layer]) ** 2).sum() for layer in LAYERS]
    torch.testing.assert_close(held.penalty(), 1.5 * sum(terms), **TIGHT)
    assert held.n_tasks == 2
    assert held.precision.n_samples == 40


def test_it_is_a_regularizer_that_is_zero_before_the_first_task():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    assert isinstance(held, Regularizer)
    assert held.penalty().item() == 0
    held.add_gradient_()
    assert all(g is None for g in gradients(model).values())


def test_adding_the_gradient_equals_the_penalty_in_the_loss():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    held.consolidate(task(classes=4))
    shift(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(held.penalty(), list(trainable.values()))
    for p in trainable.values():
        p.grad = torch.ones_like(p)
    held.add_gradient_()
    for p, gradient in zip(trainable.values(), expected, strict=True):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(p.grad, 1 + gradient, **TIGHT)


def test_a_run_differs_from_the_plain_run_and_stays_nearer():
    def run(strength):
        model = adapted()
        held = AdapterEWC(model, strength)
        held.consolidate(task(0, classes=4))
        before = {layer: w.detach().clone() for layer, w in weights(model).items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        learn(model, optimizer, held, task(1, classes=4), steps=40, finish=False)
        F_ = held.precision.diagonal()
        return sum(
            (F_[f"{layer}.weight"] * (w - before[layer]) ** 2).sum()
            for layer, w in weights(model).items()
        ).item()

    assert run(30.0) < 0.5 * run(0.0)


def test_the_end_of_a_task_leaves_no_trace_in_the_model():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    before = trace_of(model)
    held.consolidate(task(classes=4))
    assert same(trace_of(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith((".A", ".B"))
    }


def test_frozen_weights_are_frozen_again_if_the_fisher_information_fails():
    model = adapted()
    with pytest.raises(ValueError, match="a Gaussian target must have the shape"):
        AdapterEWC(model, 3.0, likelihood="gaussian").consolidate(task(classes=4))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("original"))


def test_a_restored_penalty_is_the_same():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    held.consolidate(task(classes=4))
    shift(model)
    again = AdapterEWC(copy.deepcopy(model), 3.0)
    again.load_state_dict(load(save(held.state_dict())))
    assert again.n_tasks == 1
    assert again.penalty().item() > 0
    assert torch.equal(again.penalty(), held.penalty())


def test_a_state_of_another_network_is_refused_and_changes_nothing():
    model = adapted()
    held, other = AdapterEWC(model, 3.0), nn.Sequential(nn.Linear(3, 7)).to(DOUBLE)
    held.consolidate(task(classes=4))
    shift(model)
    before = held.penalty().item()
    add_adapters(other, ["0"], 1)
    foreign = AdapterEWC(other, 3.0)
    foreign.consolidate(task(classes=4))
    with pytest.raises(ValueError, match="parameter"):
        held.load_state_dict(foreign.state_dict())
    assert held.penalty().item() == before > 0


def test_a_state_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not the state of AdapterEWC"):
        AdapterEWC(adapted(), 3.0).load_state_dict({})


def test_the_fisher_information_of_the_network_without_adapters_is_that_of_new_ones(tmp_path):
    model, data = plain(), task(classes=4)
    ewc, F = EWC(model, 3.0), fisher_information(model, data)
    ewc.consolidate(data)
    F.save(tmp_path / "base.safetensors", model=model)
    add_adapters(model, LAYERS, 2)
    consolidated = AdapterEWC(model, 3.0)
    consolidated.consolidate(data)
    for known in (F, ewc.precision, Fisher.load(tmp_path / "base.safetensors")):
        held = AdapterEWC(model, 3.0)
        held.remember(known)
        for key, value in held.state_dict().items():
            torch.testing.assert_close(value, consolidated.state_dict()[key])
    held.remember(F)
    assert held.n_tasks == 2


def test_a_fisher_information_that_does_not_fit_is_refused_and_changes_nothing():
    model, data = plain(), task(classes=4)
    F = fisher_information(model, data, params="0.*")
    K = fisher_information(model, data, structure="kronecker")
    add_adapters(model, LAYERS, 2)
    held = AdapterEWC(model, 3.0)
    for wrong, message in (
        (F, "is missing"),
        (K, "holds a diagonal, got a BlockDiagonal"),
        (replace(F, kind="empirical"), "of kind 'exact', got a Fisher of 'empirical'"),
    ):
        with pytest.raises(ValueError, match=message):
            held.remember(wrong)
    assert (held.n_tasks, held.anchor) == (0, {})


def test_what_the_task_is_predicted_to_have_lost_is_the_penalty_of_strength_one():
    model = adapted()
    held = AdapterEWC(model, 3.0)
    assert held.nats() == 0
    held.consolidate(task(classes=4))
    shift(model)
    torch.testing.assert_close(3 * held.nats(), held.penalty())


@pytest.mark.parametrize("of_adapters", [True, False])
def test_a_file_of_adapters_or_of_the_network_without_them_restores_the_penalty(
    tmp_path, of_adapters
):
    model, path = adapted() if of_adapters else plain(), tmp_path / "held.safetensors"
    held = AdapterEWC(model, 3.0) if of_adapters else EWC(model, 3.0, "online")
    held.consolidate(task(classes=4))
    held.save(path, data="four classes")
    found = card(path)
    assert (found["strength"], found["budget"], found["data"]) == (3.0, None, "four classes")
    if not of_adapters:
        add_adapters(model, LAYERS, 2)
    shift(model)
    again = AdapterEWC(model, 3.0)
    again.load(path)
    assert again.nats().item() > 0
    for name, value in held.anchor.items():
        assert torch.equal(again.anchor[name], value)
        assert torch.equal(again.precision.values[name], held.precision.values[name])


def test_a_state_of_more_than_is_chosen_is_refused():
    model = adapted()
    held, part = AdapterEWC(model, 3.0), AdapterEWC(model, 3.0, params="0.*")
    held.consolidate(task(classes=4))
    with pytest.raises(ValueError, match="which params does not choose here"):
        part.load_state_dict(held.state_dict())
    assert part.n_tasks == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1}, "needs a strength: a budget is kept by a proximal step"),
        ({}, "needs a strength"),
        ({"strength": 1.0, "structure": "kronecker"}, "holds the diagonal .*'kronecker'"),
    ],
)
def test_what_ewc_has_and_this_has_not_is_said_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterEWC(adapted(), **options)


def test_there_is_no_metric_to_choose_without_a_proximal_step():
    held = AdapterEWC(adapted(), 3.0)
    optimizer = torch.optim.SGD(held.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AdapterEWC has no proximal step, so there is no metric"):
        held.attach(optimizer, metric="optimizer")


def test_a_network_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters"):
        AdapterEWC(plain(), 1.0)


def test_a_fisher_information_of_zero_warns():
    model = adapted()
    with torch.no_grad():
        model[2].bias[0] = 1e4  # certain of the first class
    with pytest.warns(RuntimeWarning, match="zero everywhere"):
        AdapterEWC(model, 1.0).consolidate(task(classes=4))


@pytest.mark.claim("thm-adapter-blind")
def test_at_the_start_the_first_factor_has_no_fisher_information():
    model = adapted()
    diagonal = fisher_information(model, task(classes=4)).diagonal()
    first = [value for name, value in diagonal.items() if name.endswith(".A")]
    second = [value for name, value in diagonal.items() if name.endswith(".B")]
    assert all(value.abs().max() == 0 for value in first)
    assert all(value.max() > 0 for value in second)


@pytest.mark.claim("eq-adapter-ewc")
def test_ewc_of_the_factors_does_not_see_what_the_first_one_does():
    model, data = adapted(), task(classes=4)
    ewc, held = EWC(model, 3.0), AdapterEWC(model, 3.0)
    with pytest.warns(RuntimeWarning, match="no Fisher information at all"):
        ewc.consolidate(data)
    held.consolidate(data)
    shift(model)
    of_factors, of_weights = ewc.penalty().item(), held.penalty().item()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".A"):
                p *= 10
    assert ewc.penalty().item() == of_factors
    torch.testing.assert_close(held.penalty().item(), 100 * of_weights)


def test_the_loss_of_a_task_is_not_touched():
    model = adapted()
    x, y = task(classes=4)
    held = AdapterEWC(model, 0.0)
    held.consolidate((x, y))
    F.cross_entropy(model(x), y).backward()
    before = gradients(model)
    held.before_step(x)
    held.add_gradient_()
    held.after_step()
    assert same(gradients(model), before)


@pytest.mark.parametrize("name", cases.CASES)
def test_with_peft_it_is_ewc_of_the_merged_network(name):
    model, data = cases.adapted(name)
    held, merged = AdapterEWC(model, 3.0), cases.merged(model)
    before = trace_of(model)
    fisher = held.consolidate(data)
    assert same(trace_of(model), before)
    ewc = EWC(merged, 3.0, params=list(fisher.diagonal()))
    expected = ewc.consolidate(data).diagonal()
    for key, value in fisher.diagonal().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)
    cases.move(model, seed=1)
    with torch.no_grad():
        moved = cases.merged(model).state_dict()
        merged.load_state_dict(moved)
    assert held.penalty().item() > 1e-9
    torch.testing.assert_close(held.penalty(), ewc.penalty(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", cases.CASES)
def test_with_peft_adding_the_gradient_equals_the_penalty_in_the_loss(name):
    model, data = cases.adapted(name)
    held = AdapterEWC(model, 3.0)
    held.consolidate(data)
    cases.move(model, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(held.penalty(), trained, allow_unused=True)
    for p in trained:
        p.grad = torch.ones_like(p)
    with torch.autocast("cpu", torch.bfloat16):
        held.add_gradient_()
    for p, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + (0 if gradient is None else gradient), **TIGHT)


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_tasks_are_merged_as_by_ewc(mode):
    options = {"mode": mode, "decay": 0.5} if mode == "online" else {"mode": mode}
    model, (x, y) = cases.adapted("rslora with biases")
    held, merged = AdapterEWC(model, 3.0, **options), cases.merged(model)
    ewc = EWC(merged, 3.0, **options)
    for t in range(3):
        merged.load_state_dict(cases.merged(model).state_dict())
        for penalty in (held, ewc):
            penalty.consolidate((x.roll(t, 1), y))
        cases.move(model, seed=t)
    merged.load_state_dict(cases.merged(model).state_dict())
    torch.testing.assert_close(held.penalty(), ewc.penalty(), rtol=1e-9, atol=1e-12)


def test_merging_changes_no_penalty_and_another_adapter_is_held_by_the_first_task():
    peft = pytest.importorskip("peft")
    model, data = cases.adapted("lora")
    held = AdapterEWC(model, 3.0)
    held.consolidate(data)
    cases.move(model, seed=1)
    before = held.penalty().item()
    model.merge_adapter()
    assert held.penalty().item() == pytest.approx(before, rel=1e-9)
    held.add_gradient_()  # nothing is trained now
    model.unmerge_adapter()
    base = model.merge_and_unload()
    assert held.penalty().item() == pytest.approx(before, rel=1e-9)
    again = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["0"])).to(DOUBLE)
    restored = AdapterEWC(again, 3.0)
    restored.load_state_dict(load(save(held.state_dict())))
    assert restored.penalty().item() == pytest.approx(before, rel=1e-9)
    cases.move(again, seed=2)
    restored.add_gradient_()
    assert restored.penalty().item() != pytest.approx(before, rel=1e-3)
    restored.consolidate(data)
    assert restored.penalty().item() == pytest.approx(0, abs=1e-12)
    assert restored.precision.n_samples == 2 * cases.N


def test_a_layer_that_gets_its_adapter_later_is_free_for_the_first_task():
    peft = pytest.importorskip("peft")
    model, data = cases.adapted("lora")
    held = AdapterEWC(model, 3.0, params="0.weight")
    held.consolidate(data)
    every = AdapterEWC(model, 3.0)
    every.load_state_dict(held.state_dict())
    first = every.precision.diagonal()["0.weight"].clone()
    model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["2"]))
    model.base_model.set_adapter(["second"])
    model.to(DOUBLE)
    own = every.consolidate(data).diagonal()
    total = every.precision.diagonal()
    torch.testing.assert_close(total["2.weight"], own["2.weight"], **TIGHT)
    torch.testing.assert_close(total["0.weight"], first + own["0.weight"], **TIGHT)


def test_tied_tables_below_two_adapters_are_two_weights():
    peft = pytest.importorskip("peft")

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x).sum(1))

    config = peft.LoraConfig(r=2, target_modules=["table", "head"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(Tied(), config).to(DOUBLE)
        x, y = torch.randint(0, 5, (9, 2)), torch.randint(0, 5, (9,))
    cases.move(model)
    found = AdapterEWC(model, 1.0).consolidate((x, y)).diagonal()
    layers = model.base_model.model
    apart = Tied()
    apart.head.weight = nn.Parameter(torch.empty(5, 3))
    apart.to(DOUBLE)
    for name in ("table", "head"):
        layer = getattr(layers, name)
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        getattr(apart, name).weight.data = weight.detach()
    expected = fisher_information(apart, (x, y)).diagonal()
    assert found.keys() == {"table.weight", "head.weight"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TIGHT)


def test_a_second_update_of_a_layer_adds_to_the_first_one():
    model, data = adapted(), task(classes=4)
    shift(model)
    held = AdapterEWC(model, 3.0)
    held.consolidate(data)
    add_adapters(model, LAYERS, 1)
    assert abs(held.penalty().item()) < 1e-14
    shift(model, 1)
    expected = sum(
        (held.precision.diagonal()[f"{layer}.weight"] * d.square()).sum()
        for layer, w in weights(model).items()
        for d in [w - held.anchor[f"{layer}.weight"]]
    )
    torch.testing.assert_close(held.penalty(), 1.5 * expected, **TIGHT)
    for layer in LAYERS:
        parametrize.remove_parametrizations(model.get_submodule(layer), "weight")
    torch.testing.assert_close(held.penalty(), 1.5 * expected, **TIGHT)


@pytest.mark.parametrize(
    ("params", "held"),
    [
        ("0.weight", {"0.weight"}),
        (["*.bias"], {"0.bias", "2.bias"}),
        (lambda name, tensor: tensor.dim() == 2, {"0.weight", "2.weight"}),
        ("module", {"2.weight", "2.bias"}),
    ],
)
def test_only_what_is_chosen_is_held(params, held):
    model, data = cases.adapted("rslora with biases")
    chosen = model.base_model.model[2] if params == "module" else params
    ewc = AdapterEWC(model, 1.0, params=chosen)
    assert ewc.consolidate(data).diagonal().keys() == held


def test_its_settings_are_those_of_the_fisher_information():
    model, data = cases.adapted("lora")
    options = {"kind": "sketch", "draws": 3, "n_samples": 5, "precision": "high"}
    found = AdapterEWC(model, 1.0, certify="always", **options).consolidate(
        data, generator=torch.Generator().manual_seed(3), progress=False
    )
    expected = fisher_information(
        cases.merged(model),
        data,
        params=["0.weight", "2.weight"],
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    assert found.n_samples == 5
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-12)


def test_a_learned_task_is_kept_where_ewc_of_the_factors_loses_it():
    """The base has learned the first task; adapters learn the second, with other labels."""
    peft = pytest.importorskip("peft")

    def tasks():
        x = torch.randn(2, 120, 6, dtype=DOUBLE)
        x[0, :, 5], x[1, :, 5] = 1.5, -1.5
        y = x[:, :, :3].argmax(-1)
        return x, torch.stack([y[0], 2 - y[1]])

    def train(model, x, y, held):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if held is not None:
                held.add_gradient_()
            optimizer.step()

    def loss_of_the_first_task(make):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).to(DOUBLE)
            (x, y), config = tasks(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
            train(base, x[0], y[0], None)
            model = peft.get_peft_model(base, config).to(DOUBLE)
        held = make(model)
        if held is not None:
            with warnings.catch_warnings(action="ignore"):  # the factors are told to be blind
                held.consolidate((x[0], y[0]))
        train(model, x[1], y[1], held)
        return F.cross_entropy(model(x[0]), y[0]).item()

    free = loss_of_the_first_task(lambda model: None)
    of_factors = loss_of_the_first_task(lambda model: EWC(model, 100.0))
    of_weights = loss_of_the_first_task(lambda model: AdapterEWC(model, 100.0))
    assert of_weights < 0.2 * free
    assert of_factors > 0.4 * free
