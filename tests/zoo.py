"""Small models of every kind that people bring, with data, in double precision.

Each entry is one layer, or one way of using a parameter, and holds eight observations, so that
sequence lengths, channels and batch sizes are often the same number on purpose. ``truth`` is
the slow answer: every observation by itself, by plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ewc_lib import Categorical, Fisher, Gaussian, fisher_information
from ewc_lib.likelihood.outputs import output_distribution
from tests.scenarios import CLASSES, HiddenLinear, N, Scenario, slow_path_allowed

WORDS = 5
"""Size of the vocabulary of models that read tokens."""

ZOO: dict[str, Callable[[], Scenario]] = {}


def animal(name: str, make: Callable[[], Scenario]) -> None:
    """Register an entry; it is the same every time, and the global random state is kept."""
    assert name not in ZOO, f"two entries are called {name}"

    def seeded() -> Scenario:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x, likelihood, y = make()
            return Scenario(model.double(), tree_map(_double, x), likelihood, _double(y))

    ZOO[name] = seeded


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


# The slow answer


class Truth(NamedTuple):
    """Per observation: Jacobians of the output, its Fisher information, its score."""

    jacobian: Tensor
    information: Tensor
    score: Tensor
    shapes: dict[str, torch.Size]

    def dense(self, kind: str) -> Tensor:
        """Return the whole matrix."""
        if kind == "empirical":
            scores = torch.einsum("no,nop->np", self.score, self.jacobian)
            return scores.mT @ scores / len(scores)
        left = (self.information @ self.jacobian).flatten(0, 1)
        return self.jacobian.flatten(0, 1).mT @ left / len(self.jacobian)

    def diagonal(self, kind: str) -> dict[str, Tensor]:
        """Return the diagonal, in the shapes of the parameters."""
        pieces = self.dense(kind).diagonal().split([s.numel() for s in self.shapes.values()])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


def truth(case: Scenario) -> Truth:
    """Run one observation after the other, and differentiate one output after the other.

    The log-probability's Hessian in the output is minus the Fisher information of the output
    distribution, whatever the target, since all four have natural parameters for outputs.
    """
    model, mode = case.model, case.model.training
    distribution = output_distribution(case.likelihood)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    model.eval()
    for n in range(len(case.y)):
        x, y = tree_map(lambda t, n=n: t[n : n + 1], (case.x, case.y))
        output = call(model, x)
        jacobian = torch.stack([_gradient(entry, parameters) for entry in output.reshape(-1)])

        def log_prob(f: Tensor, y: Tensor = y) -> Tensor:
            return distribution.log_prob(f, y).sum()

        f = output.detach()
        score = torch.autograd.functional.jacobian(log_prob, f).reshape(-1)
        hessian = torch.autograd.functional.hessian(log_prob, f)
        rows.append((jacobian, -hessian.reshape(len(score), -1), score))
    model.train(mode)
    stacked = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    return Truth(*stacked, {name: p.shape for name, p in parameters.items()})


def call(model: nn.Module, x: Any) -> Tensor:
    """Call a model with inputs of any form, and return its output tensor."""
    if isinstance(x, dict):
        output = model(**x)
    elif isinstance(x, tuple):
        output = model(*x)
    else:
        output = model(x)
    return getattr(output, "logits", output)


def _gradient(entry: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(
        entry, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else g.to_dense().reshape(-1)
            for p, g in zip(parameters.values(), gradients, strict=True)
        ]
    )


@cache
def zoo_truth(name: str) -> Truth:
    """Return the slow answer for an entry, computed once."""
    return truth(ZOO[name]())


def cut(case: Scenario, *sizes: int) -> Iterator[tuple[Any, Tensor]]:
    """Cut data of any form into batches of the given sizes, the last of which is repeated."""
    start = number = 0
    while start < len(case.y):
        part = slice(start, start + sizes[min(number, len(sizes) - 1)])
        yield tree_map(lambda t, part=part: t[part], (case.x, case.y))
        start, number = part.stop, number + 1


def measure(case: Scenario, *sizes: int, **options: Any) -> Fisher:
    """Run the engine on a model, by default in batches that hold all data of an entry."""
    with slow_path_allowed():
        return fisher_information(case.model, cut(case, *sizes or (N,)), case.likelihood, **options)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the worst relative error of any parameter.

    It is relative to the largest entry of the same parameter, so that a mistake about one with
    little information shows, unless it has next to none.
    """
    assert list(found) == list(expected)
    largest = max(float(values.max()) for values in expected.values())
    return max(
        float((found[name] - values).abs().max() / (values.max() + 1e-9 * largest))
        for name, values in expected.items()
    )


# Models around one layer


class Reader(nn.Module):
    """A body that holds all parameters, and a fixed map from what it returns to three classes."""

    def __init__(self, body: nn.Module, x: Any) -> None:
        super().__init__()
        self.body = body
        width = call(body.eval(), x).flatten(1).shape[1]
        self.train()
        self.register_buffer("head", 2 * torch.randn(width, CLASSES) / math.sqrt(width))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tanh(self.body(*args, **kwargs)).flatten(1) @ self.head


