"""Which parameters count."""

import pytest
import torch
from torch import nn

from ewc_lib import EWC, _selecting, fisher_information
from ewc_lib._selecting import Chooser, fixed, select_parameters
from ewc_lib.fisher import MatrixFree
from ewc_lib.regularizers import MAS
from ewc_lib.score import per_observation_gradients


def network():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)))
    model.add_module("head", nn.Linear(3, 2))
    return model


ALL = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        (None, ALL),
        ("head.weight", ["head.weight"]),
        (["head.bias", "body.0.weight"], ["body.0.weight", "head.bias"]),
        ("head.*", ["head.weight", "head.bias"]),
        (["*.bias", "head.*"], ["body.0.bias", "body.2.bias", "head.weight", "head.bias"]),
        ("body.[0-1].*", ["body.0.weight", "body.0.bias"]),
        (lambda name, p: p.dim() == 1, ["body.0.bias", "body.2.bias", "head.bias"]),
        (lambda name, p: name.startswith("head"), ["head.weight", "head.bias"]),
    ],
)
def test_parameters_are_chosen_in_the_order_of_the_model(params, chosen):
    model = network()
    found = select_parameters(model, params)
    assert list(found) == chosen
    assert all(p is model.get_parameter(name) for name, p in found.items())


def test_frozen_parameters_are_not_chosen():
    model = network()
    model.body.requires_grad_(False)
    assert list(select_parameters(model)) == ["head.weight", "head.bias"]
    assert list(select_parameters(model, "*.weight")) == ["head.weight"]
    assert list(select_parameters(model, lambda name, p: True)) == ["head.weight", "head.bias"]


def test_a_tied_parameter_is_chosen_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(select_parameters(model)) == ["0.weight"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("head.weigth", "'head.weigth'; did you mean 'head.weight'"),
        ("zzz", f"'zzz'; the model has {', '.join(ALL)}"),
        (["head.weight", "tail.*"], r"'tail\.\*'"),
        ("body.0.weight", "'body.0.weight' does not require grad"),
        ([], "chooses no parameter"),
        (lambda name, p: False, "chooses no parameter"),
    ],
)
def test_a_choice_that_finds_nothing_is_named(params, message):
    model = network()
    if params == "body.0.weight":
        model.body.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        select_parameters(model, params)


# Modules and parameters themselves

PARTS = {
    "a module": (lambda m: m.head, ["head.weight", "head.bias"]),
    "a module that holds others": (lambda m: m.body, ALL[:4]),
    "a list of modules": (lambda m: [m.head, m.body[0]], ALL[:2] + ALL[4:]),
    "a module of the caller's own": (lambda m: nn.ModuleList([m.head]), ALL[4:]),
    "the model": (lambda m: m, ALL),
    "a parameter": (lambda m: m.head.bias, ["head.bias"]),
    "a list of parameters": (lambda m: list(m.head.parameters()), ["head.weight", "head.bias"]),
    "a generator of parameters": (lambda m: m.head.parameters(), ["head.weight", "head.bias"]),
    "a set of parameters": (lambda m: {m.head.bias}, ["head.bias"]),
    "a list of parameters in a module": (lambda m: nn.ParameterList([m.head.bias]), ["head.bias"]),
    "names and parameters": (lambda m: dict(m.head.named_parameters(prefix="head")), ALL[4:]),
    "a mix": (lambda m: [m.body[2], "head.w*", m.body[0].bias], [*ALL[1:4], "head.weight"]),
}


@pytest.mark.parametrize(("part", "chosen"), PARTS.values(), ids=PARTS)
def test_modules_and_parameters_choose_what_their_names_would(part, chosen):
    model = network()
    assert list(select_parameters(model, part(model))) == chosen


def test_of_a_module_what_is_frozen_is_left_out_and_a_frozen_parameter_is_refused():
    model = network()
    model.head.bias.requires_grad_(False)
    assert list(select_parameters(model, model.head)) == ["head.weight"]
    with pytest.raises(ValueError, match=r"parameter 'head\.bias' does not require grad"):
        select_parameters(model, [model.head.bias])
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear in params has no trainable parameter"):
        select_parameters(model, model.head)


def test_a_tied_parameter_is_chosen_by_every_module_and_every_name_that_has_it():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    for params in (model[1], model[1].weight, "1.weight", "1.*"):
        assert list(select_parameters(model, params)) == ["0.weight"]


