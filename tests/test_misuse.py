"""What runs and is seldom meant is said once, and what is meant says nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewc_lib import EWC
from ewc_lib.regularizers import L2, SI, AdapterEWC, KroneckerLaplace, add_adapters

DATA = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def held(model=None, make=EWC, **options):
    model = network() if model is None else model
    penalty = make(model, 10.0, **options)
    penalty.consolidate(DATA)
    return model, penalty


def adapted(model, *layers):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=[*layers], r=2))


BESIDE = "adapters of peft are trained beside"


@pytest.mark.parametrize("make", [EWC, L2, KroneckerLaplace])
def test_weights_below_adapters_of_peft_are_held_in_vain_and_this_is_said_once(make):
    model, penalty = held(make=make)
    optimizer = torch.optim.SGD(adapted(model, "0").parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match=rf"{BESIDE} '0\.weight', which.*AdapterEWC"):
        attachment = penalty.attach(optimizer)
    attachment.remove()
    penalty.attach(optimizer)
    assert penalty.penalty() == 0


def test_weights_from_a_file_are_held_in_vain_below_adapters(tmp_path):
    held()[1].save(tmp_path / "ewc.safetensors")
    model = adapted(network(), "0", "2")
    ewc = EWC(model, 1.0)
    ewc.load(tmp_path / "ewc.safetensors")
    with pytest.warns(RuntimeWarning, match=rf"{BESIDE} '0\.weight', '2\.weight'"):
        ewc.nats()


def test_adapters_that_are_held_or_off_or_merged_or_beside_nothing_that_is_held_say_nothing():
    model, ewc = held()
    peft = adapted(model, "0")
    with peft.disable_adapter():
        ewc.nats()
    peft.merge_adapter()
    ewc.nats()
    peft.unmerge_adapter()
    ewc.forget("0.weight")
    ewc.attach(adam(model))
    factors = EWC(adapted(network(), "0"), 1.0)
    nn.init.ones_(factors.model.get_parameter("base_model.model.0.lora_B.default.weight"))
    factors.consolidate(DATA)
    factors.attach(adam(factors.model))


FROZEN = r"'0\.weight', '0\.bias' were frozen when the last task was finished"


def test_what_is_unfrozen_after_a_task_is_named_once():
    model = network()
    model[0].requires_grad_(False)
    _, ewc = held(model)
    model[0].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match=FROZEN):
        ewc.attach(adam(model))
    ewc.attach(adam(model))
    ewc.consolidate(DATA)
    assert "0.weight" in ewc.anchor
    ewc.attach(adam(model))


def test_new_and_forgotten_layers_and_those_that_nobody_chose_are_free_without_a_word():
    model, ewc = held(params="0.*")
    ewc.attach(adam(model))
    model, ewc = held()
    model.append(nn.Linear(2, 2))
    ewc.forget("0.*")
    ewc.attach(adam(model))
    model, ewc = network(), EWC(network(), 1.0)
    ewc.attach(adam(ewc.model))  # before the first task


@pytest.mark.parametrize("more", [0, 3])
def test_a_new_layer_under_the_name_of_an_old_one_is_named_with_what_sets_it_free(more):
    model, ewc = held()
    model[2] = nn.Linear(4, 2 + more)
    with pytest.warns(RuntimeWarning, match=r"ewc\.forget\(\['2\.weight', '2\.bias'\]\)"):
        ewc.attach(adam(model))
    ewc.attach(adam(model))
    _, ewc = held(model)
    model[2] = nn.Linear(4, 5)
    ewc.forget("2.*")
    ewc.attach(adam(model))


def test_layers_that_have_grown_and_copies_of_a_model_are_no_new_ones():
    model, ewc = held()
    grown = nn.Linear(4, 5)
    for name, value in model[2].state_dict().items():
        grown.get_parameter(name).data[:2] = value
    model[2] = grown
    ewc.attach(adam(model))
    model, ewc = held()
    twin = copy.deepcopy(ewc)
    for p in twin.model.parameters():
        nn.init.normal_(p)
    twin.attach(adam(twin.model))
    for p in model.parameters():
        nn.init.normal_(p)
    ewc.attach(adam(model))  # moved, and the same


def test_what_no_optimizer_moves_may_be_unfrozen():
    model = network()
    model[0].requires_grad_(False)
    _, ewc = held(model)
    optimizer = adam(model)
    model[0].requires_grad_(True)
    ewc.attach(optimizer)


@pytest.mark.parametrize("make", [lambda m, s: EWC(m, s, structure="block"), KroneckerLaplace])
def test_a_strength_that_a_structure_and_adam_make_a_euclidean_one_is_said_to_be_one(make):
    model, penalty = held(make=make)
    with pytest.warns(RuntimeWarning, match="after Adam goes by the learning rate alone"):
        penalty.attach(adam(model))
    penalty.attach(adam(model))


def test_a_strength_that_is_that_of_the_loss_or_is_meant_to_be_another_says_nothing():
    model, ewc = held(structure="kronecker")
    ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    ewc.attach(adam(model), "gradient")
    ewc.attach(adam(model), metric="euclidean")
    EWC(model, budget=0.1, structure="kronecker").attach(adam(model))
    for make in (EWC, SI, L2):
        make(model, 1.0).attach(adam(model))


TWICE = "it counts twice"


def test_a_penalty_in_the_loss_and_in_the_step_is_said_to_count_twice():
    model, ewc = held()
    optimizer = adam(model)
    with ewc.attach(optimizer):
        assert ewc.penalty().item() == 0  # to look at it is no mistake
        ewc.nats()
        with pytest.warns(RuntimeWarning, match=TWICE):
            (F.cross_entropy(model(DATA[0]), DATA[1]) + ewc.penalty()).backward()
        ewc.penalty().backward()


@pytest.mark.parametrize(
    "act", [lambda e, _: e.add_gradient_(), lambda e, optimizer: e.proximal_step_(optimizer)]
)
def test_a_step_by_hand_beside_one_that_is_attached_is_said_to_count_twice(act):
    model, ewc = held()
    optimizer = adam(model)
    with ewc.attach(optimizer), pytest.warns(RuntimeWarning, match=TWICE):
        act(ewc, optimizer)
    _, ewc = held(model)
    with ewc.attach(optimizer):
        pass
    act(ewc, optimizer)
    ewc.penalty().backward()


def test_a_step_by_hand_after_another_optimizer_is_one():
    model, ewc = held()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    with ewc.attach(first):
        ewc.proximal_step_(second)


@pytest.mark.parametrize("by_hand", ["penalty", "add_gradient_"])
def test_methods_that_only_have_a_gradient_count_twice_as_well(by_hand):
    model = network()
    add_adapters(model, ["0"], rank=2)
    ewc = AdapterEWC(model, 1.0)
    ewc.consolidate(DATA)
    optimizer = adam(model)
    with ewc.attach(optimizer):
        F.cross_entropy(model(DATA[0]), DATA[1]).backward()
        optimizer.step()
        assert ewc.penalty() >= 0
        with pytest.warns(RuntimeWarning, match=TWICE):
            ewc.penalty().backward() if by_hand == "penalty" else ewc.add_gradient_()
