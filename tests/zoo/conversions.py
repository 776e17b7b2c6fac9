"""Models that convert their own modules to the type of what they are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.hugging_face import hugging_face
from tests.zoo.languages import T5, in_double_precision, translations
from tests.zoo.names import Low
from tests.zoo.registry import layer


class Converting(nn.Module):
    """A network that converts a part of itself, or all, to a type that it has already."""

    def __init__(self, whole: bool, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.low = Low(4)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            self.to(x.device, x.dtype)
        else:
            self.first = self.first.to(x.dtype)
        return self.low(torch.tanh(self.first(x)))


layer("converts_a_layer", lambda: Converting(False, nn.Linear(4, 4)), 4)
layer("converts_a_convolution", lambda: Converting(False, nn.Conv1d(2, 2, 2)), 2, 5)
layer("converts_itself", lambda: Converting(True, nn.Linear(4, 4)), 3, 4)
hugging_face(
    "switch_transformer",
    "SwitchTransformersConfig",
    "SwitchTransformersForConditionalGeneration",
    translations,
    change=in_double_precision,
    num_experts=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    expert_capacity=64,
    num_decoder_layers=1,
    **{key: value for key, value in T5.items() if key != "use_cache"},
)
