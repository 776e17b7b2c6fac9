"""Kronecker factors against their definition: observation by observation, position by position."""

import copy
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_lib import fisher_information
from ewc_lib.fisher.structures import Dense, Diagonal, EigenKronecker, Kronecker
from ewc_lib.fisher.sums import kronecker as factors
from ewc_lib.likelihood.outputs import Gaussian, output_distribution
from ewc_lib.score.by_vmap import VmapGradients
from tests.budgets import set_budget
from tests.scenarios import (
    BATCH_SIZES,
    CLASSES,
    SCENARIOS,
    N,
    Scenario,
    cut,
    definition,
    estimate,
    oracle,
    relative_error,
    same,
)
from tests.zoo import read, stir

KRONECKER = ["kronecker", "kronecker-reduce", "eigenkronecker"]
DETERMINISTIC = ["exact", "empirical"]
RANDOM = ["sketch", "sampled"]
each_kind = pytest.mark.parametrize("kind", DETERMINISTIC)


def close(found, expected, tolerance=1e-10):
    assert relative_error(found, expected) < tolerance


def seeded(make):
    """Make a scenario in double precision, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, likelihood, y = make()
    y = y.double() if y.is_floating_point() else y
    return Scenario(model.double(), x.double(), likelihood, y)


def block_of(found, name):
    """Return the block that holds a parameter."""
    return next(block for block in found.blocks if name in block.shapes)


def part_of(matrix, shapes, names):
    """Return the rows and columns of some parameters."""
    numbers = torch.arange(len(matrix)).split([shape.numel() for shape in shapes.values()])
    at = torch.cat([dict(zip(shapes, numbers, strict=True))[name] for name in names])
    return matrix[at[:, None], at]


# The definition


class Case(NamedTuple):
    """A layer in a model, and how its inputs and outputs are read by hand.

    Attributes
    ----------
    make
        Returns the scenario.
    layer
        Name of the module that holds the weight.
    weight, bias
        Names of the parameters of the block.
    inputs, outputs
        Turn the input and output of one call with one observation into rows ``[T, I]``,
        ``[T, O]``, those of all groups side by side.
    groups
        Number of groups.
    """

    make: Callable[[], Scenario]
    layer: str
    weight: str
    bias: str | None
    inputs: Callable[[nn.Module, Tensor], Tensor]
    outputs: Callable[[nn.Module, Tensor], Tensor]
    groups: int = 1


def last_axis(_, x):
    return x.reshape(-1, x.shape[-1])


def windows(layer, x):
    """Cut all windows of one padded image by hand."""
    (image,) = F.pad(x, [size for size in reversed(layer.padding) for _ in range(2)])
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    starts = [
        range(0, size - r + 1, step)
        for size, r, step in zip(image.shape[1:], reach, layer.stride, strict=True)
    ]
    return torch.stack(
        [
            image[
                (
                    slice(None),
                    *(
                        slice(s, s + r, d)
                        for s, r, d in zip(start, reach, layer.dilation, strict=True)
                    ),
                )
            ].reshape(-1)
            for start in product(*starts)
        ]
    )


def channels(_, y):
    return y[0].flatten(1).mT


def reached(layer, y):
    """Cut the window of outputs that each position of one input reaches, entry by entry."""
    (image,) = y
    steps = list(zip(layer.stride, layer.dilation, layer.padding, strict=True))
    counts = [
        (size + 2 * pad - d * (k - 1) - 1 - extra) // step + 1
        for size, k, extra, (step, d, pad) in zip(
            image.shape[1:], layer.kernel_size, layer.output_padding, steps, strict=True
        )
    ]
    windows = []
    for start in product(*map(range, counts)):
        window = image.new_zeros(len(image), *layer.kernel_size)
        for entry in product(*map(range, layer.kernel_size)):
            at = [
                t * step + k * d - pad
                for t, k, (step, d, pad) in zip(start, entry, steps, strict=True)
            ]
            if all(0 <= t < size for t, size in zip(at, image.shape[1:], strict=True)):
                window[(slice(None), *entry)] = image[(slice(None), *at)]
        windows.append(window.reshape(-1))
    return torch.stack(windows)


def definition_of_factors(case, kind, reduce):
    """Return B and A of each group, one observation, position, output and class after another."""
    pairs = [_factors_of_group(case, kind, reduce, group) for group in range(case.groups)]
    return pairs[0] if case.groups == 1 else tuple(map(torch.stack, zip(*pairs, strict=True)))


def _factors_of_group(case, kind, reduce, group):
    model, x, likelihood, y = case.make()
    layer = model.get_submodule(case.layer) if case.layer else model
    distribution, model = output_distribution(likelihood), model.eval()
    A = B = 0.0
    for n in range(len(y)):
        calls = []
        hook = layer.register_forward_hook(lambda _, args, out, c=calls: c.append((args[0], out)))
        f = model(x[n : n + 1])
        hook.remove()
        a = torch.cat([case.inputs(layer, given) for given, _ in calls]).detach()
        a = a.chunk(case.groups, -1)[group]
        if case.bias:
            a = torch.cat([a, torch.ones(len(a), 1)], 1)
        J = torch.stack([_rows_of_gradient(case, layer, entry, calls) for entry in f.reshape(-1)])
        J = J.chunk(case.groups, -1)[group]
        log_prob = lambda out, n=n: distribution.log_prob(out, y[n : n + 1]).sum()  # noqa: E731
        if kind == "exact":
            H = -torch.autograd.functional.hessian(log_prob, f.detach()).reshape(len(J), -1)
        else:
            score = torch.autograd.functional.jacobian(log_prob, f.detach()).reshape(-1)
            H = score.outer(score)
        if reduce:
            a, J = a.mean(0, keepdim=True), J.sum(1, keepdim=True)
        A = A + sum(row.outer(row) for row in a) / len(a) / len(y)
        B = B + sum(J[:, t].mT @ H @ J[:, t] for t in range(len(a))) / len(y)
    return B, A


def _rows_of_gradient(case, layer, entry, calls):
    gradients = torch.autograd.grad(entry, [out for _, out in calls], retain_graph=True)
    return torch.cat([case.outputs(layer, g) for g in gradients])


CASES: dict[str, Case] = {}


LINEAR, CONVOLUTION, TRANSPOSED = (last_axis, last_axis), (windows, channels), (channels, reached)


def layer(
    name,
    make,
    *shape,
    weight="body.weight",
    bias="body.bias",
    on="body",
    reading=LINEAR,
    groups=1,
):
    def scenario():
        return seeded(lambda: read(stir(make()), torch.randn(N, *shape)))

    CASES[name] = Case(scenario, on, weight, bias, *reading, groups)


def convolution(name, make, *shape, **options):
    layer(name, make, *shape, reading=CONVOLUTION, groups=make().groups, **options)


def transposed(name, make, *shape, bias=None, **options):
    layer(name, make, *shape, bias=bias, reading=TRANSPOSED, groups=make().groups, **options)


class Row(nn.Module):
    """Addition of a bias after a product, as functional code writes it."""

    def __init__(self):
        super().__init__()
        self.product = Product()
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.product(x) + self.bias


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return x @ self.weight


class Addmm(nn.Module):
    """A weight with one row for each input, as in older language models."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, 4), self.weight)
        return flat.reshape(*x.shape[:-1], 5)