def test_an_exact_name_is_no_pattern():
    model = nn.ParameterDict({"a[1]": torch.ones(1), "a1": torch.ones(1)})
    assert list(select_parameters(model, "a[1]")) == ["a[1]"]
    assert list(select_parameters(model, model["a[1]"])) == ["a[1]"]


def test_a_choice_of_things_is_made_once_so_that_it_outlives_them():
    """A generator is empty after one reading, and a parameter may be replaced."""
    model = network()
    choice = fixed(model, model.head.parameters())
    model.head.bias = nn.Parameter(torch.zeros(2))
    for _ in range(2):
        assert list(select_parameters(model, choice)) == ["head.weight", "head.bias"]


WHO_CHOOSES = {
    "fisher_information": lambda m, data, p: fisher_information(m, data, params=p).shapes,
    "MatrixFree": lambda m, data, p: MatrixFree(m, data, params=p).shapes,
    "gradients": lambda m, data, p: next(per_observation_gradients(m, data, params=p)),
    "EWC": lambda m, data, p: EWC(m, 1.0, params=p).consolidate(data).shapes,
    "another regularizer": lambda m, data, p: MAS(m, 1.0, params=p).consolidate(data).shapes,
}


@pytest.mark.parametrize("found", WHO_CHOOSES.values(), ids=WHO_CHOOSES)
def test_everyone_who_takes_a_choice_takes_modules_and_parameters(found):
    model, data = network(), (torch.ones(3, 2), torch.arange(3) % 2)
    for params in (model.head, model.head.parameters(), [model.head.weight, "head.bias"]):
        assert list(found(model, data, params)) == ["head.weight", "head.bias"]


STRANGERS = {
    "a parameter": (
        lambda m: nn.Parameter(torch.ones(3, 7)),
        r"a parameter of shape \(3, 7\) that is not one of this Sequential",
    ),
    "a parameter of a copy": (lambda m: network().head.bias, r"of shape \(2,\) that is not one"),
    "a module": (
        lambda m: [m.head, nn.Linear(3, 7)],
        r"a Linear that is no part of this Sequential: its parameter 'weight' of shape \(7, 3\)",
    ),
    "a module without parameters": (lambda m: m.body[1], "Tanh in params has no trainable"),
    "values": (lambda m: m.head.bias.data, "the values of 'head.bias'.* give its name"),
    "a buffer": (lambda m: m.norm.running_mean, "the buffer 'norm.running_mean'"),
    "a class": (lambda m: nn.Linear, "predicate of .* got the class Linear"),
    "a class among others": (lambda m: [nn.Linear], "got the class Linear"),
    "pairs": (lambda m: m.named_parameters(), "got tuple"),
    "a number": (lambda m: 2, "got int"),
    "numbers": (lambda m: [0, 1], "got int"),
    "the name of a module": (
        lambda m: "head",
        r"'head' is a module; its parameters are 'head\.\*'",
    ),
}


@pytest.mark.parametrize(("part", "message"), STRANGERS.values(), ids=STRANGERS)
def test_what_is_not_of_the_model_is_named(part, message):
    model = network()
    model.add_module("norm", nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=message):
        select_parameters(model, part(model))


@pytest.mark.parametrize("params", [None, "0.weight"])
def test_a_lazy_module_is_to_be_run_first(params):
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' of a lazy module .* run the model once"):
        select_parameters(model, params)
    model(torch.ones(1, 4))
    assert list(select_parameters(model, model[0])) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("model", [[nn.Linear(1, 1)], nn.Linear, None])
def test_what_is_no_module_is_named(model):
    with pytest.raises(
        ValueError, match=r"model must be a torch.nn.Module, got (list|the class|None)"
    ):
        select_parameters(model)


@pytest.mark.parametrize("model", [network().requires_grad_(False), nn.Tanh()])
def test_a_model_without_trainable_parameters_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no trainable parameter"):
        select_parameters(model)


# Again and again


def exchange(model):
    model.head = nn.Linear(3, 4)


def replace_a_parameter(model):
    model.body[0].weight = nn.Parameter(torch.zeros(3, 2))


def rename(model):
    model.top = model.head
    del model.head


def tie(model):
    model.body[2].bias = model.body[0].bias


