"""Which rule belongs to which operation, and which of its arguments are parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_lib.score.recurrent import RECURRENT
from ewc_lib.score.rules import (
    Broadcast,
    Convolution,
    Einsum,
    OuterProduct,
    Rows,
    Rule,
    Scale,
    TransposedConvolution,
)


@dataclass(frozen=True)
class Later:
    """An input that is computed from one that is kept anyway, when it is needed.

    Attributes
    ----------
    input
        What the operation was given.
    change
        From that to what the rule needs, in the same shape.
    """

    input: Tensor
    change: Callable[[Tensor], Tensor]

    def __call__(self) -> Tensor:
        """Compute it."""
        return self.change(self.input)


Match: TypeAlias = Iterator[tuple[Tensor, Rule, Callable[[], Tensor] | None]]
"""Parameters that an operation may use: the tensor, its rule, and how to get the other input.

What is only added needs no other input.
"""

_MATCHERS: dict[Any, Callable[..., Match]] = {}


def match(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Match:
    """Find the rules of an operation; yield nothing where there are none."""
    matcher = _MATCHERS.get(function)
    try:
        yield from matcher(*args, **kwargs) if matcher is not None else ()
    except TypeError:  # called with arguments that the rule does not know
        return


def inside(function: Any) -> Callable[..., Any] | None:
    """Return a composite operation as Python code whose own operations can be watched."""
    if function is not F.multi_head_attention_forward:
        return _COMPOSITES.get(function) or RECURRENT.get(function)
    visible = {**function.__globals__, "has_torch_function": lambda tensors: False}
    code = FunctionType(function.__code__, visible, function.__name__, function.__defaults__)
    code.__kwdefaults__ = function.__kwdefaults__
    return code


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """Give every observation a learned mask of its own, as a bias of positions is."""
    if attn_mask is not None and attn_mask.requires_grad:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    attend = torch.ops.aten.scaled_dot_product_attention
    return attend(query, key, value, attn_mask, *rest, **options)


def _grouped_mm(input: Tensor, mat2: Tensor, offs: Tensor | None = None, **options: Any) -> Any:
    """Multiply the rows of one group after the other by its matrix."""
    if offs is None or mat2.dim() < 3 or any(value is not None for value in options.values()):
        return torch.ops.aten._grouped_mm(input, mat2, offs, **options)
    ends = offs.tolist()
    bounds = enumerate(zip([0, *ends], ends, strict=False))
    groups = [input[start:end] @ mat2[number] for number, (start, end) in bounds if end > start]
    rest = input.new_zeros(len(input) - ends[-1], mat2.shape[-1])
    return torch.cat([*groups, rest])


_COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    getattr(torch, "_grouped_mm", None): _grouped_mm,
}


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _matches(*functions: Any) -> Callable[[Callable[..., Match]], Callable[..., Match]]:
    def register(matcher: Callable[..., Match]) -> Callable[..., Match]:
        _MATCHERS.update(dict.fromkeys(functions, matcher))
        return matcher

    return register


# Linear maps


@_matches(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Match:
    if weight.dim() == 2:
        yield weight, OuterProduct(weight.shape), _given(input)
    if bias is not None:
        yield bias, Broadcast(bias.shape), None


@_matches(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Match:
    yield mat2, OuterProduct(mat2.shape, transposed=True), _given(mat1)
    yield input, Broadcast(input.shape), None


@_matches(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor) -> Match:
    if other.dim() == 2 <= input.dim():
        yield other, OuterProduct(other.shape, transposed=True), _given(input)
    if input.dim() == 2 <= other.dim():
        yield input, OuterProduct(input.shape, from_left=True), _given(other)
    if other.dim() == 1 < input.dim():
        yield other, Einsum(other.shape, "n...i,n...->ni"), _given(input)
    if input.dim() == other.dim() == 3:
        yield from _bmm(input, other)


@_matches(torch.bmm, Tensor.bmm)
def _bmm(input: Tensor, mat2: Tensor) -> Match:
    yield mat2, Einsum(mat2.shape, "nbij,nbik->nbjk"), _given(input)
    yield input, Einsum(input.shape, "nbjk,nbik->nbij"), _given(mat2)


@_matches(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor) -> Match:
    yield from _bmm(batch1, batch2)
    yield input, Broadcast(input.shape), None


@_matches(torch.einsum)
def _einsum(equation: str, *operands: Any) -> Match:
    subscripts, arrow, output = equation.replace(" ", "").partition("->")
    terms = subscripts.split(",")
    if len(terms) != 2 or len(operands) != 2 or not isinstance(operands[0], Tensor):
        return
    if not arrow:  # the letters that stand alone, in the order of the alphabet
        letters = sorted(set(subscripts) - set(".,"))
        output = "..." * ("..." in subscripts)
        output += "".join(letter for letter in letters if subscripts.count(letter) == 1)
    free = next(letter for letter in "zyxwvutsrqponmlkjihgfedcba" if letter not in equation)
    for (own, tensor), (term, other) in (
        tuple(zip(terms, operands, strict=True)),
        tuple(zip(reversed(terms), reversed(operands), strict=True)),
    ):
        if "..." not in own and set(own) <= set(term + output) and len(set(own)) == len(own):
            rule = Einsum(tensor.shape, f"{free}{term},{free}{output}->{free}{own}")
            yield tensor, rule, _given(other)


# Convolutions


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Match:
    if input.dim() != weight.dim():
        return
    kernel = weight.shape[2:]
    dilations = _each(dilation, kernel)
    pads = _padding(padding, kernel, dilations)
    rule = Convolution(weight.shape, _each(stride, kernel), pads, dilations, groups)
    yield weight, rule, _given(input)
    if bias is not None:
        yield bias, Broadcast(bias.shape, trailing=len(kernel)), None


_matches(F.conv1d, F.conv2d, F.conv3d)(_convolution)


@_matches(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Match:
    for tensor, rule, other in _convolution(input, weight, bias, stride, padding, dilation, groups):
        if isinstance(rule, Convolution):
            fields = (rule.stride, rule.padding, rule.dilation, rule.groups)
            rule = TransposedConvolution(rule.shape, *fields)
        yield tensor, rule, other


def _each(value: Any, kernel: torch.Size) -> tuple[int, ...]:
    """One number for each dimension of space."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _padding(
    padding: Any, kernel: torch.Size, dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after; an odd number of them has one more after."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        sizes = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((size // 2, size - size // 2) for size in sizes)
    return tuple((size, size) for size in _each(padding, kernel))


