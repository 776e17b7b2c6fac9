"""The networks on which the cost of the Fisher information is measured.

Weights are random, because they do not change the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

__all__ = ["GPT2", "Transformer", "cnn", "resnet"]


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


class Residual(nn.Module):
    """Two convolutions with norms, added to what came in."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.first, self.norm1 = _convolution(n_in, n_out, 3, stride), norm(n_out)
        self.second, self.norm2 = _convolution(n_out, n_out, 3, 1), norm(n_out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.skip = nn.Sequential(_convolution(n_in, n_out, 1, stride), norm(n_out))

    def forward(self, x: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.skip(x))


def _convolution(n_in: int, n_out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False)


def resnet(
    blocks: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    classes: int = 100,
    *,
    colours: int = 3,
    norm: Callable[[int], nn.Module] = _used_norm,
) -> nn.Sequential:
    """Return a residual network for small images (He et al. 2016); by default the one of 18 layers.

    Parameters
    ----------
    blocks
        Residual blocks of each stage. A stage halves the image and doubles the width of the last.
    width
        Channels of the first stage.
    classes
        Number of outputs.
    colours
        Channels of an image.
    norm
        Makes a norm for so many channels; by default one as training leaves it.

    Examples
    --------
    >>> resnet((1, 1), width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    layers: list[nn.Module] = [_convolution(colours, width, 3, 1), norm(width), nn.ReLU()]
    n_in = width
    for stage, n_blocks in enumerate(blocks):
        n_out = width * 2**stage
        for block in range(n_blocks):
            layers.append(Residual(n_in, n_out, 2 if stage and not block else 1, norm))
            n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))


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
