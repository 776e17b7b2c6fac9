"""Tables that are looked up."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.scenarios import N, Scenario
from tests.zoo.registry import WORDS, Functional, animal, on_words, read

on_words("embedding", lambda: nn.Embedding(WORDS, 3), 4)
on_words("embedding_of_single_words", lambda: nn.Embedding(WORDS, 3))
on_words("embedding_with_padding", lambda: nn.Embedding(WORDS, 3, padding_idx=0), N)
on_words("embedding_with_sparse_gradients", lambda: nn.Embedding(WORDS, 3, sparse=True), 4)
on_words("embedding_by_index", lambda: Functional(lambda p, x: p.w[x], w=(WORDS, 3)), 4)
on_words("numbers_by_index", lambda: Functional(lambda p, x: p.w[x] * p.w, w=(WORDS,)), WORDS)
on_words(
    "matrices_by_index",
    lambda: Functional(
        lambda p, x: p.w[x.reshape(-1)].sum(-1).unflatten(0, (-1, 4)), w=(WORDS, 2, 3)
    ),
    4,
)
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
