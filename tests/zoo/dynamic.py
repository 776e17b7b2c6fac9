"""Weights that depend on the observation, and operations that sample or differentiate inside."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, spectral_norm

from tests.scenarios import N
from tests.zoo.registry import Functional, animal, function, layer, read, stir


class Hyper(nn.Module):
    """A linear map whose weight another network makes for each observation."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.bias = nn.Linear(3, 8), nn.Linear(3, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        weight = self.maker(z).unflatten(1, (2, 4))
        return torch.baddbmm(self.bias(z).unsqueeze(2), weight, x.unsqueeze(2)).squeeze(2)


animal("weights_of_each_observation", lambda: read(Hyper(), (torch.randn(N, 4), torch.randn(N, 3))))
function(
    "weights_mixed_for_each_observation",
    (4,),
    lambda p, x: torch.einsum("ne,eio,ni->no", (x @ p.router).softmax(1), p.w, x),
    router=(4, 3),
    w=(3, 4, 2),
)
function(
    "weights_called_in_vmap",
    (4,),
    lambda p, x: vmap(lambda row: torch.tanh(p.w @ row) + p.b)(x),
    w=(3, 4),
    b=(3,),
)
function(
    "modulated_features",
    (3, 4),
    lambda p, x: x * (x.mean(1) @ p.scale).unsqueeze(1) + (x.mean(1) @ p.shift).unsqueeze(1),
    scale=(4, 4),
    shift=(4, 4),
)
function(
    "filters_of_each_observation",
    (2, 6),
    lambda p, x: F.conv1d(
        x.reshape(1, -1, 6), (x.mean(2) @ p.w).reshape(-1, 1, 3), groups=2 * len(x)
    ).reshape(len(x), 2, 4),
    w=(2, 6),
)
function(
    "filters_of_each_position",
    (2, 6),
    lambda p, x: torch.einsum(
        "nclk,nkl->ncl", F.pad(x, (1, 1)).unfold(2, 3, 1), torch.einsum("kc,ncl->nkl", p.w, x)
    ),
    w=(3, 2),
)
function(
    "convolution_by_unfold_and_einsum",
    (2, 4, 4),
    lambda p, x: torch.einsum("npl,op->nol", F.unfold(x, 3), p.w),
    w=(3, 18),
)
function(
    "convolution_by_unfold_and_product", (2, 4, 4), lambda p, x: p.w @ F.unfold(x, 2), w=(3, 8)
)


def _deformed(p: Any, x: Tensor) -> Tensor:
    """Sample a plane where a convolution says, then convolve."""
    grid = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), -1, -1), x.shape, False)
    offsets = 0.1 * F.conv2d(x, p.offsets, padding=1).movedim(1, -1)
    sampled = F.grid_sample(x, grid + offsets, align_corners=False)
    return F.conv2d(sampled, p.w)


function("deformed_convolution", (2, 4, 4), _deformed, offsets=(2, 2, 3, 3), w=(3, 2, 2, 2))


def _transformed(p: Any, x: Tensor) -> Tensor:
    theta = (x.flatten(1) @ p.w).unflatten(1, (2, 3)) * 0.1 + torch.eye(2, 3).to(x)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, False), align_corners=False)


function("spatial_transformer", (1, 3, 3), _transformed, w=(9, 6))


# Derivatives inside


class Force(nn.Module):
    """The gradient of an energy with respect to the input, as molecular models return it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force


class Slope(Force):
    """The same by the functional interface."""

    def forward(self, x: Tensor) -> Tensor:
        return vmap(grad(lambda row: self.energy(row).squeeze()))(x)


class Directional(Force):
    """The derivative of an energy in one direction, forward."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(jvp(self.energy, (x,), (torch.ones_like(x),)), 1)


class Inner(nn.Module):
    """A network that is called with a parameter of another form in the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tanh(self.inner.weight) * self.scale
        return functional_call(self.inner, {"weight": weight}, (x,))


class AdaptsItself(nn.Module):
    """One step of gradient descent on each observation before its output is given."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        def loss(w: Tensor, row: Tensor) -> Tensor:
            return (w @ row).square().sum() + w.square().sum() / 10

        steps = vmap(grad(loss), (None, 0))(self.w, x)
        return torch.einsum("noi,ni->no", self.w - 0.1 * steps, x)


layer("gradient_inside", Force, 4)
layer("gradient_by_the_functional_interface_inside", Slope, 4)
layer("directional_derivative_inside", Directional, 4)
layer("functional_call_inside", Inner, 4)
layer("adapts_to_each_observation", AdaptsItself, 4)


def _fixed_point(p: Any, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(4):
        z = torch.tanh(z @ p.w / 4 + x @ p.u)
    return z


function("fixed_point", (4,), _fixed_point, w=(4, 4), u=(4, 4))
function(
    "least_squares_of_each_observation",
    (3, 2),
    lambda p, x: torch.linalg.solve(x.mT @ x + p.w @ p.w.T + torch.eye(2).to(x), (x @ p.v).mT),
    w=(2, 2),
    v=(2, 2),
)


# Weights that are computed from parameters


def _old_spectral_norm() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


layer("spectral_norm_of_the_old_style", _old_spectral_norm, 4)
layer(
    "spectral_norm_of_a_convolution",
    lambda: parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)),
    2,
    4,
)
layer(
    "conv_transpose1d_in_groups_and_dilated",
    lambda: nn.ConvTranspose1d(4, 4, 3, groups=2, dilation=2, stride=2, padding=1),
    4,
    3,
)
layer(
    "conv_transpose3d_in_groups_with_a_remainder",
    lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, output_padding=1, groups=2),
    2,
    1,
    2,
    1,
)
function("weight_standardised", (2, 5), lambda p, x: F.conv1d(x, _standard(p.w)), w=(3, 2, 2))
function(
    "weight_by_a_kronecker_product", (4,), lambda p, x: x @ torch.kron(p.a, p.b), a=(2, 2), b=(2, 2)
)
function("weight_below_a_diagonal", (4,), lambda p, x: x @ p.w.tril(), w=(4, 4))
function("weight_that_is_symmetric", (4,), lambda p, x: x @ (p.w + p.w.T), w=(4, 4))
function("weight_with_a_mask", (4,), lambda p, x: x @ (p.w * (p.w.detach() > 0)), w=(4, 4))
function("weight_gathered", (4,), lambda p, x: x @ p.w[torch.tensor([0, 1, 1, 0])], w=(2, 3))


def _standard(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2), True)) / (w.std((1, 2), keepdim=True) + 1e-5)


# Containers


class Contained(nn.Module):
    """Parameters in a list and in a dict, and buffers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 3)])
        self.dict = nn.ParameterDict({"shift": torch.randn(3), "scale": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.list:
            x = torch.tanh(x @ weight)
        return x * self.dict["scale"] + self.dict["shift"]


layer("parameters_in_containers", Contained, 4)
animal(
    "parameters_of_a_dict_chosen_by_the_input",
    lambda: read(
        stir(
            Functional(
                lambda p, x, z: torch.where(z.unsqueeze(1), x @ p.even, x @ p.odd),
                even=(4, 3),
                odd=(4, 3),
            )
        ),
        (torch.randn(N, 4), torch.arange(N) % 3 == 0),
    ),
)


class Nested(nn.Module):
    """A linear map of a nested tensor, made of as much of each observation as is there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return torch.nested.to_padded_tensor(torch.tanh(self.linear(nested)), 0.0, (len(x), 3, 3))


animal(
    "nested_tensors",
    lambda: read(stir(Nested()), (torch.randn(N, 3, 4), torch.arange(N) % 3 + 1)),
)