class FromLeft(nn.Module):
    """A matrix that mixes the rows of its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return self.weight @ x


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def huggingface():
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(5, 4)


def frozen_bias():
    linear = nn.Linear(4, 5)
    linear.bias.requires_grad_(False)
    return linear


layer("linear", lambda: nn.Linear(4, 5), 4)
layer("linear_without_bias", lambda: nn.Linear(4, 5, bias=False), 4, bias=None)
layer("linear_with_a_frozen_bias", frozen_bias, 4, bias=None)
layer("linear_on_sequences", lambda: nn.Linear(4, 5), 3, 4)
layer("linear_on_as_many_positions_as_observations", lambda: nn.Linear(4, 5), N, 4)
layer("linear_on_planes", lambda: nn.Linear(4, 5), 3, 2, 4)
layer("addmm", Addmm, 3, 4)
layer("transformers_conv1d", huggingface, 3, 4)
layer("bias_added_later", Row, 3, 4, weight="body.product.weight", bias=None, on="body.product")
convolution("conv1d", lambda: nn.Conv1d(2, 3, 3), 2, 6)
convolution("conv1d_dilated", lambda: nn.Conv1d(2, 3, 3, dilation=2, stride=2), 2, 8)
convolution("conv2d", lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), 2, 5, 4)
convolution("conv2d_without_bias", lambda: nn.Conv2d(2, 3, 2, bias=False), 2, 3, 3, bias=None)
convolution("conv3d", lambda: nn.Conv3d(1, 2, 2, padding=1), 1, 2, 1, 2)
convolution("conv1d_grouped", lambda: nn.Conv1d(4, 6, 2, groups=2), 4, 5)
convolution(
    "conv2d_grouped",
    lambda: nn.Conv2d(4, 2, (3, 2), groups=2, stride=(1, 2), padding=1, dilation=(2, 1)),
    *(4, 4, 4),
)
convolution("conv2d_depthwise", lambda: nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3)
convolution(
    "conv1d_depthwise_on_as_many_channels_as_observations",
    lambda: nn.Conv1d(N, N, 2, groups=N, bias=False),
    *(N, N),
    bias=None,
)
transposed("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3), 2, 4)
transposed("conv_transpose1d_without_bias", lambda: nn.ConvTranspose1d(2, 3, 2, bias=False), 2, 1)
transposed(
    "conv_transpose1d_grouped",
    lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, padding=1, output_padding=1),
    *(4, 3),
)
transposed(
    "conv_transpose1d_dilated",
    lambda: nn.ConvTranspose1d(2, 2, 2, dilation=3, stride=2, output_padding=2),
    *(2, 3),
)
transposed(
    "conv_transpose2d",
    lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(2, 1), padding=(0, 1)),
    *(2, 2, 3),
)
transposed("conv_transpose2d_depthwise", lambda: nn.ConvTranspose2d(3, 3, 2, groups=3), 3, 2, 2)
transposed("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), 2, 1, 2, 1)
transposed(
    "conv_transpose1d_pointwise", lambda: nn.ConvTranspose1d(4, 5, 1), 4, 3, bias="body.bias"
)
transposed(
    "conv_transpose2d_pointwise_grouped",
    lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
    *(4, 2, 2),
    bias="body.bias",
)
transposed(
    "conv_transpose1d_pointwise_with_gaps", lambda: nn.ConvTranspose1d(4, 5, 1, stride=2), 4, 3
)
for on_sequences in ("", "_on_sequences"):
    layer(
        f"twice{on_sequences}",
        lambda: Twice(nn.Linear(4, 4)),
        *((3, 4) if on_sequences else (4,)),
        weight="body.layer.weight",
        bias="body.layer.bias",
        on="body.layer",
    )
layer("from_the_left", FromLeft, 4, 3, bias=None)
CASES["from_the_left"] = CASES["from_the_left"]._replace(
    inputs=lambda _, x: x[0].mT, outputs=lambda _, y: y[0].mT
)
layer(
    "grouped_convolution_twice",
    lambda: Twice(nn.Conv1d(4, 4, 3, groups=2, padding=1)),
    *(4, 3),
    weight="body.layer.weight",
    bias="body.layer.bias",
    on="body.layer",
    reading=CONVOLUTION,
    groups=2,
)
CASES["network"] = Case(SCENARIOS["mlp_poisson"], "0", "0.weight", "0.bias", *LINEAR)

each_case = pytest.mark.parametrize("name", CASES)
GROUPED = [name for name, case in CASES.items() if case.groups > 1]
BY_WINDOWS = [name for name in CASES if name.startswith("conv_transpose") or name in GROUPED]


@each_kind
@pytest.mark.parametrize("structure", ["kronecker", "kronecker-reduce"])
@each_case
def test_factors_are_those_of_the_definition_at_every_batch_size(name, structure, kind):
    case = CASES[name]
    B, A = definition_of_factors(case, kind, reduce=structure == "kronecker-reduce")
    for size in (4, *BATCH_SIZES):
        found = block_of(estimate(case.make(), size, kind=kind, structure=structure), case.weight)
        assert isinstance(found, Kronecker)
        assert list(found.shapes) == [case.weight, *([case.bias] if case.bias else [])]
        close(found.output_factor, B)
        close(found.input_factor, A)


def test_both_ways_to_share_weights_are_one_where_there_is_one_position_and_else_two():
    for name, shared in (("linear", False), ("linear_on_sequences", True), ("twice", True)):
        case = CASES[name].make()
        expand, reduce = (estimate(case, structure=s).to_dense() for s in KRONECKER[:2])
        assert (relative_error(expand, reduce) > 0.01) == shared


def test_a_transposed_weight_has_the_factors_of_the_weight():
    case = CASES["addmm"].make()
    linear = nn.Linear(4, 5, dtype=torch.float64)
    linear.weight.data, linear.bias.data = case.model.body.weight.data.mT, case.model.body.bias.data
    other = case._replace(model=copy.deepcopy(case.model))
    other.model.body = linear
    for structure in KRONECKER:
        found, expected = (estimate(c, structure=structure) for c in (case, other))
        assert found.blocks[0].transposed
        assert not expected.blocks[0].transposed
        close(found.diagonal()["body.weight"].mT, expected.diagonal()["body.weight"])
        close(found.diagonal()["body.bias"], expected.diagonal()["body.bias"])


class ByHand(nn.Module):
    """The network of the scenario, with a linear map for each weight of its recurrent layer."""

    def __init__(self, model):
        super().__init__()
        self.of_input, self.of_state = nn.Linear(2, 8).double(), nn.Linear(2, 8).double()
        for own, kind in ((self.of_input, "ih"), (self.of_state, "hh")):
            own.weight.data = getattr(model.cell, f"weight_{kind}_l0").data
            own.bias.data = getattr(model.cell, f"bias_{kind}_l0").data
        self.head = model.head

    def forward(self, x):
        output = memory = x.new_zeros(len(x), 2)
        for at in range(x.shape[1]):
            gates = (self.of_input(x[:, at]) + self.of_state(output)).chunk(4, 1)
            enter, keep, leave = (gates[i].sigmoid() for i in (0, 1, 3))
            memory = keep * memory + enter * gates[2].tanh()
            output = leave * memory.tanh()
        return self.head(output)


@each_kind
@pytest.mark.parametrize("structure", KRONECKER)
def test_weights_of_a_recurrent_layer_are_matrices_that_are_used_at_every_position(structure, kind):
    case = SCENARIOS["lstm"]()
    by_hand = case._replace(model=ByHand(case.model))
    for size in (3, N):
        found = estimate(case, size, kind=kind, structure=structure)
        expected = estimate(by_hand, size, kind=kind, structure=structure)
        for block, other in zip(found.blocks, expected.blocks, strict=True):
            close(block.to_dense(), other.to_dense())


class Pointwise(nn.Module):
    """A linear map of every position, as a convolution of width one."""

    def __init__(self, linear):
        super().__init__()
        self.layer = nn.Conv1d(4, 5, 1, dtype=torch.float64)
        self.layer.weight.data = linear.weight.detach().unsqueeze(-1)
        self.layer.bias.data = linear.bias.detach()

    def forward(self, x):
        return self.layer(x.mT).mT


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_convolution_of_width_one_is_the_linear_map_of_each_position(structure):
    case = CASES["linear_on_sequences"].make()
    other = case._replace(model=copy.deepcopy(case.model))
    other.model.body = Pointwise(case.model.body)
    found, expected = (estimate(c, structure=structure) for c in (other, case))
    close(found.to_dense(), expected.to_dense())


def upsampled(linear):
    """Return a transposed convolution whose windows, side by side, hold what a linear map gives."""
    layer = nn.ConvTranspose1d(4, 2, 3, stride=3, bias=False, dtype=torch.float64)
    layer.weight.data = linear.weight.detach().mT.reshape(layer.weight.shape)
    return layer


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_transposed_convolution_is_a_linear_map_to_the_window_of_each_position(structure):
    case = seeded(
        lambda: Scenario(
            nn.Linear(4, 6, bias=False), torch.randn(N, 5, 4), Gaussian(0.5), torch.zeros(N, 5, 6)
        )
    )
    other = case._replace(model=upsampled(case.model), x=case.x.mT, y=torch.zeros(N, 2, 15))
    assert torch.allclose(other.model(other.x)[:, 0, :3], case.model(case.x)[:, 0, :3])
    found, expected = (estimate(c, structure=structure).diagonal() for c in (other, case))
    close(found["weight"].flatten(1), expected["weight"].mT)


class Split(nn.Module):
    """The groups of a convolution as convolutions of their own."""

    def __init__(self, layer, groups):
        super().__init__()
        kind, arguments = type(layer), (layer.kernel_size, layer.stride, layer.padding)
        sizes = layer.in_channels // groups, layer.out_channels // groups
        self.parts = nn.ModuleList(kind(*sizes, *arguments).double() for _ in range(groups))
        for part, weight, bias in zip(
            self.parts, layer.weight.chunk(groups), layer.bias.chunk(groups), strict=True
        ):
            part.weight.data, part.bias.data = weight.detach(), bias.detach()

    def forward(self, x):
        parts = zip(self.parts, x.chunk(len(self.parts), 1), strict=True)
        return torch.cat([part(own) for part, own in parts], 1)


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 2, groups=2),
        lambda: nn.Conv2d(3, 3, 2, groups=3, padding=1),
        lambda: nn.ConvTranspose1d(4, 6, 2, groups=2, stride=2),
        lambda: nn.ConvTranspose2d(3, 3, 2, groups=3, padding=1),
    ],
    ids=["grouped", "depthwise", "transposed and grouped", "transposed and depthwise"],
)
def test_each_group_has_the_block_of_a_convolution_of_its_own(make, structure):
    grouped = make()
    shape = (grouped.in_channels, *[3] * len(grouped.kernel_size))
    case = seeded(lambda: read(grouped, torch.randn(N, *shape)))
    other = case._replace(model=copy.deepcopy(case.model))
    other.model.body = Split(case.model.body, grouped.groups)
    block = block_of(estimate(case, structure=structure), "body.weight")
    found = estimate(other, structure=structure)
    together = block.to_dense()
    for group in range(grouped.groups):
        names = [f"body.parts.{group}.{name.removeprefix('body.')}" for name in block.shapes]
        own = block_of(found, names[0])
        assert list(own.shapes) == names
        at = torch.arange(len(together))[group_of(block, grouped.groups) == group]
        close(together[at[:, None], at], own.to_dense())
        together[at[:, None], at] = 0
    assert not together.any()


def group_of(block, groups):
    """Return the number of the group of every entry of the parameters of a block."""
    numbers = [
        torch.arange(shape[0]).div(shape[0] // groups, rounding_mode="floor")
        for shape in block.shapes.values()
    ]
    counts = [shape[1:].numel() for shape in block.shapes.values()]
    return torch.cat([n.repeat_interleave(c) for n, c in zip(numbers, counts, strict=True)])


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("name", ["conv2d", "conv2d_grouped", "conv_transpose2d"])
def test_inputs_are_read_in_pieces_of_bounded_size(structure, name, monkeypatch):
    case = CASES[name].make()
    expected = estimate(case, structure=structure).to_dense()
    set_budget(monkeypatch, rows=1)
    close(estimate(case, structure=structure).to_dense(), expected)


# Where the approximation is exact


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "poisson", Gaussian(0.5)])
def test_one_linear_layer_and_one_observation_leave_nothing_to_approximate(likelihood, structure):
    case = seeded(
        lambda: Scenario(nn.Linear(4, 3), torch.randn(1, 4), likelihood, torch.zeros(1, 3))
    )
    if likelihood == "categorical":
        case = case._replace(y=torch.zeros(1, dtype=torch.long))
    close(estimate(case, structure=structure).to_dense(), definition(case, "exact"))


ONE_LABEL = "categorical", torch.zeros(1, dtype=torch.long)
ONE_POSITION = {
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 3), ["weight", "bias"]),
    "depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 2, 2), ["weight", "bias"]),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3, padding=1), (2, 1), ["weight"]),
    "transposed and pointwise": (lambda: nn.ConvTranspose1d(2, 3, 1), (2, 1), ["weight", "bias"]),
    "transposed to a plane": (lambda: nn.ConvTranspose2d(2, 3, (2, 3)), (2, 1, 1), ["weight"]),
    "transposed and grouped": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), (4, 1), ["weight"]),
    "transposed and depthwise": (lambda: nn.ConvTranspose1d(3, 3, 2, groups=3), (3, 1), ["weight"]),
}


@each_kind
@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize(("make", "shape", "names"), ONE_POSITION.values(), ids=ONE_POSITION)
def test_one_position_and_one_observation_leave_nothing_to_approximate_in_a_group(
    make, shape, names, structure, kind
):
    case = seeded(
        lambda: Scenario(nn.Sequential(make(), nn.Flatten()), torch.randn(1, *shape), *ONE_LABEL)
    )
    found, expected = estimate(case, kind=kind, structure=structure), definition(case, kind)
    assert expected.any()
    block, groups = found.blocks[0], group_of(found.blocks[0], case.model[0].groups)
    assert [name.removeprefix("0.") for name in block.shapes] == names
    part = part_of(expected, found.shapes, block.shapes)
    close(block.to_dense(), part * (groups[:, None] == groups))
    for alone in found.blocks[1:]:
        assert isinstance(alone, Dense)
        close(alone.to_dense(), part_of(expected, found.shapes, alone.shapes))


def deep_linear(mean):
    """Linear layers that share weights over positions, with or without a mean over these."""

    class Network(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y.mean(1) if mean else y

    def make():
        layers = nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)
        y = torch.randn(N, 2) if mean else torch.randn(N, 3, 2)
        return Scenario(Network(*layers), torch.randn(N, 3, 3), Gaussian(0.5), y)

    return seeded(make)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize(
    ("mean", "structure"),
    [(False, "kronecker"), (True, "kronecker-reduce")],
    ids=["expand", "reduce"],
)
def test_blocks_of_deep_linear_networks_are_exact_in_the_setting_of_their_kind(
    mean, structure, size
):
    """Eschenhagen et al. 2023: expand for a loss at each position, reduce for one on a mean."""
    case = deep_linear(mean)
    expected = definition(case, "exact")
    found = estimate(case, size, structure=structure)
    assert [type(block) for block in found.blocks] == [Kronecker] * 3
    for block in found.blocks:
        close(block.to_dense(), part_of(expected, found.shapes, block.shapes))
    (other,) = {"kronecker", "kronecker-reduce"} - {structure}
    assert relative_error(estimate(case, structure=other).to_dense(), found.to_dense()) > 0.01


# What is no matrix

OTHERS = [
    "cnn_with_norms",
    "embedding",
    "tied_weights",
    "module_called_twice",
    "raw_parameters",
    "position_embedding",
    "grouped_convolution",
    "linear_and_einsum",
    "custom_function",
    "frozen_parameters",
    "weight_norm",
    "lstm",
]


@each_kind
@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("name", OTHERS)
def test_vectors_keep_their_block_and_other_parameters_their_diagonal(name, structure, kind):
    case, expected = SCENARIOS[name](), oracle(name, kind)
    for size in (3, N):
        found = estimate(case, size, kind=kind, structure=structure)
        for block in found.blocks:
            part = part_of(expected, found.shapes, block.shapes)
            if isinstance(block, Dense):
                close(block.to_dense(), part)
            elif isinstance(block, Diagonal):
                close(block.to_dense().diagonal(), part.diagonal())


LAYERS = {
    "cnn_with_norms": [["0.weight", "0.bias"], ["3.weight", "3.bias"], ["6.weight", "6.bias"]],
    "embedding": [["head.weight", "head.bias"]],
    "tied_weights": [],
    "module_called_twice": [["layer.weight", "layer.bias"], ["head.weight", "head.bias"]],
    "raw_parameters": [["first"], ["second"]],
    "position_embedding": [["head.weight", "head.bias"]],
    "grouped_convolution": [["0.weight", "0.bias"], ["3.weight", "3.bias"]],
    "linear_and_einsum": [],
    "custom_function": [],
    "frozen_parameters": [["2.weight", "2.bias"]],
    "weight_norm": [["2.weight", "2.bias"]],
    "lstm": [
        ["cell.weight_ih_l0", "cell.bias_ih_l0"],
        ["cell.weight_hh_l0", "cell.bias_hh_l0"],
        ["head.weight", "head.bias"],
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_with_their_biases_have_factors_and_nothing_else_has(name):
    case = SCENARIOS[name]()
    found = estimate(case, structure="kronecker")
    factored = [list(block.shapes) for block in found.blocks if isinstance(block, Kronecker)]
    assert factored == LAYERS[name]
    for block in found.blocks[len(factored) :]:
        ((parameter, shape),) = block.shapes.items()
        assert isinstance(block, Dense if len(shape) < 2 else Diagonal), parameter
    assert list(found.shapes) == [n for n, p in case.model.named_parameters() if p.requires_grad]


def test_vectors_that_are_too_long_for_a_block_keep_their_diagonal(monkeypatch):
    monkeypatch.setattr(factors, "MAX_VECTOR", 2)
    found = estimate(SCENARIOS["cnn_with_norms"](), structure="kronecker")
    types = {name: type(block_of(found, name)) for name in ("1.weight", "4.weight")}
    assert types == {"1.weight": Dense, "4.weight": Diagonal}  # of two and of four entries


def test_a_parameter_without_use_has_no_information():
    model = nn.Sequential(nn.Linear(4, 3))
    model.vector, model.matrix = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    data = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
    for structure in KRONECKER:
        found = fisher_information(model, data, structure=structure)
        assert found.paths["vector"] == found.paths["matrix"] == "unused"
        assert not found.diagonal()["vector"].any()
        assert not found.diagonal()["matrix"].any()
        assert found.diagonal()["0.weight"].any()


class Computed(nn.Module):
    """A linear map whose bias is computed from a parameter."""

    def __init__(self, shape, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 4))
        self.offset = nn.Parameter(torch.randn(shape))
        self.compute = compute

    def forward(self, x):
        return F.linear(x, self.weight, self.compute(self.offset))


@pytest.mark.parametrize(
    ("shape", "compute"),
    [
        ((), lambda b: b.expand(CLASSES)),
        ((1,), lambda b: b),
        ((5,), lambda b: b[:CLASSES]),
        ((CLASSES,), lambda b: b.flip(0)),
        ((CLASSES,), lambda b: 2 * b),
    ],
    ids=["expanded", "broadcast", "sliced", "reversed", "scaled"],
)
def test_a_bias_that_is_computed_from_a_parameter_stands_alone(shape, compute):
    case = seeded(
        lambda: Scenario(
            Computed(shape, compute), torch.randn(N, 4), "bernoulli", torch.ones(N, CLASSES)
        )
    )
    found, expected = estimate(case, structure="kronecker"), definition(case, "exact")
    assert list(block_of(found, "weight").shapes) == ["weight"]
    close(block_of(found, "offset").to_dense(), part_of(expected, found.shapes, ["offset"]))


def test_the_generic_path_is_taken_once_for_all_parameters(monkeypatch):
    """A vector and a matrix on the generic path share them, and eigenvectors need no more."""
    calls, before = [], VmapGradients.gradients

    def counted(self, names, inputs, columns):
        calls.append(len(columns))
        yield from before(self, names, inputs, columns)

    class Generic(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector = nn.Parameter(torch.ones(3))
            self.matrix = nn.Parameter(torch.ones(2, 3))

        def forward(self, x):
            return torch.hypot(torch.hypot(x, self.vector).unsqueeze(1), self.matrix).sum(1)

    monkeypatch.setattr(VmapGradients, "gradients", counted)
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    for structure in ("diagonal", *KRONECKER):
        calls.clear()
        fisher_information(Generic(), data, structure=structure)
        # one column to certify, then all two; a second pass certifies its last batch again
        assert calls == [1, 2, 1][: 3 if structure == "eigenkronecker" else 2], structure


# Second moments in the eigenvectors

EIGEN = ["mlp_categorical", "mlp_poisson", "cnn_with_norms", "module_called_twice", "attention"]
EIGEN += ["raw_parameters", "flattened_positions", "custom_function", "frozen_parameters", "lstm"]
each_eigen = pytest.mark.parametrize("name", EIGEN)


@cache
def both(name, kind):
    """Return EKFAC and KFAC of a scenario."""
    case = SCENARIOS[name]()
    return tuple(estimate(case, kind=kind, structure=s) for s in ("eigenkronecker", "kronecker"))


def directions(block):
    """Yield every product of eigenvectors as a vector over the parameters of the block."""
    outputs, inputs = (
        basis.reshape(-1, *basis.shape[-2:]) for basis in (block.output_basis, block.input_basis)
    )
    for group in range(len(outputs)):
        for u in outputs[group].mT:
            for w in inputs[group].mT:
                yield direction(block, group, len(outputs), u, w)


def direction(block, group, groups, u, w):
    """Put the product of an eigenvector of each side in its place among the parameters."""
    biases = len(block.shapes) - 1
    weight = u.outer(w[:-1] if biases else w)
    whole = torch.zeros(groups, weight.numel(), dtype=u.dtype)
    whole[group] = (weight.mT if block.transposed else weight).flatten()
    bias = torch.zeros(groups, len(u), dtype=u.dtype)
    bias[group] = u * w[-1]
    return torch.cat([whole.flatten(), *([bias.flatten()] if biases else [])])


@each_kind
@pytest.mark.parametrize("name", BY_WINDOWS)
def test_second_moments_of_convolutions_are_exact_at_every_batch_size(name, kind):
    case = CASES[name]
    expected = definition(case.make(), kind)
    for size in (4, *BATCH_SIZES):
        found = estimate(case.make(), size, kind=kind, structure="eigenkronecker")
        block = block_of(found, case.weight)
        assert isinstance(block, EigenKronecker)
        part = part_of(expected, found.shapes, block.shapes)
        rotated = torch.stack([v @ part @ v for v in directions(block)])
        close(block.second_moments.flatten(), rotated)
        close(found.trace().reshape(1), expected.trace().reshape(1))


@each_kind
@each_eigen
def test_the_trace_of_second_moments_is_the_exact_trace(name, kind):
    case, expected = SCENARIOS[name](), oracle(name, kind).trace()
    for size in BATCH_SIZES:
        found = estimate(case, size, kind=kind, structure="eigenkronecker")
        close(found.trace().reshape(1), expected.reshape(1))
        assert found.n_samples == N


@each_kind
@each_eigen
def test_second_moments_are_the_diagonal_of_the_matrix_in_the_eigenvectors(name, kind):
    found, expected = both(name, kind)[0], oracle(name, kind)
    for block in found.blocks:
        if isinstance(block, EigenKronecker):
            part = part_of(expected, found.shapes, block.shapes)
            rotated = torch.stack([v @ part @ v for v in directions(block)])
            close(block.second_moments.flatten(), rotated)


@each_kind
@each_eigen
def test_second_moments_are_nearer_to_the_matrix_than_factors_are(name, kind):
    found, factored = both(name, kind)
    closer = []
    for block in found.blocks:
        if isinstance(block, EigenKronecker):
            expected = part_of(oracle(name, kind), found.shapes, block.shapes)
            other = block_of(factored, next(iter(block.shapes)))
            distance, of_factors = (
                torch.linalg.norm(each.to_dense() - expected) for each in (block, other)
            )
            assert distance <= of_factors * (1 + 1e-12)
            closer.append(bool(distance < 0.99 * of_factors))
    assert any(closer) or not closer


def test_eigenvectors_are_those_of_the_factors():
    found, factored = both("cnn_with_norms", "exact")
    for block, other in zip(found.blocks[:3], factored.blocks[:3], strict=True):
        for basis, factor in (
            (block.output_basis, other.output_factor),
            (block.input_basis, other.input_factor),
        ):
            rotated = basis.mT @ factor @ basis
            close(rotated, rotated.diagonal().diag())
            close(basis.mT @ basis, torch.eye(len(basis), dtype=basis.dtype))


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", ["mlp_categorical", "cnn_with_norms", "flattened_positions"])
def test_both_passes_make_the_draws_of_one(name, kind):
    case = SCENARIOS[name]()
    diagonal = estimate(case, kind=kind, draws=2)
    for size in BATCH_SIZES:
        eigen, factored = (
            estimate(case, size, kind=kind, draws=2, structure=s)
            for s in ("eigenkronecker", "kronecker")
        )
        close(eigen.trace().reshape(1), diagonal.trace().reshape(1))
        for block, other in zip(eigen.blocks, factored.blocks, strict=True):
            if isinstance(block, EigenKronecker):
                rotated = block.output_basis.mT @ other.output_factor @ block.output_basis
                close(rotated, rotated.diagonal().diag())


@pytest.mark.parametrize("kind", RANDOM)
def test_a_generator_goes_on_after_as_many_draws_as_one_pass_makes(kind):
    case, states = SCENARIOS["mlp_categorical"](), []
    for structure in ("diagonal", "eigenkronecker"):
        generator = torch.Generator().manual_seed(3)
        estimate(case, kind=kind, structure=structure, generator=generator)
        states.append(generator.get_state())
    assert same(*states)


@pytest.mark.parametrize("kind", RANDOM)
def test_factors_of_random_kinds_are_those_of_the_exact_kind_on_average(kind):
    """The output factors are means over the draws; the input factors need none."""
    case = SCENARIOS["mlp_categorical"]()
    exact = estimate(case, structure="kronecker").blocks[0]
    draws = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        found = estimate(case, kind=kind, structure="kronecker", generator=generator).blocks[0]
        close(found.input_factor, exact.input_factor)
        draws.append(found.output_factor)
    each = torch.stack(draws)
    z = (each.mean(0) - exact.output_factor) / (each.std(0) / len(each) ** 0.5)
    assert z.abs().max() < 4.5
    assert (each.std(0) > 0).all()


# Data that are read twice


def test_a_shuffling_loader_can_be_read_twice():
    case = SCENARIOS["mlp_categorical"]()
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=3, shuffle=True)
    orders = [torch.cat([x for x, _ in loader]) for _ in range(2)]
    assert not same(*orders)
    found = fisher_information(case.model, loader, structure="eigenkronecker")
    close(found.to_dense(), both("mlp_categorical", "exact")[0].to_dense())


def test_data_that_can_be_read_only_once_are_refused():
    case = SCENARIOS["mlp_categorical"]()
    batches = iter(cut(case.x, case.y, 3))
    with pytest.raises(ValueError, match="iterator"):
        fisher_information(case.model, batches, structure="eigenkronecker")


class Changing:
    """Data that are others each time they are read."""

    def __init__(self, *readings):
        self.readings = iter(readings)

    def __iter__(self):
        return iter(next(self.readings))


def test_data_that_hold_fewer_observations_the_second_time_are_refused():
    case = SCENARIOS["mlp_categorical"]()
    data = Changing(cut(case.x, case.y, 3), cut(case.x[:7], case.y[:7], 3))
    message = "held 8 observations in the first pass and 7 in the second"
    with pytest.raises(ValueError, match=message):
        fisher_information(case.model, data, structure="eigenkronecker")


# Models that change their ways


class Either(nn.Module):
    """A model that does one thing with inputs of four numbers and another with longer ones."""

    def __init__(self, short, long):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.ways = short, long

    def forward(self, x):
        return self.ways[x.shape[1] > 4](self, x[:, :4])


def linear(p, x):
    return F.linear(x, p.weight, p.bias)


def either(short, long):
    """Return a model and two batches, one for each way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Either(short, long).double()
        x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 4, (6,))
    return model, [(x[:3, :4], y[:3]), (x[3:], y[3:])]


