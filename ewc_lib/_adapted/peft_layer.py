"""Layers of the library peft, whose forward pass says what their weight is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ewc_lib._adapted._twin import twin_of, wide
from ewc_lib._parameters import Vector

QUANTISED = "Params4bit", "Int8Params"
"""Weights that bitsandbytes keeps in 4 or 8 bits."""

ADDED = "lora_A", "lora_embedding_A", "hada_w1_a", "lokr_w1", "lokr_w1_a"
"""Where layers keep the factors of adapters that add something to the weight."""

_UNPACKED = WeakIdKeyDictionary()
"""The values of weights of 4 bits on a processor. There bitsandbytes packs a weight in another
order, and rounds it, when it is first used in eval mode without gradients. Training moved nothing.
"""


class PeftLayer:
    r"""A layer of peft.

    With LoRA its weight is :math:`W_0 + s B A`; with DoRA row by row

    .. math:: W = m\, \frac{W_0 + s B A}{\lVert W_0 + s B A \rVert}.

    Other adapters are asked for what they add (LoHa, LoKr), or shown the identity matrix.
    :meth:`check` compares all that with what the layer computes.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        layer: Any = module  # whose attributes no type knows
        self.layer, self.base = layer, layer.get_base_layer()
        if not isinstance(getattr(self.base, "weight", None), Tensor):
            raise self._refusal("the layer below has no weight")
        if getattr(self.layer.base_layer, "base_layer", None) is not None:
            raise self._refusal("it is an adapter of another adapter")

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Tell whether a module is such a layer, without an import of peft."""
        known = sys.modules.get("peft.tuners.tuners_utils")
        return known is not None and isinstance(module, known.BaseTunerLayer)

    def tensors(self) -> Vector:
        """Return the weight and the bias that the layer uses, differentiable."""
        if self.layer.disable_adapters and self.layer.merged:
            self.layer.unmerge()  # as its next forward pass would
        bias = getattr(self.base, "bias", None)
        found = {"weight": self._base_weight()} | ({} if bias is None else {"bias": bias})
        names = [] if self.layer.disable_adapters or self.layer.merged else self._active()
        if names and not self._is_known(names):
            return self._shown_by_the_identity()
        for name in names:
            found = self._with(name, found)
        return found

    def plain(self, parameters: Vector) -> nn.Module:
        """Return a layer without adapters that has these parameters."""
        if type(self.base.weight).__name__ not in QUANTISED:
            return twin_of(self.base, parameters, type(self.base))
        n_outputs, n_inputs = parameters["weight"].shape
        plain = nn.Linear(n_inputs, n_outputs, bias=False, device="meta")
        return twin_of(plain, parameters, nn.Linear)

    @torch.no_grad()
    def check(self) -> None:
        """Compare what the adapters add to the outputs with what the weight adds.

        Raises
        ------
        ValueError
            If they differ, so that no such weight is the one of this layer.
        """
        if self.layer.merged or self.layer.disable_adapters:
            return
        inputs = self._inputs()
        bias = getattr(self.base, "bias", None)
        before = {"weight": self._base_weight()} | ({} if bias is None else {"bias": bias})
        with _evaluating(self.module):
            base = self.base.forward(inputs)
            added = self.layer.forward(inputs) - base
        given = wide(inputs) if inputs.is_floating_point() else inputs
        after, first = (
            self.plain({key: wide(t) for key, t in tensors.items()}).forward(given)
            for tensors in (self.tensors(), before)
        )
        error, size = torch.dist(after - first, added), added.norm()
        rounding = 32 * torch.finfo(base.dtype).eps * base.norm()
        if not error <= 0.02 * size + rounding:
            raise self._refusal("what it computes is not that of one weight")

    def _refusal(self, why: str) -> ValueError:
        kind = f"{type(self.layer).__module__}.{type(self.layer).__name__}"
        return ValueError(
            f"the layer {self.path!r} ({kind}) has no weight W that could be held: {why}. Leave it "
            "without an adapter, or hold the model with EWC"
        )

    def _base_weight(self) -> Tensor:
        """Return the frozen weight below the adapters, or what merging has made of it."""
        weight = self.base.weight
        if type(weight).__name__ != "Params4bit" or weight.device.type != "cpu":
            read: Any = sys.modules["peft.utils.integrations"]
            return wide(read.dequantize_module_weight(self.base))
        if weight not in _UNPACKED:
            _UNPACKED[weight] = self._read_4_bits()
        unpacked: Tensor = _UNPACKED[weight]
        return unpacked

    @torch.no_grad()
    def _read_4_bits(self) -> Tensor:
        """Return the values of a weight, by its layer if it is packed for inference."""
        weight = self.base.weight
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            library: Any = sys.modules["bitsandbytes"]
            return wide(library.functional.dequantize_4bit(weight.data, weight.quant_state))
        columns = wide(self.base.forward(torch.eye(self.base.in_features).requires_grad_())).T
        return columns if self.base.bias is None else columns - wide(self.base.bias)[:, None]

    def _active(self) -> list[str]:
        available = self.layer._get_available_adapters()
        return [name for name in self.layer.active_adapters if name in available]

    def _is_known(self, names: list[str]) -> bool:
        """Tell whether all these adapters add something to the weight."""
        return all(any(name in self._of(kind) for kind in ADDED) for name in names)

    def _of(self, kind: str) -> Any:
        """Return what the layer has of a kind, by the names of its adapters."""
        return getattr(self.layer, kind, {})

    def _with(self, name: str, found: Vector) -> Vector:
        """Apply one adapter to the weight and the bias."""
        added = self._added(name)
        weight = found["weight"] + added
        magnitudes = self._of("lora_magnitude_vector")
        if name in magnitudes:
            weight = weight * self._factor(wide(magnitudes[name].weight), added)
        bias = found.get("bias")
        if bias is not None and self._of("lora_bias").get(name):
            bias = wide(bias) + self.layer.scaling[name] * wide(self.layer.lora_B[name].bias)
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def _added(self, name: str) -> Tensor:
        """Return what one adapter adds, in the orientation of the weight."""
        factors, tables = self._of("lora_A"), self._of("lora_embedding_A")
        if name in tables:
            product = (wide(self.layer.lora_embedding_B[name]) @ wide(tables[name])).T
        elif name in factors and isinstance(factors[name], nn.Linear):
            product = wide(self.layer.lora_B[name].weight) @ wide(factors[name].weight)
            product = product.T if self._is_transposed else product
        else:
            try:
                delta: Tensor = self.layer.get_delta_weight(name)
            except RuntimeError as error:  # as for convolutions in groups
                raise self._refusal(f"peft cannot merge its adapter: {error}") from error
            return wide(delta).reshape(self.base.weight.shape)
        scaling: float = self.layer.scaling[name]
        return scaling * product

    def _factor(self, magnitude: Tensor, added: Tensor) -> Tensor:
        """Return what DoRA multiplies a weight by, for each of its outputs.

        The length is that of the weight below with this adapter alone. The adapter's own forward
        pass takes it for a constant; here it has a gradient, too.
        """
        output = 1 if self._is_transposed or isinstance(self.base, nn.Embedding) else 0
        weight = self._base_weight() + added
        axes = [axis for axis in range(weight.dim()) if axis != output]
        lengths = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
        factor: Tensor = magnitude.reshape(lengths.shape) / lengths
        return factor

    @property
    def _is_transposed(self) -> bool:
        kind = type(self.base).__name__
        return bool(getattr(self.layer, "fan_in_fan_out", False)) or kind == "Conv1D"

    def _shown_by_the_identity(self) -> Vector:
        """Return the weight and the bias that a layer has, whatever its adapters are."""
        with _evaluating(self.module):
            if isinstance(self.base, nn.Embedding):
                words = torch.arange(self.base.num_embeddings, device=self.base.weight.device)
                return {"weight": wide(self.layer.forward(words))}
            if self._base_weight().dim() != 2:
                raise self._refusal("this kind of adapter is known for linear maps only")
            n = self._n_inputs
            rows = torch.cat([torch.eye(n), torch.zeros(1, n)]).to(self._base_weight())
            *columns, bias = wide(self.layer.forward(rows.to(self.dtype)))
        weight = torch.stack(columns) - bias
        has_bias = getattr(self.base, "bias", None) is not None
        return {"weight": weight if self._is_transposed else weight.T} | (
            {"bias": bias} if has_bias else {}
        )

    @property
    def _n_inputs(self) -> int:
        return int(self._base_weight().shape[0 if self._is_transposed else 1])

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the layer below is run."""
        weight: Tensor = self.base.weight
        computed: torch.dtype | None = getattr(self.base, "compute_dtype", None)
        return weight.dtype if weight.is_floating_point() else computed or torch.float32

    def _inputs(self) -> Tensor:
        """Return some inputs of this layer, drawn at random."""
        generator, weight = torch.Generator().manual_seed(0), self.base.weight
        if isinstance(self.base, nn.Embedding):
            drawn = torch.randint(self.base.num_embeddings, (8,), generator=generator)
            return drawn.to(weight.device)
        if isinstance(self.base, nn.modules.conv._ConvNd):
            reach = zip(self.base.kernel_size, self.base.dilation, strict=True)
            shape = [2, self.base.in_channels, *(2 + d * (k - 1) for k, d in reach)]
        else:
            shape = [8, self._n_inputs]
        drawn = torch.randn(shape, generator=generator).to(weight.device, self.dtype)
        return drawn.requires_grad_()  # else bitsandbytes takes it for inference, and packs weights


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, and nothing else: a mode that is set by hand has no other effect."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