def read(body: nn.Module, x: Any) -> Scenario:
    """Classify by what a body returns."""
    return Scenario(Reader(body, x), x, "categorical", torch.randint(0, CLASSES, (N,)))


def stir(model: nn.Module) -> nn.Module:
    """Move every parameter and running statistic away from its special starting value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.5 * torch.rand_like(buffer))
    return model


def layer(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register one layer on random inputs of a shape."""
    animal(name, lambda: read(stir(make()), torch.randn(N, *shape)))


def on_words(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register one layer on random tokens."""
    animal(name, lambda: read(make(), torch.randint(0, WORDS, (N, *shape))))


class Functional(nn.Module):
    """A function of the inputs and of raw parameters, called ``p.<name>`` in it."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def function(name: str, shape: tuple[int, ...], f: Callable[..., Tensor], **shapes: Any) -> None:
    """Register a function of raw parameters on random inputs of a shape."""
    layer(name, lambda: Functional(f, **shapes), *shape)


# Linear maps

layer("linear", lambda: nn.Linear(4, 5), 4)
layer("linear_without_bias", lambda: nn.Linear(4, 5, bias=False), 4)
layer("linear_on_sequences", lambda: nn.Linear(4, 5), 7, 4)
layer("linear_where_all_sizes_are_equal", lambda: nn.Linear(N, N), N, N)
layer("linear_on_planes", lambda: nn.Linear(2, 4), 3, 2, 2)
layer("linear_on_single_numbers", lambda: nn.Linear(1, 1), 1)
layer("mlp", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), 4)

function(
    "linear_on_flattened_positions",
    (3, 4),
    lambda p, x: F.linear(x.reshape(-1, 4), p.w, p.b).unflatten(0, (-1, 3)),
    w=(5, 4),
    b=(5,),
)
function(
    "linear_on_positions_flattened_first",
    (N, 2),
    lambda p, x: (
        F.linear(x.transpose(0, 1).reshape(-1, 2), p.w, p.b).unflatten(0, (N, -1)).transpose(0, 1)
    ),
    w=(3, 2),
    b=(3,),
)
function(
    "linear_with_positions_first",
    (N, 2),
    lambda p, x: F.linear(x.transpose(0, 1), p.w, p.b).transpose(0, 1),
    w=(3, 2),
    b=(3,),
)
function("linear_of_one_observation_each", (4,), lambda p, x: _each(p, x), w=(5, 4), b=(5,))


def _each(p: Any, x: Tensor) -> Tensor:
    return torch.stack([F.linear(row, p.w, p.b) for row in x])


function(
    "addmm",
    (4,),
    lambda p, x: torch.addmm(p.b, x, p.w),
    b=(5,),
    w=(4, 5),
)
function(
    "addmm_on_flattened_positions",
    (3, 4),
    lambda p, x: torch.addmm(p.b, x.reshape(-1, 4), p.w).reshape(-1, 3, 5),
    b=(5,),
    w=(4, 5),
)
function(
    "addmm_with_factors",
    (4,),
    lambda p, x: torch.addmm(p.b, x, p.w, beta=0.5, alpha=-2),
    b=(5,),
    w=(4, 5),
)
function("matmul_on_the_right", (4,), lambda p, x: x @ p.w, w=(4, 5))
function("matmul_of_sequences", (3, 4), lambda p, x: torch.matmul(x, p.w), w=(4, 5))
function("matmul_by_reflection", (4,), lambda p, x: torch.mm(x, p.w), w=(4, 5))
function("matmul_with_a_transpose", (3, 4), lambda p, x: x @ p.w.T, w=(5, 4))
function("matmul_on_the_left", (4, 3), lambda p, x: p.w @ x, w=(5, 4))
function("matmul_on_the_left_of_columns", (4,), lambda p, x: (p.w @ x.mT).mT, w=(5, 4))
function("matmul_with_a_vector", (3, 4), lambda p, x: x @ p.w, w=(4,))
function("matmul_of_heads", (3, 4), lambda p, x: torch.matmul(x.unsqueeze(1), p.w), w=(2, 4, 5))
function("bmm_with_expand", (3, 4), lambda p, x: torch.bmm(x, p.w.expand(len(x), -1, -1)), w=(4, 5))
function("mixing_of_positions", (N, 2), lambda p, x: p.w @ x, w=(N, N))
function(
    "bilinear_form", (4,), lambda p, x: torch.outer((x @ p.w * x).sum(1), x.new_ones(2)), w=(4, 4)
)

function("einsum", (4,), lambda p, x: torch.einsum("ni,oi->no", x, p.w), w=(5, 4))
function(
    "einsum_with_the_parameter_first",
    (3, 4),
    lambda p, x: torch.einsum("io,nti->nto", p.w, x),
    w=(4, 5),
)
function(
    "einsum_into_heads",
    (3, 4),
    lambda p, x: torch.einsum("btd,hdk->bhtk", x, p.w),
    w=(2, 4, 3),
)
function(
    "einsum_out_of_heads",
    (2, 3, 2),
    lambda p, x: torch.einsum("bhtk,hkd->btd", x, p.w),
    w=(2, 2, 3),
)
function("einsum_with_dots", (3, 4), lambda p, x: torch.einsum("...i,io->...o", x, p.w), w=(4, 5))
function("einsum_without_arrow", (4,), lambda p, x: torch.einsum("ni,io", x, p.w), w=(4, 5))
function("einsum_of_numbers", (3, 4), lambda p, x: torch.einsum("ntd,d->ntd", x, p.w), w=(4,))
function("einsum_of_positions", (N, 2), lambda p, x: torch.einsum("nsd,ts->ntd", x, p.w), w=(N, N))
function(
    "einsum_of_three",
    (4,),
    lambda p, x: torch.einsum("ni,ir,ro->no", x, p.a, p.b),
    a=(4, 2),
    b=(2, 5),
)