OTHER_WAYS = {
    "generic": lambda p, x: torch.hypot(x.unsqueeze(1), p.weight).sum(-1) + p.bias,
    "transposed": lambda p, x: torch.addmm(p.bias, x, p.weight),
    "entry by entry": lambda p, x: x * p.weight.sum(0) + p.bias,
    "without bias": lambda p, x: F.linear(x, p.weight),
    "bias elsewhere": lambda p, x: F.linear(x, p.weight) + torch.tanh(p.bias * x),
    "bias generic": lambda p, x: torch.hypot(F.linear(x, p.weight), p.bias),
    "bias only": lambda p, x: x + p.bias,
}


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("way", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_a_matrix_in_one_batch_that_is_none_in_the_next_is_refused_by_name(way, structure):
    model, batches = either(linear, way)
    with pytest.raises(ValueError, match=r"'weight' is used as a matrix in one batch.*'diagonal'"):
        fisher_information(model, batches, structure=structure)


@pytest.mark.parametrize("way", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_a_matrix_that_is_none_in_the_second_pass_is_refused_by_name(way):
    model, (first, second) = either(linear, way)
    with pytest.raises(ValueError, match="'weight' is used as a matrix in one batch"):
        fisher_information(model, Changing([first], [second]), structure="eigenkronecker")


class Kernel(nn.Module):
    """A kernel that is used in one way or in several."""

    def __init__(self, *ways):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 1))
        self.ways = ways

    def forward(self, x):
        return sum(way(x[:, :4, None], self.weight)[..., 0] for way in self.ways)