CHANGES = {
    "another module": exchange,
    "another parameter": replace_a_parameter,
    "a module more": lambda model: model.add_module("last", nn.Linear(2, 2)),
    "a module less": lambda model: setattr(model, "head", None),
    "another name": rename,
    "frozen": lambda model: model.body[2].requires_grad_(False),
    "tied": tie,
}


@pytest.fixture
def asked(monkeypatch):
    """The choices that were really made."""
    made = []

    choose = _selecting._chosen

    def counted(model, params):
        made.append(params)
        return choose(model, params)

    monkeypatch.setattr(_selecting, "_chosen", counted)
    return made


@pytest.mark.parametrize("params", [None, ["body.*.bias", "body.0.*"]])
@pytest.mark.parametrize("change", CHANGES)
def test_a_choice_is_made_again_only_where_the_model_has_changed(change, params, asked):
    model, choose = network(), Chooser()
    model.itself = [model]  # which is no module of it
    first = choose(model, params)
    assert all(choose(model, params) is first for _ in range(3))
    assert len(asked) == 1
    CHANGES[change](model)
    for _ in range(2):
        found, expected = choose(model, params), select_parameters(model, params)
        assert list(found) == list(expected)
        assert all(found[name] is expected[name] for name in expected)
    assert len(asked) == 2


def test_a_choice_is_made_again_for_another_model_and_other_names(asked):
    choose, models = Chooser(), [network(), network()]
    for model in models:
        for params in (None, ["head.*"], ["head.bias"]):
            found, expected = choose(model, params), select_parameters(model, params)
            assert [id(p) for p in found.values()] == [id(p) for p in expected.values()]
    assert len(asked) == 6


def test_a_predicate_is_asked_every_time(asked):
    model, choose, limit = network(), Chooser(), [1]
    for limit[0] in (1, 2):
        found = choose(model, lambda name, p: p.dim() == limit[0])
        assert all(p.dim() == limit[0] for p in found.values())
    assert len(asked) == 2


def test_what_was_chosen_and_is_frozen_or_has_gone_is_left_out():
    model, choose = network(), Chooser()
    params = ["head.*", "body.0.bias"]
    choose(model, params)
    model.head.requires_grad_(False)
    assert list(choose(model, params)) == ["body.0.bias"]
    del model.body[0]
    assert list(choose(model, params)) == []
    model.head.requires_grad_(True)
    assert list(choose(model, params)) == ["head.weight", "head.bias"]


def test_a_module_stands_for_what_it_gets_later():
    model = network()
    params = fixed(model, model.body)
    model.body.append(nn.Linear(3, 3))
    assert list(select_parameters(model, params)) == [*ALL[:4], "body.3.weight", "body.3.bias"]


WRAPPED = {
    "in parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("params", ["head.*", "head.weight", ["body.0.bias", "h*.bias"]])
def test_names_with_and_without_those_of_wrappers_choose_the_same(wrap, params):
    model = network()
    wrapped = wrap(model)
    plain, full = select_parameters(model, params), select_parameters(wrapped, params)
    assert [id(p) for p in full.values()] == [id(p) for p in plain.values()]
    for given in (list(full), [name.replace("head.", "head.*") for name in full]):
        assert set(map(id, plain.values())) <= set(
            map(id, select_parameters(model, given).values())
        )
    choose = Chooser()
    assert list(choose(wrapped, params)) == list(plain)
    assert list(choose.every(wrapped)) == list(choose.every(model))


def test_every_parameter_is_known_by_each_of_its_names_and_found_again_only_after_a_change():
    model, choose = network(), Chooser()
    tie(model)
    model.head.requires_grad_(False)
    every = choose.every(model)
    assert list(every) == ALL
    assert every["body.2.bias"] is every["body.0.bias"]
    assert choose.every(model) is every
    model.head.requires_grad_(True)
    assert choose.every(model) is not every


@pytest.mark.parametrize("params", [None, ["body.*"]])
def test_what_stands_in_the_place_of_a_parameter_is_chosen_as_that_was(params):
    model, choose = network(), Chooser()
    model.head.requires_grad_(False)
    names = list(choose(model, params))
    own = {name: p.detach() for name, p in model.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(model, own):
        assert all(value is own[name] for name, value in choose(model, params).items())
        assert list(choose(model, params)) == names
    assert all(isinstance(p, nn.Parameter) for p in choose(model, params).values())


def test_modules_that_hold_each_other_end():
    model, choose = network(), Chooser()
    model.body.parent = model
    assert list(choose(model, None)) == ALL
