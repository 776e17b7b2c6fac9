"""Operations that put rows where their values say."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from ewc_lib.score.row_tracker import RowTracker, tensors

X = torch.arange(12.0).reshape(4, 3)
PLACES, MARKS, NUMBER = torch.tensor([2, 0, 1, 1]), torch.tensor([True, False, True, True]), X[0, 1]


class Watching(TorchFunctionMode):
    """Watch what becomes of the rows of some tensors, where others do not change."""

    def __init__(self, *constants):
        super().__init__()
        self.constants = list(constants)
        data = [t for t in (X, PLACES, MARKS, NUMBER) if all(t is not c for c in constants)]
        self.rows = RowTracker(len(X), data, lambda t: any(t is c for c in self.constants))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.rows.check(func, args, kwargs)
        result = func(*args, **kwargs)
        constant = all(any(t is c for c in self.constants) for t in tensors((args, kwargs)))
        (self.constants.extend if constant else self.rows.see)(tensors(result))
        return result


@torch.jit.script
def in_order(x: Tensor):
    return x[x[:, 0].argsort()]


def one_hot_order():
    rank = F.one_hot(X[:, 0].argsort(), 4).to(X)
    return rank @ X


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
    "a lookup in activations": lambda: F.embedding(PLACES, X),
    "a product over rows": one_hot_order,
    "a product over rows by letters": lambda: torch.einsum("nm,nd->md", X, X),
    "a narrow part by a value": lambda: X.narrow(0, PLACES[1], 1),
    "a script": lambda: in_order(X) + 1,
    "an operation below": lambda: torch.ops.aten.index.Tensor(X, [PLACES]) + 1,
    "the largest of all": lambda: X / X.amax(),
    "a sum over rows": lambda: X - X.mean(0),
    "the norm of all": lambda: X / X.norm(2),
    "the largest rows": lambda: X.topk(2, 0),
    "normalised columns": lambda: F.normalize(X, dim=0),
    "similar columns": lambda: F.cosine_similarity(X, X, 0),
    "columns by an axis": lambda: X.sort(axis=0),
    "named operands": lambda: torch.softmax(input=X, dim=0),
    "a function of gradients": lambda: X.clone().requires_grad_().register_hook(lambda g: g),
    "rows in order": lambda: X.sort(0).values,
    "an operation that nobody knows": lambda: torch.cdist(X, X),
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
    "a map": lambda: F.linear(X, torch.ones(2, 3)),
    "a product of batches": lambda: X.unsqueeze(1) @ X.unsqueeze(2),
    "a product of batches by letters": lambda: torch.einsum("nd,nd->n", X, X),
    "a mean of each row": lambda: X.mean(-1),
    "a norm of each row": lambda: X / X.norm(dim=1, keepdim=True),
    "normalised rows": lambda: F.normalize(X),
    "the norm of each row by place": lambda: X.norm(2, 1),
    "a shape from elsewhere": lambda: X[:1].expand_as(X).to(X),
    "the larger of two": lambda: torch.max(X, -X),
    "a hook of a counter": lambda: torch.autograd.graph.register_multi_grad_hook(
        [X.clone().requires_grad_()], print
    ),
    "rows side by side": lambda: torch.cat([X, X * 2], 1),
}


@pytest.mark.parametrize("operation", DECIDING.values(), ids=DECIDING)
def test_values_may_decide(operation):
    with Watching() as watching:
        operation()
    assert not watching.rows.in_place


@pytest.mark.parametrize("operation", SHAPED.values(), ids=SHAPED)
def test_each_row_stays_in_its_place(operation):
    with Watching() as watching:
        operation()
    assert watching.rows.in_place


@pytest.mark.parametrize("operation", [lambda: X[PLACES], lambda: bool(NUMBER > 0)])
def test_what_does_not_depend_on_the_data_decides_the_same_each_time(operation):
    with Watching(X, PLACES, NUMBER) as watching:
        operation()
    assert watching.rows.in_place


def test_each_observation_may_read_its_rows_of_a_table():
    with Watching(X) as watching:
        X[PLACES], F.embedding(PLACES, X)
    assert watching.rows.in_place


def test_one_place_for_all_observations_is_decided_by_values():
    with Watching(X) as watching:
        X[PLACES[0]]
    assert not watching.rows.in_place


def test_rows_may_not_be_written_to_a_constant():
    with Watching(X) as watching:
        Tensor.index_add(X, 0, PLACES, X)
    assert not watching.rows.in_place
