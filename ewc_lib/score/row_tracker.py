"""Whether each row of a batch stays where it is, whatever the values are.

A boolean mask, an order by length or a choice of experts puts the rows of a batch in other places
in every batch. So may whatever a program does after it has looked at a value, and whatever is
computed out of sight. Here are the operations that leave each row in its place; nothing is known
about any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves


def _found(names: str) -> Iterator[Any]:
    """Return the operations of these names, as functions and as methods."""
    for name in names.split():
        for place in (torch, Tensor, F, torch.special, torch.fft, torch.linalg):
            if (operation := getattr(place, name, None)) is not None:
                yield operation


_ENTRY_BY_ENTRY = set(
    _found(
        "add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide "
        "floor_divide remainder fmod neg neg_ negative pow pow_ float_power sqrt sqrt_ rsqrt "
        "rsqrt_ reciprocal reciprocal_ square square_ exp exp_ expm1 exp2 log log_ log1p log2 "
        "log10 sin sin_ cos cos_ tan asin acos atan atan2 sinh cosh tanh tanh_ asinh acosh "
        "atanh sigmoid sigmoid_ relu relu_ relu6 leaky_relu elu elu_ selu celu gelu silu mish "
        "hardswish hardsigmoid hardtanh softplus softsign tanhshrink softshrink hardshrink "
        "threshold logsigmoid erf erfc erfinv lgamma digamma abs abs_ sign sgn floor ceil round "
        "round_ trunc frac clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip maximum "
        "minimum fmax fmin lerp addcmul addcmul_ addcdiv addcdiv_ masked_fill masked_fill_ eq "
        "ne lt le gt ge isnan isinf isfinite isneginf logical_and logical_or logical_not "
        "logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor logaddexp hypot copysign "
        "heaviside nan_to_num sinc logit expit log_expit conj real imag view_as_real "
        "view_as_complex complex polar angle dropout alpha_dropout feature_dropout dropout1d "
        "dropout2d dropout3d dropout_ prelu glu swiglu one_hot to type type_as float double "
        "half bfloat16 long int bool clone detach contiguous zero_ fill_ zeros_like ones_like "
        "empty_like full_like new_zeros new_ones new_empty new_full new_tensor requires_grad_ "
        "cpu cuda copy_ positive resolve_conj broadcast_tensors __add__ __radd__ __iadd__ "
        "__sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ "
        "__itruediv__ __floordiv__ "
        "__mod__ __pow__ __rpow__ __neg__ __abs__ __pos__ __invert__ __and__ __or__ __xor__ "
        "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ retain_grad"
    )
)
"""Entry by entry, with any number of operands."""

_BY_FORM = set(
    _found(
        "view reshape flatten unflatten ravel transpose transpose_ swapaxes swapdims t permute "
        "movedim moveaxis unsqueeze unsqueeze_ squeeze squeeze_ expand expand_as broadcast_to "
        "view_as reshape_as repeat repeat_interleave tile unbind chunk split tensor_split "
        "hsplit vsplit narrow select unfold fold pad roll flip fliplr flipud rot90 tril triu "
        "diag_embed diagonal cat concat concatenate stack hstack vstack dstack column_stack "
        "atleast_1d atleast_2d interpolate upsample pixel_shuffle "
        "pixel_unshuffle channel_shuffle max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d "
        "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _max_pool1d _max_pool2d "
        "_max_pool3d lp_pool1d lp_pool2d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn "
        "irfftn fftshift ifftshift stft istft __getitem__ __len__ size dim ndimension numel "
        "nelement stride is_floating_point is_complex element_size storage_offset is_contiguous "
        "get_device data_ptr is_signed"
    )
)
"""By shapes alone, if no later operand comes from the data."""

_ALL = None
_ALONG_AXES: dict[Any, tuple[int, int | None]] = {
    function: (position, default)
    for names, position, default in (
        (
            "sum mean prod amax amin aminmax max min var std var_mean std_mean median nanmedian "
            "nansum nanmean logsumexp argmax argmin any all count_nonzero",
            1,
            _ALL,
        ),
        ("norm vector_norm quantile", 2, _ALL),
        ("softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp", 1, _ALL),
        ("sort argsort mode", 1, -1),
        ("topk kthvalue diff", 2, -1),
        ("normalize cosine_similarity", 2, 1),
    )
    for function in _found(names)
}
"""Along some axes, of which none may be that of the observations.

