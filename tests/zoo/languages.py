"""More language models: relative positions, mixtures of experts, encoders with decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.scenarios import N
from tests.zoo.hugging_face import LLAMA, SMALL, hugging_face, text
from tests.zoo.registry import WORDS

T5 = {
    "vocab_size": WORDS,
    "d_model": 4,
    "d_kv": 2,
    "d_ff": 5,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 8,
    "dropout_rate": 0.0,
    "use_cache": False,
}


class Norm(nn.Module):
    """A normalisation by the mean square that keeps the precision of its input."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().clone()), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def in_double_precision(model: nn.Module) -> None:
    """Replace normalisations that compute in single precision whatever they are given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm", "TransformersLayerNorm")):
                setattr(module, name, Norm(child.weight, child.variance_epsilon))


def translations() -> tuple[Any, str, Tensor]:
    """Texts, and the words so far of texts of another length."""
    inputs, likelihood, _ = text("word")
    inputs["decoder_input_ids"] = torch.randint(1, WORDS, (N, 2))
    return inputs, likelihood, torch.randint(0, WORDS, (N, 2))


for _name, _more in {"t5": {}, "t5_gated": {"feed_forward_proj": "gated-gelu"}}.items():
    hugging_face(
        _name,
        "T5Config",
        "T5ForConditionalGeneration",
        translations,
        change=in_double_precision,
        **T5,
        **_more,
    )
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "experts_implementation": "eager"}
hugging_face(
    "mixtral",
    "MixtralConfig",
    "MixtralForCausalLM",
    partial(text, "word"),
    change=in_double_precision,
    num_local_experts=3,
    **EXPERTS,
)
hugging_face(
    "qwen2_moe",
    "Qwen2MoeConfig",
    "Qwen2MoeForCausalLM",
    partial(text, "word"),
    change=in_double_precision,
    num_experts=3,
    moe_intermediate_size=3,
    shared_expert_intermediate_size=4,
    decoder_sparse_step=1,
    **EXPERTS,
)
hugging_face(
    "bloom",
    "BloomConfig",
    "BloomForCausalLM",
    partial(text, "word"),
    vocab_size=WORDS,
    hidden_size=4,
    n_layer=1,
    n_head=2,
    use_cache=False,
)
hugging_face(
    "gpt_neox",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    partial(text, "word"),
    **SMALL,
    max_position_embeddings=4,
    use_cache=False,
)
hugging_face(
    "distilbert",
    "DistilBertConfig",
    "DistilBertForSequenceClassification",
    partial(text, "text"),
    vocab_size=WORDS,
    dim=4,
    n_layers=1,
    n_heads=2,
    hidden_dim=5,
    max_position_embeddings=4,
    num_labels=3,
)
