"""Recurrent layers and cells in code compute what PyTorch's operations do, by uses one can see."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

from ewc_lib.score.operations import inside
from ewc_lib.score.recurrent import RECURRENT
from tests.scenarios import PROPERTY

INPUTS, HIDDEN, PROJECTED = 2, 4, 3

LAYERS = {
    "lstm": nn.LSTM,
    "lstm with projections": lambda *sizes, **options: nn.LSTM(
        *sizes, proj_size=PROJECTED, **options
    ),
    "gru": nn.GRU,
    "rnn of tanh": nn.RNN,
    "rnn of relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn of tanh": nn.RNNCell,
    "rnn of relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}

each_layer = pytest.mark.parametrize("kind", LAYERS)
each_cell = pytest.mark.parametrize("kind", CELLS)


class Inside(TorchFunctionMode):
    """Run recurrent operations as code, and note them and all linear maps with their inputs."""

    def __init__(self):
        super().__init__()
        self.operations, self.maps = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RECURRENT:
            self.operations.append(func)
            with self:
                return inside(func)(*args, **(kwargs or {}))
        if func is F.linear:
            self.maps.append((args[1], args[0].shape))
        return func(*args, **(kwargs or {}))


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def seeded(make, *sizes, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*sizes, dtype=torch.float64, **options)


def packed(x, lengths, batch_first=True):
    return pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False
    )


def tensors(output):
    """Return all tensors of the output of a layer or cell, packed or not."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        return [output.data, output.batch_sizes]
    return [tensor for part in output for tensor in tensors(part)]


def gradients(outputs, wanted):
    real = [tensor for tensor in outputs if tensor.is_floating_point()]
    total = sum((t * normal(*t.shape, seed=i).detach()).sum() for i, t in enumerate(real))
    return torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)


def assert_same(module, *inputs, wanted):
    """Compare outputs, and gradients of the parameters and of what is wanted."""
    expected = tensors(module(*inputs))
    with Inside() as seen:
        found = tensors(module(*inputs))
    assert len(seen.operations) == 1
    wanted = [*wanted, *module.parameters()]
    pairs = zip(
        [*found, *gradients(found, wanted)], [*expected, *gradients(expected, wanted)], strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    return seen


def first_states(layer, n):
    """Return initial states for a layer."""
    levels = layer.num_layers * (1 + layer.bidirectional)
    output = normal(levels, n, layer.proj_size or HIDDEN, seed=1)
    if not isinstance(layer, nn.LSTM):
        return output, [output]
    memory = normal(levels, n, HIDDEN, seed=2)
    return (output, memory), [output, memory]


OPTIONS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
    }
)


@each_layer
@PROPERTY
@given(OPTIONS, st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_layers_compute_what_torch_does(kind, options, given_states, n, length):
    layer = seeded(LAYERS[kind], INPUTS, HIDDEN, **options)
    x = normal(*((n, length) if options["batch_first"] else (length, n)), INPUTS)
    hx, leaves = first_states(layer, n) if given_states else (None, [])
    assert_same(layer, x, hx, wanted=[x, *leaves])


@each_layer
@PROPERTY
@given(OPTIONS, st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_layers_compute_what_torch_does_with_packed_sequences(kind, options, given_states, lengths):
    layer = seeded(LAYERS[kind], INPUTS, HIDDEN, **options)
    n, longest = len(lengths), max(lengths)
    first = options["batch_first"]
    x = normal(*((n, longest) if first else (longest, n)), INPUTS)
    hx, leaves = first_states(layer, n) if given_states else (None, [])
    assert_same(layer, packed(x, lengths, first), hx, wanted=[x, *leaves])


@each_layer
@pytest.mark.parametrize("given_states", [False, True])
def test_a_sequence_may_have_no_axis_of_observations(kind, given_states):
    layer = seeded(LAYERS[kind], INPUTS, HIDDEN, num_layers=2, bidirectional=True)
    x, hx, leaves = normal(3, INPUTS), None, []
    if given_states:
        hx, leaves = first_states(layer, 1)
        hx = tuple(h.squeeze(1) for h in hx) if isinstance(hx, tuple) else hx.squeeze(1)
    assert_same(layer, x, hx, wanted=[x, *leaves])


@each_cell
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [None, 1, 3])
@pytest.mark.parametrize("given_state", [False, True])
def test_cells_compute_what_torch_does(kind, bias, n, given_state):
    cell, batch = seeded(CELLS[kind], INPUTS, HIDDEN, bias=bias), (n,) if n else ()
    x, state, leaves = normal(*batch, INPUTS), None, []
    if given_state:
        leaves = [normal(*batch, HIDDEN, seed=i) for i in range(1 + (kind == "lstm"))]
        state = tuple(leaves) if kind == "lstm" else leaves[0]
    assert_same(cell, x, state, wanted=[x, *leaves])


@each_layer
@pytest.mark.parametrize("pack", [False, True])
def test_dropout_acts_between_layers_in_training_only(kind, pack):
    """All is dropped, so that nothing is left to chance."""
    layer = seeded(LAYERS[kind], INPUTS, HIDDEN, num_layers=3, dropout=1.0, batch_first=True)
    x = normal(3, 4, INPUTS)
    for training in (True, False):
        layer.train(training)
        assert_same(layer, packed(x, [4, 1, 2]) if pack else x, wanted=[x])


PADDED = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
PACKED = ("data", "batch_sizes", *PADDED[1:])


@pytest.mark.parametrize("by_position", range(10))
def test_arguments_may_be_given_by_name(by_position):
    layer = seeded(nn.GRU, INPUTS, HIDDEN)
    x, hx = normal(3, 2, INPUTS), normal(1, 2, HIDDEN)
    own = hx, layer._flat_weights, True, 1, 0.0, False, False
    rows = torch.tensor([2, 2, 2])
    for names, values in (
        ((*PADDED, "batch_first"), (x, *own, False)),
        (PACKED, (x.flatten(0, 1), rows, *own)),
    ):
        others = dict(list(zip(names, values, strict=True))[by_position:])
        expected = torch.gru(*values[:by_position], **others)
        found = inside(torch.gru)(*values[:by_position], **others)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_are_mapped_at_once_and_states_one_after_the_other(kind, batch_first):
    layer = seeded(
        LAYERS[kind], INPUTS, HIDDEN, num_layers=2, bidirectional=True, batch_first=batch_first
    )
    x = normal(*((3, 5) if batch_first else (5, 3)), INPUTS)
    maps = assert_same(layer, x, wanted=[x]).maps
    uses = Counter(id(weight) for weight, _ in maps)
    expected = {"weight_ih": 1, "weight_hh": 5, "weight_hr": 5}
    for name, weight in layer.named_parameters():
        assert uses[id(weight)] == expected.get(name.partition("_l")[0], 0)
    assert all(shape[:-1] in (x.shape[:-1], (3,)) for _, shape in maps)


@each_layer
def test_each_position_of_a_packed_sequence_has_as_many_rows_as_sequences_reach_it(kind):
    layer = seeded(LAYERS[kind], INPUTS, HIDDEN, bidirectional=True, batch_first=True)
    x = normal(3, 4, INPUTS)
    maps = assert_same(layer, packed(x, [1, 4, 3]), wanted=[x]).maps
    for direction, rows in (("", [3, 2, 2, 1]), ("_reverse", [1, 2, 2, 3])):
        state, inputs = (getattr(layer, f"weight_{k}_l0{direction}") for k in ("hh", "ih"))
        assert [shape[0] for weight, shape in maps if weight is state] == rows
        assert [shape[0] for weight, shape in maps if weight is inputs] == [sum(rows)]