# Tables


@_matches(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Match:
    if max_norm is None and not scale_grad_by_freq:
        yield weight, Rows(weight.shape, _row(padding_idx, weight)), _given(input)


@_matches(F.embedding_bag)
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Match:
    plain = max_norm is None and not scale_grad_by_freq and per_sample_weights is None
    if plain and offsets is None and mode in ("sum", "mean"):
        yield weight, Rows(weight.shape, _row(padding_idx, weight), mode), _given(input)


@_matches(Tensor.__getitem__)
def _getitem(input: Tensor, index: Any) -> Match:
    if isinstance(index, Tensor) and index.dim() and index.dtype in (torch.long, torch.int):
        yield input, Rows(input.shape), lambda: index % len(input)


@_matches(torch.index_select, Tensor.index_select)
def _index_select(input: Tensor, dim: int, index: Tensor) -> Match:
    if dim == 0 and index.dim() == 1:
        yield input, Rows(input.shape), _given(index)


def _row(index: int | None, table: Tensor) -> int | None:
    return None if index is None else index % len(table)


# Normalisations: the parameters scale and shift what has been normalised.


def _affine(
    weight: Tensor | None,
    bias: Tensor | None,
    trailing: int,
    input: Tensor,
    normalise: Callable[[Tensor], Tensor],
) -> Match:
    if weight is not None:
        yield weight, Scale(weight.shape, trailing), Later(input.detach(), normalise)
    if bias is not None:
        yield bias, Broadcast(bias.shape, trailing), None


@_matches(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Match:
    yield from _affine(weight, bias, 0, input, lambda x: F.layer_norm(x, normalized_shape, eps=eps))


@_matches(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Match:
    yield from _affine(weight, None, 0, input, lambda x: F.rms_norm(x, normalized_shape, eps=eps))


@_matches(F.group_norm)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Match:
    yield from _affine(
        weight, bias, input.dim() - 2, input, lambda x: F.group_norm(x, num_groups, eps=eps)
    )


@_matches(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Match:
    if not training:
        yield from _affine(
            weight,
            bias,
            input.dim() - 2,
            input,
            lambda x: F.batch_norm(x, running_mean, running_var, eps=eps),
        )


@_matches(F.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Match:
    statistics = (None, None) if use_input_stats else (running_mean, running_var)
    yield from _affine(
        weight,
        bias,
        input.dim() - 2,
        input,
        lambda x: F.instance_norm(x, *statistics, use_input_stats=use_input_stats, eps=eps),
    )


# Entry by entry


@_matches(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(input: Any, other: Any) -> Match:
    for parameter, rest in ((input, other), (other, input)):
        if isinstance(parameter, Tensor) and isinstance(rest, Tensor):
            yield parameter, Broadcast(parameter.shape), None


@_matches(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _mul(input: Any, other: Any) -> Match:
    for parameter, rest in ((input, other), (other, input)):
        if isinstance(parameter, Tensor) and isinstance(rest, Tensor):
            shape = torch.broadcast_shapes(parameter.shape, rest.shape)
            yield parameter, Scale(parameter.shape), _given(rest.expand(shape))


@_matches(torch.sub, Tensor.sub, Tensor.__sub__)
def _sub(input: Any, other: Any) -> Match:
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        shape = torch.broadcast_shapes(input.shape, other.shape)
        yield input, Broadcast(input.shape), None
        yield other, Scale(other.shape), lambda: input.new_tensor(-1).expand(shape)


@_matches(torch.div, Tensor.div, Tensor.__truediv__)
def _div(input: Any, other: Any) -> Match:
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        shape = torch.broadcast_shapes(input.shape, other.shape)
        yield input, Scale(input.shape), lambda: (1 / other.detach()).expand(shape)
        yield other, Scale(other.shape), lambda: -(input / other.square()).detach()


@_matches(torch.where)
def _where(condition: Tensor, input: Any, other: Any) -> Match:
    tensors = [t for t in (condition, input, other) if isinstance(t, Tensor)]
    chosen = condition.expand(torch.broadcast_shapes(*(t.shape for t in tensors)))
    if isinstance(input, Tensor):
        yield input, Scale(input.shape), _given(chosen)
    if isinstance(other, Tensor):
        yield other, Scale(other.shape), lambda: ~chosen


@_matches(Tensor.where)
def _where_of(input: Tensor, condition: Tensor, other: Any) -> Match:
    yield from _where(condition, input, other)


@_matches(torch.masked_fill, Tensor.masked_fill)
def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> Match:
    yield from _where(mask, value, input)


@_matches(Tensor.expand, Tensor.expand_as, torch.broadcast_to)
def _expand(input: Tensor, *size: Any) -> Match:
    yield input, Broadcast(input.shape), None


@_matches(Tensor.repeat)
def _repeat(input: Tensor, *repeats: Any) -> Match:
    times = repeats[0] if isinstance(repeats[0], tuple | list) else repeats
    own = times[len(times) - input.dim() :]
    if all(size == 1 or n == 1 for size, n in zip(input.shape, own, strict=True)):
        yield input, Broadcast(input.shape), None


@_matches(F.prelu, torch.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Match:
    yield weight, Scale(weight.shape, trailing=max(0, input.dim() - 2)), lambda: input.clamp(max=0)