# Convolutions

layer("conv1d", lambda: nn.Conv1d(2, 3, 2), 2, 5)
layer("conv1d_where_all_sizes_are_equal", lambda: nn.Conv1d(N, N, 1), N, N)
layer("conv1d_with_stride", lambda: nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=1), 2, 8)
layer("conv1d_with_a_remainder", lambda: nn.Conv1d(2, 3, 2, stride=3), 2, 7)
layer("conv1d_grouped", lambda: nn.Conv1d(4, 6, 2, groups=2), 4, 5)
layer("conv1d_depthwise", lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), 4, 5)
layer("conv1d_same", lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), 2, 8)
layer("conv1d_valid", lambda: nn.Conv1d(2, 3, 3, padding="valid"), 2, 7)
layer("conv2d", lambda: nn.Conv2d(2, 3, 2), 2, 4, 4)
layer("conv2d_pointwise", lambda: nn.Conv2d(3, 2, 1), 3, 2, 2)
layer("conv2d_of_a_whole_plane", lambda: nn.Conv2d(2, 3, 4), 2, 4, 4)
layer(
    "conv2d_asymmetric",
    lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0)),
    2,
    5,
    4,
)
layer("conv2d_grouped", lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), 4, 4, 4)
layer("conv2d_depthwise", lambda: nn.Conv2d(N, N, 2, groups=N), N, 3, 3)
layer("conv2d_same", lambda: nn.Conv2d(2, 3, 3, padding="same"), 2, 4, 4)
layer("conv3d", lambda: nn.Conv3d(1, 2, 2), 1, 3, 3, 3)
layer("conv3d_grouped", lambda: nn.Conv3d(2, 4, 2, groups=2, padding=1, stride=2), 2, 3, 3, 2)
for _mode in ("zeros", "circular", "reflect", "replicate"):
    for _padding in (1, "same"):
        _make = partial(nn.Conv1d, 2, 3, 3, padding=_padding, padding_mode=_mode)
        layer(f"conv1d_{_mode}_{_padding}", _make, 2, 5)
    layer(
        f"conv2d_{_mode}",
        partial(nn.Conv2d, 1, 2, 3, padding=(1, 2), padding_mode=_mode, groups=1),
        1,
        4,
        4,
    )
