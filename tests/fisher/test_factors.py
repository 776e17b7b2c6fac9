"""Kronecker factors against their definition, and where they are exact."""

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.distributions import Gaussian
from ewc_lib.fisher import Dense, Diagonal, EigenKronecker, Kronecker
from tests.scenarios import (
    SCENARIOS,
    Addmm,
    N,
    Scenario,
    Twice,
    cut,
    estimate,
    oracle,
    relative_error,
)

T = 3


class Shared(nn.Module):
    """A layer used at every position of a sequence or image, then the mean."""

    def __init__(self, layer, channels_last=True):
        super().__init__()
        self.layer = layer
        self.dims = 1 if channels_last else tuple(range(2, 1 + layer.weight.dim() - 1))

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return h.mean(1) if self.dims == 1 else h.flatten(2).mean(2)


def case(model, *shape):
    torch.manual_seed(0)
    model = model().double()
    x = torch.randn(N, *shape, dtype=torch.float64)
    return Scenario(model, x, Gaussian(sigma=1.0), torch.zeros(N, model(x).shape[1]).double())


def windows(layer, x):
    """Inputs of a layer at each position, ``[T, I]``, by the obvious loop."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    unfolded = nn.functional.unfold(
        x.unsqueeze(0), layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    return unfolded[0].mT


def by_definition(model, layer, x, reduce):
    """Sum over observations, columns and positions, one at a time."""
    n_inputs = layer.weight.flatten(1).shape[1] + 1
    n_outputs = len(layer.weight)
    a_sum, b_sum = torch.zeros(n_inputs, n_inputs), torch.zeros(n_outputs, n_outputs)
    for one in x:
        kept = []
        handle = layer.register_forward_hook(lambda module, args, out: kept.append(out))
        output = model(one.unsqueeze(0))[0]
        handle.remove()
        a = windows(layer, one)
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        a_sum += a.mean(0).outer(a.mean(0)) if reduce else a.mT @ a / len(a)
        for value in output:
            (g,) = torch.autograd.grad(value, kept, retain_graph=True)
            g = g.reshape(-1, n_outputs) if isinstance(layer, nn.Linear) else g[0].flatten(1).mT
            b_sum += g.sum(0).outer(g.sum(0)) if reduce else g.mT @ g
    return a_sum / len(x), b_sum / len(x)


LAYERS = {
    "linear": (lambda: Shared(nn.Linear(3, 2)), (1, 3)),
    "sequence": (lambda: Shared(nn.Linear(3, 2)), (T, 3)),
    "image": (lambda: Shared(nn.Conv2d(2, 3, 2), False), (2, 4, 4)),
    "strided": (lambda: Shared(nn.Conv2d(2, 3, 3, stride=2, padding=1), False), (2, 5, 5)),
    "dilated": (lambda: Shared(nn.Conv2d(1, 2, 2, dilation=2), False), (1, 5, 5)),
}


@pytest.mark.parametrize("size", [1, 7, N])
@pytest.mark.parametrize("structure", ["kronecker", "kronecker-reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_the_sums_that_define_them(name, structure, size):
    model, shape = LAYERS[name]
    it = case(model, *shape)
    (block,) = estimate(it, size, structure=structure).blocks
    assert isinstance(block, Kronecker)
    torch.set_default_dtype(torch.float64)
    try:
        a, b = by_definition(it.model, it.model.layer, it.x, structure == "kronecker-reduce")
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(block.input_factor, a) < 1e-10
    assert relative_error(block.output_factor, b) < 1e-10


@pytest.mark.parametrize("structure", ["kronecker", "kronecker-reduce", "eigenkronecker"])
def test_one_observation_of_a_linear_layer_with_one_output_is_exact(structure):
    it = case(lambda: nn.Linear(4, 1), 4)
    it = it._replace(x=it.x[:1], y=it.y[:1])
    dense = estimate(it, structure="dense").to_dense()
    assert relative_error(estimate(it, structure=structure).to_dense(), dense) < 1e-10


class DeepLinear(nn.Module):
    """No activations: positions stay apart (expand), or are averaged first (reduce)."""

    def __init__(self, average):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.average = average

    def forward(self, x):
        h = self.second(self.first(x))
        return h.mean(1) if self.average else h


@pytest.mark.parametrize("average", [False, True])
def test_deep_linear_networks_are_exact_in_their_setting(average):
    """Eschenhagen et al. 2023: expand where every position has an output, reduce for a mean."""
    torch.manual_seed(0)
    model = DeepLinear(average).double()
    x = torch.randn(N, T, 3).double()
    y = torch.zeros(model(x).shape).double()
    structure = "kronecker-reduce" if average else "kronecker"
    found = fisher_information(model, (x, y), Gaussian(), structure=structure)
    for block in found.blocks:
        (name,) = block.shapes
        exact = fisher_information(model, (x, y), Gaussian(), structure="dense", params=[name])
        assert relative_error(block.to_dense(), exact.to_dense()) < 1e-10


def test_a_convolution_of_width_one_is_a_linear_layer_at_each_position():
    torch.manual_seed(0)
    linear = Shared(nn.Linear(3, 2)).double()
    convolution = Shared(nn.Conv1d(3, 2, 1), False).double()
    with torch.no_grad():
        convolution.layer.weight.copy_(linear.layer.weight.unsqueeze(2))
        convolution.layer.bias.copy_(linear.layer.bias)
    x = torch.randn(N, T, 3).double()
    y = torch.zeros(N, 2).double()
    for structure in ("kronecker", "kronecker-reduce", "eigenkronecker"):
        (a,) = fisher_information(linear, (x, y), Gaussian(), structure=structure).blocks
        (b,) = fisher_information(convolution, (x.mT, y), Gaussian(), structure=structure).blocks
        assert relative_error(a.to_dense(), b.to_dense()) < 1e-10


def test_a_transposed_weight_has_the_factors_of_its_transpose():
    torch.manual_seed(0)
    plain = Shared(nn.Linear(4, 3)).double()
    flat = Addmm().double()
    with torch.no_grad():
        flat.weight.copy_(plain.layer.weight.mT)
        flat.bias.copy_(plain.layer.bias)
    x, y = torch.randn(N, T, 4).double(), torch.zeros(N, dtype=torch.long)
    a = fisher_information(lambda_mean(plain), (x, y), structure="kronecker").blocks[0]
    b = fisher_information(flat, (x, y), structure="kronecker").blocks[0]
    assert b.transposed
    assert not a.transposed
    assert relative_error(b.input_factor, a.input_factor) < 1e-10
    assert relative_error(b.output_factor, a.output_factor) < 1e-10


def lambda_mean(shared):
    """Sum over positions, as ``Addmm`` does."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = shared.layer

        def forward(self, x):
            return torch.tanh(self.layer(x)).sum(1)

    return Summed()