Where the axes stand among the arguments, and which they are by default.
"""

_BY_CONSTANTS = set(
    _found(
        "linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
        "layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm embedding "
        "embedding_bag bilinear"
    )
)
"""Of one operand from the data with others that do not come from them."""

_FORM_ONLY: dict[Any, int] = {
    **dict.fromkeys(
        _found("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full"), 0
    ),
    **dict.fromkeys(_found("to type_as expand_as view_as reshape_as"), 1),
}
"""Operations that take only shape, type or device from their arguments after the first few."""

_PRODUCTS = set(
    _found("matmul mm bmm mv baddbmm einsum tensordot inner dot __matmul__ __rmatmul__")
)
"""Sums of products: of two operands from the data only if observations stay apart in both."""

_BATCHED = set(_found("matmul bmm baddbmm __matmul__ __rmatmul__"))

_ATTENTION = {F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention}


def values_read(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments that a result is computed from.

    Left out is what only lends its shape or type, and what chooses one of several matrices for
    all observations.
    """
    if function is Tensor.__getitem__:
        choice = args[1] if isinstance(args[1], tuple) else args[1:]
        return args[: 1 if all(map(_is_number, choice)) else None]
    return args[: _FORM_ONLY.get(function)]


def _is_number(index: Any) -> bool:
    return not isinstance(index, Tensor) or (index.dim() == 0 and index.dtype != torch.bool)


class RowTracker:
    """Watches whether values may have decided what became of which row.

    Parameters
    ----------
    n
        The number of observations.
    inputs
        What the model is given.
    is_constant
        Whether a tensor does not depend on the data.

    Attributes
    ----------
    in_place
        Whether each row is known to have stayed where it was.
    """

    def __init__(
        self, n: int, inputs: Iterable[Tensor], is_constant: Callable[[Tensor], bool]
    ) -> None:
        self.in_place = True
        self._n = n
        self._is_constant = is_constant
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self.see(inputs)

    def see(self, known: Iterable[Tensor]) -> None:
        """Take note of tensors of which it is known how they were computed."""
        self._seen.update((id(t), weakref.ref(t)) for t in known)

    def check(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operation before it is computed."""
        if self.in_place:
            self.in_place = self._stays(function, args, kwargs)

    def _stays(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        data = [t for t in tensors((args, kwargs)) if not self._is_constant(t)]
        if not data:
            return True
        if not args or not all(map(self._is_seen, data)):
            return False  # computed out of sight
        if function in _ENTRY_BY_ENTRY or function in _ATTENTION:
            return True
        if function is torch.where or function is Tensor.where:
            return len(args) + len(kwargs) > 1
        if function is Tensor.register_hook:  # those of PyTorch itself, as of counters, only look
            return str(getattr(args[1], "__module__", "")).startswith("torch.")
        if function is Tensor.__setitem__:
            return all(self._is_constant(t) for t in tensors(args[1]))
        if function in _BY_FORM or getattr(function, "__name__", "") == "__get__":
            return self._is_by_form(function, args, kwargs)
        if function in _ALONG_AXES:
            return self._is_along_other_axes(function, args, kwargs)
        if function in _BY_CONSTANTS:
            return len(data) < 2
        return function in _PRODUCTS and (len(data) < 2 or self._is_apart(function, args, data))

    def _is_by_form(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        first, places = args[0], tensors((args[1 : _FORM_ONLY.get(function)], kwargs))
        if function is Tensor.__getitem__ and self._is_constant(first):
            # Each observation may read its rows of a table that is the same for all.
            return all(place.dim() for place in places)
        return all(map(self._is_constant, places))

    def _is_along_other_axes(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        place, default = _ALONG_AXES[function]
        given = args[place] if len(args) > place else default
        axes = kwargs.get("dim", kwargs.get("axis", given))
        if isinstance(axes, Tensor):
            return True  # the larger of two, entry by entry
        if isinstance(axes, int) and not isinstance(axes, bool):
            axes = (axes,)
        if not isinstance(axes, tuple | list) or not axes:
            return bool(args[0].dim() == 0)
        return all(self._is_other(args[0].shape, axis) for axis in axes)

    def _is_other(self, sizes: torch.Size, axis: int) -> bool:
        """Whether an axis is none of the observations, which lie along the first if they can."""
        if not -len(sizes) <= axis < len(sizes):
            return False
        first = sizes[0] == self._n or self._n not in sizes
        return axis % len(sizes) != 0 if first else sizes[axis] != self._n

    def _is_apart(self, function: Any, args: tuple[Any, ...], data: list[Tensor]) -> bool:
        if function is torch.einsum and isinstance(args[0], str) and "->" in args[0]:
            terms, _, output = args[0].replace(" ", "").partition("->")
            first = {term[:1] for term in (*terms.split(","), output)}
            return len(first) == 1 and first != {""}
        return function in _BATCHED and all(t.dim() > 2 for t in data)

    def _is_seen(self, tensor: Tensor) -> bool:
        known = self._seen.get(id(tensor))
        return known is not None and known() is tensor


def tensors(*values: Any) -> list[Tensor]:
    """Return all tensors in nested values; most operations nest none."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            found += (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return found