layer("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 2), 2, 4)
layer(
    "conv_transpose1d_with_stride",
    lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    4,
    3,
)
layer("conv_transpose1d_dilated", lambda: nn.ConvTranspose1d(2, 2, 2, dilation=2), 2, 3)
layer("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), 2, 2, 3)
layer(
    "conv_transpose2d_grouped",
    lambda: nn.ConvTranspose2d(4, 4, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=4),
    4,
    2,
    2,
)
layer("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), 2, 1, 2, 2)
function("functional_conv1d", (2, 4), lambda p, x: F.conv1d(x, p.w, padding=1), w=(3, 2, 2))

# Embeddings

on_words("embedding", lambda: nn.Embedding(WORDS, 3), 4)
on_words("embedding_of_single_words", lambda: nn.Embedding(WORDS, 3))
on_words("embedding_with_padding", lambda: nn.Embedding(WORDS, 3, padding_idx=0), N)
on_words("embedding_with_sparse_gradients", lambda: nn.Embedding(WORDS, 3, sparse=True), 4)
on_words("embedding_by_index", lambda: Functional(lambda p, x: p.w[x], w=(WORDS, 3)), 4)
on_words(
    "embedding_by_one_hot",
    lambda: Functional(lambda p, x: F.one_hot(x, WORDS).to(p.w.dtype) @ p.w, w=(WORDS, 3)),
    4,
)
for _mode in ("sum", "mean", "max"):
    on_words(f"embedding_bag_{_mode}", partial(nn.EmbeddingBag, WORDS, 3, mode=_mode), 4)
on_words("embedding_bag_with_padding", lambda: nn.EmbeddingBag(WORDS, 3, padding_idx=1), N)


def _weighted_bag() -> Scenario:
    body = Functional(
        lambda p, words, weights: F.embedding_bag(
            words, p.w, mode="sum", per_sample_weights=weights
        ),
        w=(WORDS, 3),
    )
    return read(body, (torch.randint(0, WORDS, (N, 4)), torch.randn(N, 4)))


animal("embedding_bag_with_weights", _weighted_bag)
on_words(
    "embedding_bag_with_offsets",
    lambda: Functional(
        lambda p, x: F.embedding_bag(
            x.reshape(-1), p.w, offsets=4 * torch.arange(len(x)), mode="mean"
        ),
        w=(WORDS, 3),
    ),
    4,
)

# Normalisation


def after_linear(make: Callable[[], nn.Module], inputs: int, outputs: int) -> Callable[..., Any]:
    """Put a layer without parameters behind one that has some."""
    return lambda: nn.Sequential(nn.Linear(inputs, outputs), make())


layer("layer_norm", lambda: nn.LayerNorm(4), 4)
layer("layer_norm_of_sequences", lambda: nn.LayerNorm(4), N, 4)
layer("layer_norm_of_planes", lambda: nn.LayerNorm((3, 4)), 3, 4)
layer("layer_norm_without_bias", lambda: nn.LayerNorm(4, bias=False), 3, 4)
layer(
    "layer_norm_without_affine",
    after_linear(lambda: nn.LayerNorm(4, elementwise_affine=False), 3, 4),
    3,
)
layer("rms_norm", lambda: nn.RMSNorm(4), 4)
layer("rms_norm_of_sequences", lambda: nn.RMSNorm(4), 7, 4)
layer(
    "rms_norm_without_affine",
    after_linear(lambda: nn.RMSNorm(4, elementwise_affine=False), 3, 4),
    3,
)
function(
    "rms_norm_by_hand",
    (3, 4),
    lambda p, x: p.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    w=(4,),
)
layer("group_norm", lambda: nn.GroupNorm(2, 4), 4, 3)
layer("group_norm_of_images", lambda: nn.GroupNorm(2, N), N, 2, 2)
layer("group_norm_without_affine", after_linear(lambda: nn.GroupNorm(2, 4, affine=False), 3, 4), 3)
layer("instance_norm1d", lambda: nn.InstanceNorm1d(3, affine=True), 3, 4)
layer("instance_norm2d", lambda: nn.InstanceNorm2d(2, affine=True), 2, 3, 3)
layer(
    "instance_norm_with_running_statistics",
    lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    2,
    3,
    3,
)
layer(
    "instance_norm_without_affine",
    lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3)),
    2,
    4,
)
layer("batch_norm1d", lambda: nn.BatchNorm1d(4), 4)
layer("batch_norm1d_of_sequences", lambda: nn.BatchNorm1d(N), N, N)
layer("batch_norm2d", lambda: nn.BatchNorm2d(2), 2, 3, 3)
layer("batch_norm3d", lambda: nn.BatchNorm3d(2), 2, 2, 2, 2)
layer("batch_norm_without_affine", after_linear(lambda: nn.BatchNorm1d(4, affine=False), 3, 4), 3)


def _functional_norm(p: Any, x: Tensor) -> Tensor:
    mean, variance = torch.linspace(-1, 1, 3).double(), torch.linspace(0.5, 2, 3).double()
    return F.batch_norm(x, mean.to(x), variance.to(x), p.w, p.b, training=False)


function("functional_batch_norm", (3, 4), _functional_norm, w=(3,), b=(3,))


# Sums and products that broadcast

for _name, _shape in {
    "a_row": (4,),
    "a_row_of_its_own_axis": (1, 4),
    "a_column": (3, 1),
    "a_plane": (3, 4),
    "a_plane_with_an_axis_for_observations": (1, 3, 4),
    "one_number": (),
    "one_number_in_brackets": (1, 1, 1),
}.items():
    function(f"sum_with_{_name}", (3, 4), lambda p, x: x + p.b, b=_shape)
    function(f"product_with_{_name}", (3, 4), lambda p, x: x * p.w, w=_shape)
function("sum_from_the_left", (3, 4), lambda p, x: p.b + x, b=(4,))
function("product_from_the_left", (3, 4), lambda p, x: p.w * x, w=(4,))
function("sum_with_a_factor", (4,), lambda p, x: torch.add(x, p.b, alpha=2), b=(4,))
function("sum_in_place", (4,), lambda p, x: x.clone().add_(p.b).mul_(p.w), b=(4,), w=(4,))
function("difference", (4,), lambda p, x: (x - p.a) + (p.b - x.square()), a=(4,), b=(4,))
function("quotient", (3, 4), lambda p, x: x / p.w, w=(4,))
function("sum_over_as_many_positions_as_observations", (N, 2), lambda p, x: x + p.b, b=(N, 1))
function("product_over_as_many_channels_as_observations", (N,), lambda p, x: x * p.w, w=(N,))
function("sum_that_makes_the_input_larger", (1, 4), lambda p, x: torch.tanh(x + p.b), b=(3, 4))
function(
    "product_of_an_input_and_itself",
    (4,),
    lambda p, x: torch.tanh(x * p.w) * p.w + x.mean(1, keepdim=True),
    w=(4,),
)
function("learned_temperature", (4,), lambda p, x: x.log_softmax(-1) / p.t, t=())
function("learned_log_scale", (3, 4), lambda p, x: x * p.s.exp(), s=(4,))
function(
    "gated_units",
    (4,),
    lambda p, x: F.silu(x @ p.gate) * (x @ p.up),
    gate=(4, 5),
    up=(4, 5),
)
layer("gated_linear_unit", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), 4)
layer("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), 4)
layer("prelu_by_channel", lambda: nn.PReLU(N), N, 3)
animal("bilinear", lambda: read(nn.Bilinear(3, 2, 4), (torch.randn(N, 3), torch.randn(N, 2))))


# A raw parameter that becomes part of the data

function(
    "class_token",
    (3, 4),
    lambda p, x: torch.cat([p.token.expand(len(x), -1, -1), x], 1).cumsum(1),
    token=(1, 1, 4),
)
function(
    "class_token_repeated",
    (N, 2),
    lambda p, x: torch.cat([p.token.repeat(len(x), 1, 1), x], 1).cumsum(1),
    token=(1, 1, 2),
)
function(
    "class_token_without_axes",
    (3, 4),
    lambda p, x: torch.cat([p.token.expand(len(x), 1, 4), x], 1).cumsum(1),
    token=(4,),
)
function(
    "prompt",
    (3, 4),
    lambda p, x: torch.tanh(torch.cat([p.words.unsqueeze(0).expand(len(x), -1, -1), x], 1) @ p.w),
    words=(2, 4),
    w=(4, 4),
)
function("mask_token", (3, 4), lambda p, x: torch.where(x > 0, x, p.token), token=(4,))
function("positions_added", (N, 2), lambda p, x: x + p.at, at=(1, N, 2))
function("positions_sliced", (3, 4), lambda p, x: x + p.at[:, : x.shape[1]], at=(1, 5, 4))
function("positions_repeated", (4, 2), lambda p, x: x + p.at.repeat(2, 1), at=(2, 2))
function("positions_expanded", (3, 4), lambda p, x: x + p.at.expand_as(x), at=(3, 1))
function(
    "positions_looked_up",
    (N, 2),
    lambda p, x: x + F.embedding(torch.arange(x.shape[1]), p.at),
    at=(N, 2),
)
function(
    "positions_looked_up_for_each",
    (3, 2),
    lambda p, x: x + F.embedding(torch.arange(3).expand(len(x), -1), p.at),
    at=(5, 2),
)
function(
    "positions_looked_up_with_an_axis",
    (3, 2),
    lambda p, x: x + F.embedding(torch.arange(3).unsqueeze(0), p.at),
    at=(5, 2),
)
function("start_state", (3, 4), lambda p, x: _scan(p, x), start=(4,), w=(4, 4))


def _scan(p: Any, x: Tensor) -> Tensor:
    """Run over the positions, from a learned state on."""
    state = p.start.expand(len(x), -1)
    for at in range(x.shape[1]):
        state = torch.tanh(state @ p.w + x[:, at])
    return state


# Attention


class Attend(nn.Module):
    """Attention of a sequence to itself, or to a memory of another width."""

    def __init__(self, width: int = 4, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.5, "batch_first": True, **options}
        self.attention = nn.MultiheadAttention(width, 2, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        if not self.attention.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h, weights = self.attention(x, memory, memory, need_weights=self.need_weights)
        h = h if self.attention.batch_first else h.transpose(0, 1)
        return torch.cat([h.flatten(1), weights.flatten(1)], 1) if self.need_weights else h


layer("attention", lambda: Attend(), 3, 4)
layer("attention_with_weights", lambda: Attend(need_weights=True), 3, 4)
layer("attention_without_bias", lambda: Attend(bias=False), 3, 4)
layer("attention_with_positions_first", lambda: Attend(batch_first=False), 3, 4)
layer("attention_over_as_many_positions_as_observations", lambda: Attend(batch_first=False), N, 4)
layer("attention_with_extra_keys", lambda: Attend(add_bias_kv=True), 3, 4)
layer(
    "attention_with_extra_keys_and_positions_first",
    lambda: Attend(add_bias_kv=True, add_zero_attn=True, batch_first=False),
    3,
    4,
)


def _cross_attention(batch_first: bool, **widths: int) -> Scenario:
    body = stir(Attend(batch_first=batch_first, **widths))
    width = widths.get("kdim", 4)
    return read(body, (torch.randn(N, 3, 4), torch.randn(N, N, width)))


animal("cross_attention", lambda: _cross_attention(True))
animal("cross_attention_of_other_widths", lambda: _cross_attention(True, kdim=3, vdim=3))
animal("cross_attention_with_positions_first", lambda: _cross_attention(False, kdim=3, vdim=3))


class PositionsFirst(nn.Module):
    """A layer that wants positions before observations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.inner(*(x.transpose(0, 1) for x in inputs))
        output = output[0] if isinstance(output, tuple) else output
        return output.transpose(0, 1)


def _block(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    options = {"dim_feedforward": 5, "dropout": 0.5, "batch_first": True, **options}
    return kind(4, 2, **options)


layer("encoder_layer", _block, 3, 4)
layer("encoder_layer_norm_first", lambda: _block(norm_first=True, activation="gelu"), 3, 4)
layer(
    "encoder_layer_with_positions_first",
    lambda: PositionsFirst(_block(batch_first=False)),
    N,
    4,
)


def _freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


layer(
    "encoder_layer_frozen_below_a_head",
    lambda: _freeze(nn.Sequential(_block(), nn.Linear(4, 3)), "0"),
    3,
    4,
)
layer(
    "encoder_layer_frozen_above_a_stem",
    lambda: _freeze(nn.Sequential(nn.Linear(2, 4), _block()), "1"),
    3,
    2,
)
layer("encoder_layer_frozen_in_part", lambda: _freeze(_block(), "self_attn", "norm1"), 3, 4)


def _encoder(frozen: bool = False) -> Scenario:
    """An encoder of two layers, where some positions are padding."""
    encoder = stir(nn.TransformerEncoder(_block(), 2, norm=nn.LayerNorm(4)))
    if frozen:
        encoder.layers.requires_grad_(False)
    padding = torch.arange(3) >= torch.randint(1, 4, (N, 1))
    padding[1] = False
    body = Functional(
        lambda p, x, padding: p.encoder(x, src_key_padding_mask=padding).masked_fill(
            padding.unsqueeze(-1), 0
        )
    )
    body.encoder = encoder
    return read(body, (torch.randn(N, 3, 4), padding))


animal("encoder_with_padding", _encoder)
animal("encoder_with_padding_frozen", lambda: _encoder(frozen=True))


def _decoder(**options: Any) -> Scenario:
    body = stir(_block(nn.TransformerDecoderLayer, **options))
    inputs = torch.randn(N, 3, 4), torch.randn(N, N, 4)
    return read(body if options.get("batch_first", True) else PositionsFirst(body), inputs)


animal("decoder_layer", _decoder)
animal("decoder_layer_norm_first", lambda: _decoder(norm_first=True))
animal("decoder_layer_with_positions_first", lambda: _decoder(batch_first=False))


# Hugging Face models, built from a configuration


def hugging_face(
    name: str,
    config: str,
    kind: str,
    data: Callable[..., Any],
    change: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> None:
    """Register a model of the transformers library."""

    def make() -> Scenario:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        change(model)
        return Scenario(stir(model), *data())

    animal(name, make)


def _text(labels: str) -> tuple[Any, str, Tensor]:
    """Words, of which some are padding, with a label for each text or for each word."""
    words = torch.randint(1, WORDS, (N, 3))
    mask = (torch.arange(3) < torch.randint(1, 4, (N, 1))).long()
    mask[0] = 1
    inputs = {"input_ids": words * mask, "attention_mask": mask}
    if labels == "text":
        return inputs, "categorical", torch.randint(0, CLASSES, (N,))
    following = torch.randint(0, WORDS, (N, 3)).masked_fill(mask == 0, -100)
    return inputs, "categorical", following


def _images() -> tuple[Any, str, Tensor]:
    return {"pixel_values": torch.randn(N, 1, 4, 4)}, "categorical", torch.randint(0, 3, (N,))


_SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
}
_GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 4,
    "n_head": 2,
    "n_layer": 1,
    "n_inner": 5,
    "n_positions": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA = {**_SMALL, "num_key_value_heads": 1, "max_position_embeddings": 4}
for _attention in ("eager", "sdpa"):
    _options = {"attn_implementation": _attention}
    hugging_face(
        f"gpt2_{_attention}",
        "GPT2Config",
        "GPT2LMHeadModel",
        partial(_text, "word"),
        **_GPT2,
        **_options,
    )
    hugging_face(
        f"bert_{_attention}",
        "BertConfig",
        "BertForSequenceClassification",
        partial(_text, "text"),
        **_SMALL,
        max_position_embeddings=4,
        num_labels=CLASSES,
        **_options,
    )
    hugging_face(
        f"llama_{_attention}",
        "LlamaConfig",
        "LlamaForCausalLM",
        partial(_text, "word"),
        **_LLAMA,
        **_options,
    )
    hugging_face(
        f"vit_{_attention}",
        "ViTConfig",
        "ViTForImageClassification",
        _images,
        **{key: value for key, value in _SMALL.items() if key != "vocab_size"},
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        **_options,
    )
hugging_face(
    "gpt2_untied",
    "GPT2Config",
    "GPT2LMHeadModel",
    partial(_text, "word"),
    **_GPT2,
    tie_word_embeddings=False,
)


def _double_norms(model: nn.Module) -> None:
    """Replace normalisations that compute in single precision whatever they are given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))