def test_a_module_called_twice_has_the_positions_of_both_calls():
    torch.manual_seed(0)
    model = Twice().double()
    x, y = torch.randn(N, 4).double(), torch.zeros(N, dtype=torch.long)
    found = fisher_information(model, (x, y), structure="kronecker")
    block = next(b for b in found.blocks if "layer.weight" in b.shapes)
    h = torch.tanh(model.layer(x)).detach()
    one = torch.ones(N, 1).double()
    rows = torch.stack([torch.cat([x, one], 1), torch.cat([h, one], 1)], 1)
    expected = torch.einsum("nti,ntj->ij", rows, rows) / (2 * N)
    assert relative_error(block.input_factor, expected) < 1e-10


@pytest.mark.parametrize("name", ["attention", "cnn_with_norms", "embedding", "lstm"])
def test_what_is_no_matrix_keeps_its_whole_block_or_its_diagonal(name):
    whole = estimate(SCENARIOS[name](), structure="dense")
    found = estimate(SCENARIOS[name](), structure="kronecker")
    diagonal = whole.diagonal()
    kinds = {type(block) for block in found.blocks}
    assert Kronecker in kinds
    assert kinds & {Dense, Diagonal}
    for block in found.blocks:
        if isinstance(block, Kronecker):
            continue
        for parameter in block.shapes:
            torch.testing.assert_close(block.diagonal()[parameter], diagonal[parameter])


# Second moments in the eigenvectors of the factors


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("size", [1, 7, N])
@pytest.mark.parametrize(
    "name", ["mlp_categorical", "attention", "cnn_with_norms", "module_called_twice"]
)
def test_the_trace_of_ekfac_is_exact_and_it_is_never_further_off(name, size, kind):
    truth = oracle(name, kind)
    kfac = estimate(SCENARIOS[name](), size, kind=kind, structure="kronecker").to_dense()
    found = estimate(SCENARIOS[name](), size, kind=kind, structure="eigenkronecker")
    torch.testing.assert_close(found.trace(), truth.trace(), rtol=1e-10, atol=0.0)
    assert (found.to_dense() - truth).norm() <= (kfac - truth).norm() * (1 + 1e-12)
    assert any(isinstance(block, EigenKronecker) for block in found.blocks)


def test_ekfac_draws_the_same_numbers_in_both_passes():
    case = SCENARIOS["mlp_categorical"]()
    diagonal = estimate(case, 3, kind="sketch").trace()
    found = estimate(case, 3, kind="sketch", structure="eigenkronecker").trace()
    torch.testing.assert_close(found, diagonal, rtol=1e-10, atol=0.0)


def test_data_that_can_be_read_only_once_are_refused_by_ekfac():
    case = SCENARIOS["mlp_categorical"]()
    with pytest.raises(ValueError, match=r"data is empty|reads them twice"):
        fisher_information(case.model, iter(cut(case.x, case.y, 4)), structure="eigenkronecker")


class Unsteady(nn.Module):
    """A matrix in short sequences, something else in long ones."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3, bias=False)

    def forward(self, x):
        if x.shape[1] > 2:
            w, one = self.layer.weight, torch.ones_like(x[0, 0])
            return torch.tanh(torch.einsum("nti,oi,i->nto", x, w, one)).sum(1)
        return torch.tanh(self.layer(x)).sum(1)


def test_a_parameter_that_stops_being_a_matrix_is_refused_by_name():
    model, y = Unsteady(), torch.zeros(4, dtype=torch.long)
    data = [(torch.randn(4, t, 2), y) for t in (2, 5)]
    with pytest.raises(ValueError, match=r"'layer\.weight'"):
        fisher_information(model, data, structure="kronecker")
