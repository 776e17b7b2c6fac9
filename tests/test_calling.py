"""Calling a network: what goes in, and what it would edit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ewc_lib._calling import Caller, forward
from tests.scenarios import same


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class TestForward:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])

    def test_a_tensor_is_passed_as_the_only_argument(self):
        assert same(forward(nn.Identity(), self.x), self.x)

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_a_tuple_or_list_is_passed_by_position(self, kind):
        model = Function(lambda a, b: a - b)
        assert same(forward(model, kind((self.x, self.y))), self.x - self.y)

    def test_a_dict_is_passed_by_keyword(self):
        model = Function(lambda *, a, b: a - b)
        assert same(forward(model, {"b": self.y, "a": self.x}), self.x - self.y)

    def test_logits_are_taken_out_of_the_output(self):
        model = Function(lambda a: SimpleNamespace(logits=a + 1, loss=None))
        assert same(forward(model, self.x), self.x + 1)

    def test_other_parameters_replace_the_models_own_for_this_call_only(self):
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone()
        weight = torch.tensor([[2.0, 3.0]])
        assert same(forward(model, self.x, {"weight": weight}), 8 + model.bias.reshape(1, 1))
        assert same(model.weight.detach(), before)

    def test_tied_weights_are_replaced_in_all_their_places(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        assert same(forward(model, self.x, {"0.weight": 3 * torch.eye(2)}), 9 * self.x)

    @pytest.mark.parametrize("output", [None, {"a": x}, [x], ("x", x)])
    def test_an_output_that_is_no_tensor_is_refused(self, output):
        with pytest.raises(TypeError, match=r"must return a tensor or have \.logits"):
            forward(Function(lambda a: output), self.x)


class Editing(nn.Module):
    """A model that edits its input, its buffer and an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.largest.copy_(torch.maximum(self.largest, x.max()))
        return x.clamp_(max=1)


def test_a_model_that_edits_gets_copies_and_another_gets_what_there_is():
    model, x = Editing(), torch.full((3, 2), 2.0)
    caller = Caller(model)
    with caller.prepared(x) as given:  # nothing is known before the first call
        before = caller.state(given)
        model(given)
        assert caller.state(given) != before
    assert x.min() == 2
    assert model.largest == 0
    assert model.calls == 0
    caller.learn(x, harmless=True)
    with caller.prepared(x[:2]) as given:
        assert given.data_ptr() == x.data_ptr()
    with caller.prepared(x[:, :1]) as given:  # another form
        assert given.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_exchanged_under_all_their_names_and_come_back(fails):
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "lstm": nn.LSTM(2, 2)})
    model["other"] = model["one"]
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    flat = [id(w) for w in model["lstm"]._flat_weights]
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = model

        def forward(self, x):
            if fails:
                raise KeyError
            return model["one"](x) + model["other"](x) + model["lstm"](x)[0]

    zeros = {f"models.{name}": value for name, value in zeros.items()}
    if fails:
        with pytest.raises(KeyError):
            forward(Both(), torch.ones(3, 2), zeros)
    else:
        assert not forward(Both(), torch.ones(3, 2), zeros).any()
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert flat == [id(w) for w in model["lstm"]._flat_weights]