hugging_face(
    "llama_in_double_precision",
    "LlamaConfig",
    "LlamaForCausalLM",
    partial(_text, "word"),
    change=_double_norms,
    attn_implementation="sdpa",
    **_LLAMA,
)


# Parametrisations and adapters


def _parametrised(wrap: Callable[[nn.Module], nn.Module], width: int = 4) -> Callable[..., Any]:
    return lambda: nn.Sequential(wrap(nn.Linear(4, width)), nn.Tanh(), nn.Linear(width, 3))


layer("weight_norm", _parametrised(parametrizations.weight_norm), 4)
layer("spectral_norm", _parametrised(parametrizations.spectral_norm), 4)
layer("orthogonal", _parametrised(parametrizations.orthogonal), 4)
layer(
    "orthogonal_by_matrix_exponential",
    _parametrised(partial(parametrizations.orthogonal, orthogonal_map="matrix_exp")),
    4,
)
layer(
    "weight_norm_of_a_convolution", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), 2, 4
)


def _lora(trained: bool) -> Scenario:
    """An adapter of the peft library, as it starts (no change) or later; its base is frozen."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], lora_dropout=0.5)
    body = peft.get_peft_model(base, config)
    if trained:
        with torch.no_grad():
            for name, parameter in body.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    return read(body, torch.randn(N, 3, 4))


animal("lora_fresh", lambda: _lora(trained=False))
animal("lora_trained", lambda: _lora(trained=True))


def _lora_on_gpt2() -> Scenario:
    """Adapters of attention in a language model, whose linear maps have transposed weights."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))
    return Scenario(stir(peft.get_peft_model(model, config)), *_text("word"))


