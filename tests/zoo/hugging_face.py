"""Hugging Face models, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.scenarios import CLASSES, N, Scenario
from tests.zoo.registry import WORDS, animal, stir


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


def text(labels: str) -> tuple[Any, str, Tensor]:
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


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
}
GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 4,
    "n_head": 2,
    "n_layer": 1,
    "n_inner": 5,
    "n_positions": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 4}
for _attention in ("eager", "sdpa"):
    _options = {"attn_implementation": _attention}
    hugging_face(
        f"gpt2_{_attention}",
        "GPT2Config",
        "GPT2LMHeadModel",
        partial(text, "word"),
        **GPT2,
        **_options,
    )
    hugging_face(
        f"bert_{_attention}",
        "BertConfig",
        "BertForSequenceClassification",
        partial(text, "text"),
        **SMALL,
        max_position_embeddings=4,
        num_labels=CLASSES,
        **_options,
    )
    hugging_face(
        f"llama_{_attention}",
        "LlamaConfig",
        "LlamaForCausalLM",
        partial(text, "word"),
        **LLAMA,
        **_options,
    )
    hugging_face(
        f"vit_{_attention}",
        "ViTConfig",
        "ViTForImageClassification",
        _images,
        **{key: value for key, value in SMALL.items() if key != "vocab_size"},
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
    partial(text, "word"),
    **GPT2,
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
    partial(text, "word"),
    change=_double_norms,
    attn_implementation="sdpa",
    **LLAMA,
)
