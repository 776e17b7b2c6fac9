"""Complex parameters, and real ones that become complex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.registry import WORDS, Functional, animal, function, read, stir


class Complex(Functional):
    """A function of the inputs and of raw complex parameters."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__(function)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.complex128)))


def complex_function(name: str, shape: tuple[int, ...], f: Callable[..., Tensor], **shapes: Any):
    """Register a function of raw complex parameters on random real inputs of a shape."""
    animal(name, lambda: read(Complex(f, **shapes), torch.randn(N, *shape, dtype=torch.float64)))


def real(z: Tensor) -> Tensor:
    """Put real and imaginary parts side by side."""
    return torch.view_as_real(z).flatten(-2)


def analytic(x: Tensor) -> Tensor:
    """Make real inputs complex."""
    return torch.complex(x, x.roll(1, -1).cos())


complex_function(
    "complex_filter", (6,), lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * p.w, 6), w=(4,)
)
complex_function(
    "complex_filter_of_channels",
    (2, 6),
    lambda p, x: torch.fft.irfft(torch.einsum("nif,iof->nof", torch.fft.rfft(x), p.w), 6),
    w=(2, 3, 4),
)
complex_function(
    "complex_filter_in_a_plane",
    (4, 4),
    lambda p, x: torch.fft.irfft2(torch.fft.rfft2(x) * p.w, (4, 4)),
    w=(4, 3),
)
complex_function(
    "complex_linear", (4,), lambda p, x: real(analytic(x) @ p.w + p.b), w=(4, 3), b=(3,)
)
complex_function(
    "complex_linear_on_sequences", (3, 4), lambda p, x: real(analytic(x) @ p.w), w=(4, 3)
)
complex_function(
    "complex_mlp",
    (4,),
    lambda p, x: (torch.tanh(analytic(x) @ p.w) @ p.v).abs(),
    w=(4, 4),
    v=(4, 3),
)
complex_function("complex_of_real_inputs", (4,), lambda p, x: real(x.to(p.w) @ p.w), w=(4, 3))
complex_function(
    "complex_scale_and_shift", (3, 4), lambda p, x: real(analytic(x) * p.w + p.b), w=(4,), b=(3, 1)
)
complex_function(
    "complex_squared_length", (4,), lambda p, x: (analytic(x) @ p.w).abs().square(), w=(4, 3)
)
complex_function("complex_conjugate", (4,), lambda p, x: real(analytic(x) @ p.w.conj()), w=(4, 3))
complex_function(
    "complex_by_parts", (4,), lambda p, x: x @ p.w.real + torch.tanh(x @ p.w.imag), w=(4, 3)
)
complex_function(
    "complex_product_of_three",
    (4,),
    lambda p, x: real(torch.einsum("ni,ir,ro->no", analytic(x), p.a, p.b)),
    a=(4, 2),
    b=(2, 3),
)


class Mixed(nn.Module):
    """A real layer, a complex filter, a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.rfft(torch.tanh(self.first(x)))
        return self.last(torch.fft.irfft(h * self.w, 6))


animal(
    "complex_filter_between_real_layers",
    lambda: read(stir(Mixed().double()), torch.randn(N, 4, dtype=torch.float64)),
)
animal(
    "complex_table",
    lambda: read(
        Complex(lambda p, x: real(p.w[x] * p.v), w=(WORDS, 3), v=(3,)),
        torch.randint(0, WORDS, (N, 2)),
    ),
)


# Real parameters that become complex

function(
    "made_complex_by_pairs", (6,), lambda p, x: _filtered(x, torch.view_as_complex(p.w)), w=(4, 2)
)
function(
    "made_complex_by_parts",
    (6,),
    lambda p, x: _filtered(x, torch.complex(p.a, p.b)),
    a=(4,),
    b=(4,),
)
function(
    "made_complex_by_length_and_angle",
    (6,),
    lambda p, x: _filtered(x, torch.polar(p.r.exp(), p.angle)),
    r=(4,),
    angle=(4,),
)
function(
    "made_complex_by_a_transform", (6,), lambda p, x: _filtered(x, torch.fft.rfft(p.w)), w=(6,)
)
function(
    "made_complex_by_a_transform_of_a_plane",
    (4, 4),
    lambda p, x: torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.fft2(p.w)).real,
    w=(4, 4),
)
function(
    "made_complex_by_a_cast",
    (4,),
    lambda p, x: real(analytic(x.double()) @ p.w.to(torch.complex128)),
    w=(4, 3),
)
function(
    "made_complex_by_an_exponential",
    (6,),
    lambda p, x: _filtered(x, torch.exp(torch.complex(-p.decay.exp(), p.frequency))),
    decay=(4,),
    frequency=(4,),
)
function(
    "made_complex_as_a_state",
    (3, 2),
    lambda p, x: _state(x, torch.exp(torch.complex(-p.decay.exp(), p.frequency)), p.w),
    decay=(2,),
    frequency=(2,),
    w=(2, 2),
)
function(
    "made_complex_and_used_as_it_is",
    (6,),
    lambda p, x: _filtered(x, torch.fft.rfft(p.w)) * p.w,
    w=(6,),
)
function(
    "inputs_made_complex",
    (6,),
    lambda p, x: torch.fft.rfft(x @ p.w).abs(),
    w=(6, 5),
)


def _filtered(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * w, 6)


def _state(x: Tensor, rate: Tensor, w: Tensor) -> Tensor:
    """Run a diagonal state-space model over the positions."""
    state = torch.zeros_like(x[:, 0]) * rate
    for at in range(x.shape[1]):
        state = state * rate + x[:, at] @ w
    return state.real