animal("lora_on_gpt2", _lora_on_gpt2)


class Adapter(nn.Module):
    """A linear map with a low-rank change, written by hand, in two ways."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(5, 2))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


layer("adapter", lambda: Adapter(merged=False), 3, 4)
layer("adapter_merged", lambda: Adapter(merged=True), 3, 4)


# One parameter, several uses


class Tied(nn.Module):
    """A language model of one layer, whose table of words is its head too."""

    def __init__(self, by_linear: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.middle = nn.Linear(4, 4)
        self.by_linear = by_linear

    def forward(self, words: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.table(words)))
        return F.linear(h, self.table.weight) if self.by_linear else h @ self.table.weight.T


def _language(model: nn.Module) -> Scenario:
    words = torch.randint(0, WORDS, (N, 3))
    return Scenario(model, words, Categorical(ignore_index=0), words.roll(-1, 1))


def _two_heads() -> nn.Module:
    """Two modules that share one parameter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class Loop(nn.Module):
    """A layer that is applied again and again."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(self.norm(x)))
        return x


animal("tied_embedding", lambda: _language(Tied()))
animal("tied_embedding_with_a_transpose", lambda: _language(Tied(by_linear=False)))
layer("two_modules_with_one_parameter", _two_heads, 4)
layer("module_called_in_a_loop", Loop, 4)
layer("module_called_in_a_loop_on_sequences", Loop, N, 4)
function(
    "module_called_on_parts_of_the_batch",
    (4,),
    lambda p, x: torch.cat([F.linear(part, p.w, p.b) for part in x.split(3)]),
    w=(5, 4),
    b=(5,),
)
function(
    "two_shapes_of_input",
    (N, 4),
    lambda p, x: torch.cat([x @ p.w, (x.mean(1) @ p.w).unsqueeze(1)], 1),
    w=(4, 3),
)
function("weight_and_its_transpose", (4,), lambda p, x: torch.tanh(x @ p.w) @ p.w.T, w=(4, 5))
function("weight_as_data", (4,), lambda p, x: x @ p.w + F.linear(p.w, p.w).sum(0), w=(4, 4))
function(
    "weight_penalised_inside", (4,), lambda p, x: x @ p.w * (1 + p.w.square().mean()), w=(4, 5)
)
function("weight_cut_in_two", (4,), lambda p, x: _in_two(p, x), w=(6, 4), b=(6,))


def _in_two(p: Any, x: Tensor) -> Tensor:
    """One packed projection, used by halves, as attention to a memory does."""
    (w1, w2), (b1, b2) = p.w.chunk(2), p.b.chunk(2)
    return F.linear(x, w1, b1) * torch.sigmoid(F.linear(x, w2, b2))


class Branches(nn.Module):
    """A list of layers, a dict of parameters, and a path that depends on the input's length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scales = nn.ParameterDict({"short": torch.ones(4), "long": torch.ones(4)})
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        key = "long" if x.shape[1] > 4 else "short"
        for step in self.layers[: x.shape[1] - 1]:
            x = torch.tanh(step(x)) * self.scales[key]
        return x


