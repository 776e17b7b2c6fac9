import torch
from torch import nn

from ewc_lib._names import plain_name, plain_names


def test_the_names_of_a_wrapped_model_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    own = [name for name, _ in model.named_parameters()]
    wrapped = nn.DataParallel(torch.compile(model))  # type: ignore[type-var]
    assert [plain_name(name) for name, _ in wrapped.named_parameters()] == own


def test_the_base_layer_of_an_adapter_has_the_name_of_the_layer() -> None:
    assert plain_name("base_model.model.body.0.base_layer.weight") == "body.0.weight"


def test_the_copy_of_a_module_that_an_adapter_trains_has_the_name_of_the_module() -> None:
    names = [
        f"base_model.model.{n}.weight" for n in ("head.modules_to_save.a", "head.original_module")
    ]
    assert [plain_name(name) for name in names] == ["head.weight", "head.original_module.weight"]


def test_what_only_contains_the_name_of_a_wrapper_keeps_it() -> None:
    assert plain_name("module_list.0.base_layers.weight") == "module_list.0.base_layers.weight"


def test_two_parameters_never_get_one_name() -> None:
    names = ["module.weight", "weight", "module.bias"]
    assert list(plain_names(names).values()) == ["module.weight", "weight", "bias"]


def test_a_model_of_peft_may_be_in_a_wrapper_itself() -> None:
    name = "module._orig_mod.base_model.model.body.0.base_layer.weight"
    assert plain_name(name) == "body.0.weight"