def one_group(x, w):
    return F.conv1d(x[:, :2], w)


def two_groups(x, w):
    return F.conv1d(x, w, groups=2)


def back(x, w):
    return F.conv1d(F.conv_transpose1d(x, w), w)


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize(
    "ways", [(one_group, two_groups), (back,)], ids=["other groups", "transposed"]
)
def test_a_kernel_that_is_used_as_two_kinds_of_matrices_keeps_its_diagonal(ways, structure):
    case = seeded(lambda: Scenario(Kernel(*ways), torch.randn(N, 4), "bernoulli", torch.ones(N, 4)))
    found = estimate(case, structure=structure)
    assert isinstance(block_of(found, "weight"), Diagonal)
    close(found.diagonal()["weight"].flatten(), definition(case, "exact").diagonal())


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_kernel_of_other_groups_in_the_next_batch_is_refused_by_name(structure):
    class Changes(Kernel):
        def forward(self, x):
            return self.ways[x.shape[1] > 4](x[:, :4, None], self.weight)[..., 0]

    _, batches = either(linear, linear)
    model = Changes(one_group, two_groups).double()
    with pytest.raises(ValueError, match=r"'weight' is used as a matrix in one batch.*'diagonal'"):
        fisher_information(model, batches, structure=structure)


class Experts(nn.Module):
    """Two linear maps, one for short and one for long inputs."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.experts[x.shape[1] > 4](x[:, :4])


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_matrix_that_only_a_later_batch_uses_has_factors_too(structure):
    _, batches = either(linear, linear)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Experts().double()
    found, other = (
        fisher_information(model, order, structure=structure) for order in (batches, batches[::-1])
    )
    shapes = [["experts.0.weight", "experts.0.bias"], ["experts.1.weight", "experts.1.bias"]]
    assert [list(block.shapes) for block in found.blocks] == shapes
    close(found.to_dense(), other.to_dense())


@pytest.mark.parametrize("structure", KRONECKER)
def test_observations_that_do_not_use_a_matrix_do_not_dilute_its_inputs(structure):
    """With one observation for each expert there is nothing to approximate."""
    _, batches = either(linear, linear)
    data = [(x[:1], y[:1]) for x, y in batches]
    model = Experts().double()
    found, dense = (fisher_information(model, data, structure=s) for s in (structure, "dense"))
    close(found.to_dense(), dense.to_dense())


def test_blocks_stand_in_the_same_order_every_time():
    found = estimate(SCENARIOS["cnn_with_norms"](), structure="kronecker")
    assert [next(iter(block.shapes)) for block in found.blocks] == [
        "0.weight",
        "3.weight",
        "6.weight",
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
    ]