layer("branches", Branches, 3, 4)


# Recurrent networks


def recurrent(kind: type[nn.Module], **options: Any) -> nn.Module:
    """Return a small recurrent network that takes observations first."""
    options = {"batch_first": True, **options}
    inner = kind(2, 2, **options)
    return First(inner) if options["batch_first"] else PositionsFirst(inner)


class First(nn.Module):
    """The first of several outputs of a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)[0]


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    _name = _kind.__name__.lower()
    layer(_name, partial(recurrent, _kind), 3, 2)
    layer(f"{_name}_with_positions_first", partial(recurrent, _kind, batch_first=False), N, 2)
layer("lstm_in_both_directions", lambda: recurrent(nn.LSTM, bidirectional=True), 3, 2)
layer("gru_of_two_layers", lambda: recurrent(nn.GRU, num_layers=2, dropout=0.5), 3, 2)


class Cells(nn.Module):
    """Recurrent cells, called position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(2, 2), nn.GRUCell(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, memory, other = None, None, None
        for at in range(x.shape[1]):
            state, memory = self.lstm(x[:, at], None if state is None else (state, memory))
            other = self.gru(state, other)
        return other


layer("recurrent_cells", Cells, 3, 2)


# Mixtures of experts


class Experts(nn.Module):
    """Each token goes to the expert that the router likes best: tokens are sorted by expert."""

    def __init__(self, by_index: bool, n_experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(4, n_experts, bias=False)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(n_experts)])
        self.by_index = by_index

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        parts = []
        for number, expert in enumerate(self.experts):
            if self.by_index:
                at = (chosen == number).nonzero().squeeze(1)
                parts.append(torch.zeros_like(tokens).index_add(0, at, expert(tokens[at])))
            else:
                parts.append(expert(tokens) * (chosen == number).unsqueeze(1))
        return (torch.stack(parts).sum(0) * gate.unsqueeze(1)).reshape(x.shape)


