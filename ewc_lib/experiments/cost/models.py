"""The networks on which the cost of the Fisher information is measured, with data for them.

Weights and data are random, because neither changes the cost, and the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ewc_lib.continual import mlp

__all__ = ["BENCHMARKS", "GPT2", "SEED", "Batches", "Benchmark", "Transformer", "cnn"]

SEED = 0
"""Of all weights and data."""

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
"""Inputs and targets, batch by batch."""


class Benchmark(NamedTuple):
    """A network, its data, and how much of them to use.

    Parameters
    ----------
    title
        What a reader is told.
    build
        Returns the network.
    draw
        Returns so many inputs and targets.
    n
        Number of observations.
    batch_size
        Observations in a batch.
    exact
        Whether one backward pass for each class is within reach.

    Examples
    --------
    >>> benchmark = BENCHMARKS["mlp"]
    >>> [len(targets) for _, targets in benchmark.batches(300)]
    [128, 128, 44]
    >>> sum(p.numel() for p in benchmark.model().parameters())
    478410
    """

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    n: int = 2000
    batch_size: int = 128
    exact: bool = True

    def model(self) -> nn.Module:
        """Return the network in eval mode, without use of the global random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.build().eval()

    def batches(self, n: int) -> Batches:
        """Return ``n`` observations in batches."""
        inputs, targets = self.draw(n, torch.Generator().manual_seed(SEED))
        parts = inputs.split(self.batch_size), targets.split(self.batch_size)
        return list(zip(*parts, strict=True))


def cnn(*, norms: bool = False) -> nn.Sequential:
    """Return three convolutions of 3 × 3 on images of 32 × 32, pooled, and a linear head.

    Parameters
    ----------
    norms
        Whether each convolution has a batch normalisation, with running statistics of its own.

    Examples
    --------
    >>> cnn()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 16), (16, 32), (32, 64)):
        layers.append(nn.Conv2d(n_in, n_out, 3, padding=1))
        if norms:
            layers.append(_used_norm(n_out))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def _used_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch normalisation as training leaves it, not the identity it starts as."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean = 0.1 * torch.randn(channels)
    norm.running_var = 0.5 + torch.rand(channels)
    return norm


class Attention(nn.Module):
    """Self-attention with four projections and the softmax written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        query, key, value = (
            _split(project(x), self.heads) for project in (self.query, self.key, self.value)
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        merged: Tensor = self.out(_merge(scores.softmax(-1) @ value))
        return merged


def _split(x: Float[Tensor, "N T D"], heads: int) -> Float[Tensor, "N heads T D/heads"]:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _merge(x: Float[Tensor, "N heads T D/heads"]) -> Float[Tensor, "N T D"]:
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and two linear layers, each after a norm and added to its input."""

    def __init__(self, width: int, attention: nn.Module, gelu: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = gelu

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        attended: Tensor = self.attention(self.norm1(x))
        x = x + attended
        added: Tensor = self.down(F.gelu(self.up(self.norm2(x)), approximate=self.gelu))
        return x + added


class Transformer(nn.Module):
    """An encoder of tokens with a classifier on the mean over positions.

    Parameters
    ----------
    vocabulary
        Number of tokens.
    length
        Longest sequence.
    width
        Size of the vector of a token.
    layers, heads, classes
        Numbers of blocks, of attention heads and of outputs.

    Examples
    --------
    >>> Transformer()(torch.zeros(2, 32, dtype=torch.long)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        vocabulary: int = 256,
        length: int = 32,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *(Block(width, Attention(width, heads), "none") for _ in range(layers))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Int64[Tensor, "N T"]) -> Float[Tensor, "N C"]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.blocks(self.token(tokens) + self.position(positions))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class CausalAttention(nn.Module):
    """Self-attention of GPT-2: one projection for all three, and no look ahead."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        query, key, value = (_split(part, self.heads) for part in self.project(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged: Tensor = self.out(_merge(mixed))
        return merged


class GPT2(nn.Module):
    """A language model built as GPT-2 is (Radford et al. 2019), its head tied to its embedding.

    Parameters
    ----------
    vocabulary
        Number of tokens.
    length
        Longest sequence.
    width
        Size of the vector of a token.
    layers, heads
        Numbers of blocks and of attention heads.

    Examples
    --------
    >>> GPT2(layers=1)(torch.zeros(2, 128, dtype=torch.long)).shape
    torch.Size([2, 128, 1000])
    """

    def __init__(
        self,
        vocabulary: int = 1000,
        length: int = 128,
        width: int = 256,
        layers: int = 6,
        heads: int = 8,
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *(Block(width, CausalAttention(width, heads), "tanh") for _ in range(layers))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Int64[Tensor, "N T"]) -> Float[Tensor, "N T V"]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.blocks(self.token(tokens) + self.position(positions))
        logits: Tensor = self.head(self.norm(x))
        return logits


def _vectors(
    n: int, generator: torch.Generator, shape: tuple[int, ...], classes: int
) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(n, *shape, generator=generator)
    return inputs, torch.randint(classes, (n,), generator=generator)


def _sequences(
    n: int, generator: torch.Generator, length: int, vocabulary: int, classes: int
) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (n, length), generator=generator)
    return tokens, torch.randint(classes, (n,), generator=generator)


def _text(
    n: int, generator: torch.Generator, length: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Return tokens, and for each of them the one that comes next."""
    tokens = torch.randint(vocabulary, (n, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


_images = partial(_vectors, shape=(3, 32, 32), classes=10)

BENCHMARKS = {
    "mlp": Benchmark(
        "MLP 784-400-400-10",
        partial(mlp, (784, 400, 400, 10), SEED),
        partial(_vectors, shape=(784,), classes=10),
    ),
    "cnn": Benchmark("CNN", cnn, _images),
    "cnn-norms": Benchmark("CNN with norms", partial(cnn, norms=True), _images),
    "transformer": Benchmark(
        "Transformer", Transformer, partial(_sequences, length=32, vocabulary=256, classes=10)
    ),
    # A batch holds as many tokens as half a batch of the transformer, so that memory stays small,
    # and there are as many batches as elsewhere.
    "gpt2": Benchmark(
        "GPT-2-like, 6 layers",
        GPT2,
        partial(_text, length=128, vocabulary=1000),
        n=250,
        batch_size=16,
        exact=False,
    ),
}
"""All benchmarks, by the name that the command line knows."""
