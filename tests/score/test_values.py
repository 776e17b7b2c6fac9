"""Operations that put rows where their values say."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from ewc_lib.score.values import depend_on_values

X = torch.arange(12.0).reshape(4, 3)
PLACES, MARKS, NUMBER = torch.tensor([2, 0, 1, 1]), torch.tensor([True, False, True, True]), X[0, 1]


class Asking(TorchFunctionMode):
    """Ask of every operation whether values decide, where some tensors do not change."""

    def __init__(self, *constants):
        super().__init__()
        self.constants = {id(t) for t in constants}
        self.answers = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = depend_on_values(func, args, kwargs, lambda t: id(t) in self.constants)
        self.answers.append(answer)
        return func(*args, **kwargs)


DECIDING = {
    "a mask": lambda: X[MARKS],
    "places": lambda: X[PLACES],
    "places in a tuple": lambda: X[PLACES, :2],
    "writing to a mask": lambda: X.clone().__setitem__(MARKS, 0.0),
    "selected rows": lambda: X.index_select(0, PLACES),
    "added rows": lambda: X.index_add(0, PLACES, X),
    "gathered rows": lambda: X.gather(0, PLACES.unsqueeze(1)),
    "scattered rows": lambda: torch.zeros(4, 3).scatter(0, PLACES.unsqueeze(1), X),
    "repeated rows": lambda: X.repeat_interleave(PLACES, 0),
    "where a mask holds": lambda: torch.where(MARKS),
    "places of non-zeros": lambda: X.nonzero(),
    "a number": lambda: float(NUMBER),
    "a question": lambda: bool(NUMBER > 0),
    "an order by hand": lambda: sorted(PLACES),
    "a list": lambda: PLACES.tolist(),
    "an array": lambda: X.numpy(),
    "packed sequences": lambda: pack_padded_sequence(
        X.unsqueeze(2), PLACES.clamp(min=1), True, False
    ),
}
SHAPED = {
    "a slice": lambda: X[1:],
    "a column": lambda: X[:, 0],
    "another axis": lambda: X[None, ..., 1],
    "choices entry by entry": lambda: torch.where(X > 1, X, -X),
    "a filled mask": lambda: X.masked_fill(X > 1, 0.0),
    "the largest": lambda: X.topk(2, 1),
    "a sorted axis": lambda: X.sort(1),
    "repeated by a number": lambda: X.repeat_interleave(2, 0),
    "a table": lambda: torch.nn.functional.embedding(PLACES, X),
}


@pytest.mark.parametrize("operation", DECIDING.values(), ids=DECIDING)
def test_values_decide(operation):
    with Asking() as asking:
        operation()
    assert any(asking.answers)


@pytest.mark.parametrize("operation", SHAPED.values(), ids=SHAPED)
def test_shapes_alone_decide(operation):
    with Asking() as asking:
        operation()
    assert not any(asking.answers)


@pytest.mark.parametrize("operation", [lambda: X[PLACES], lambda: bool(NUMBER > 0)])
def test_what_does_not_depend_on_the_data_decides_the_same_each_time(operation):
    class Constant(Asking):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs)
            self.constants.add(id(result))
            self.kept = [*getattr(self, "kept", []), result]
            return result

    with Constant(X, PLACES, NUMBER) as asking:
        operation()
    assert not any(asking.answers)


def test_each_observation_may_read_its_rows_of_a_table():
    with Asking(X) as asking:
        X[PLACES], X.index_select(0, PLACES)
    assert not any(asking.answers)


def test_one_place_for_all_observations_is_decided_by_values():
    with Asking(X) as asking:
        X[PLACES[0]]
    assert asking.answers[-1]


def test_rows_may_not_be_written_to_a_constant():
    with Asking(X) as asking:
        Tensor.index_add(X, 0, PLACES, X)
    assert any(asking.answers)