layer("experts_by_index", lambda: Experts(by_index=True), 3, 4)
layer("experts_by_mask", lambda: Experts(by_index=False), N, 4)
function(
    "experts_in_one_product", (3, 4), lambda p, x: _expert_products(p, x), w=(2, 4, 5), r=(4, 2)
)


def _expert_products(p: Any, x: Tensor) -> Tensor:
    gate = (x @ p.r).softmax(-1)
    return torch.einsum("nte,nti,eio->nto", gate, x, p.w)


# Inputs, outputs and likelihoods


class TwoInputs(nn.Module):
    """A sum of two maps of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.first(x) + self.second(z).mean(1)


animal(
    "two_inputs_as_a_tuple", lambda: read(TwoInputs(), (torch.randn(N, 4), torch.randn(N, N, 2)))
)
animal(
    "two_inputs_as_a_dict",
    lambda: read(TwoInputs(), {"z": torch.randn(N, 3, 2), "x": torch.randn(N, 4)}),
)


def _outputs(likelihood: Any, draw: Callable[[tuple[int, ...]], Tensor], *shape: int) -> Scenario:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Scenario(model, torch.randn(N, *shape, 4), likelihood, draw((N, *shape, 3)))


animal("gaussian_outputs", lambda: _outputs(Gaussian(sigma=0.5), torch.randn))
animal("bernoulli_outputs", lambda: _outputs("bernoulli", lambda s: torch.rand(s).round(), 2))
animal("poisson_outputs", lambda: _outputs("poisson", lambda s: torch.rand(s).mul(4).floor()))
animal(
    "a_class_for_each_position",
    lambda: _outputs("categorical", lambda s: torch.randint(0, 3, s[:-1]), N),
)


# Ways of running a model


class Saving(nn.Module):
    """A body whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.inner, self.stem(x), use_reentrant=self.reentrant)
        return h


layer("checkpoint", Saving, 3, 4)
layer(
    "compiled",
    lambda: torch.compile(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5)), backend="eager"
    ),
    3,
    4,
)
layer("traced", lambda: torch.jit.trace(nn.Linear(4, 5), torch.randn(2, 4)), 4)
layer(
    "scripted",
    lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    4,
)
function(
    "custom_function",
    (4,),
    lambda p, x: torch.tanh(HiddenLinear.apply(x, p.hidden)) @ p.seen,
    hidden=(5, 4),
    seen=(5, 3),
)


# What is expected

SINGLE_PRECISION = ("llama_eager", "llama_sdpa", "vit_eager")
"""Entries that compute a part in single precision, so that they agree up to its rounding only."""

PATHS: dict[str, dict[str, str]] = {
    "linear_of_one_observation_each": {"*": "generic"},
    "addmm_with_factors": {"*": "generic"},
    "matmul_of_heads": {"*": "generic"},
    "einsum_of_three": {"*": "generic"},
    "embedding_by_index": {"*": "generic"},
    "embedding_bag_max": {"*": "generic"},
    "embedding_bag_with_weights": {"*": "generic"},
    "embedding_bag_with_offsets": {"*": "generic"},
    "sum_in_place": {"*.w": "generic"},
    "sum_with_a_factor": {"*": "generic"},
    "bilinear": {"*": "generic"},
    "mask_token": {"*": "generic"},
    "module_called_on_parts_of_the_batch": {"*": "generic"},
    "branches": {"*.idle": "unused", "*.long": "unused"},
    "lstm": {"*": "loop"},
    "lstm_with_positions_first": {"*": "loop"},
    "lstm_in_both_directions": {"*": "loop"},
    "gru": {"*": "loop"},
    "gru_with_positions_first": {"*": "loop"},
    "gru_of_two_layers": {"*": "loop"},
    "rnn": {"*": "loop"},
    "rnn_with_positions_first": {"*": "loop"},
    "recurrent_cells": {"*": "loop"},
    "experts_by_index": {"*.experts.*": "loop"},
    "experts_in_one_product": {"*.w": "generic"},
    "traced": {"*": "generic"},
    "scripted": {"*": "generic"},
    "custom_function": {"*.hidden": "generic"},
}
"""The slowest path that parameters may take where it is not by a rule, by patterns of names."""

FASTEST_FIRST = ("rule", "generic", "loop")


def slower_than_expected(name: str, paths: dict[str, str]) -> dict[str, str]:
    """Return the parameters of an entry that took a slower path than they should."""
    expected = dict.fromkeys(paths, "rule")
    for pattern, path in PATHS.get(name, {}).items():
        matching = [parameter for parameter in paths if fnmatchcase(parameter, pattern)]
        assert matching, f"{name} has no parameter like {pattern}"
        expected |= dict.fromkeys(matching, path)
    return {
        parameter: path
        for parameter, path in paths.items()
        if path != expected[parameter] and not _faster(path, expected[parameter])
    }


def _faster(path: str, other: str) -> bool:
    if "unused" in (path, other):
        return False
    return FASTEST_FIRST.index(path) < FASTEST_FIRST.index(other)
