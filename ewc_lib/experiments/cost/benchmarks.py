"""What is measured: the networks, the data for them, and how much of it on which device.

Weights and data are random, because neither changes the cost, and the same every time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost.models import GPT2, Transformer, cnn, resnet

__all__ = ["BENCHMARKS", "LARGE", "SEED", "Batches", "Benchmark", "benchmarks"]

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
    device
        Where the network and the data are. Both are drawn on the processor, so that they are the
        same everywhere.

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
    device: str = "cpu"

    def model(self) -> nn.Module:
        """Return the network in eval mode, without use of the global random state."""
        return copy.deepcopy(_built(self.build, torch.get_default_dtype())).to(self.device)

    def batches(self, n: int) -> Batches:
        """Return ``n`` observations in batches."""
        drawn = self.draw(n, torch.Generator().manual_seed(SEED))
        parts = (tensor.to(self.device).split(self.batch_size) for tensor in drawn)
        return list(zip(*parts, strict=True))


@lru_cache(maxsize=1)
def _built(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build a network once, as long as no other is asked for: large ones take seconds.

    It is built in the default precision, which therefore tells one from another.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build().eval()


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
    """Return tokens, and for each of them the one that comes next, as libraries want to view it."""
    tokens = torch.randint(vocabulary, (n, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


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
"""Those that a processor can measure, by the name that the command line knows."""

LARGE = {
    "resnet18": Benchmark(
        "ResNet-18, 100 classes",
        resnet,
        partial(_vectors, shape=(3, 32, 32), classes=100),
        n=1024,
    ),
    "gpt2-124m": Benchmark(
        "GPT-2 124M",
        partial(GPT2, vocabulary=50_257, length=1024, width=768, layers=12, heads=12),
        partial(_text, length=256, vocabulary=50_257),
        n=32,
        batch_size=8,
        exact=False,
    ),
}
"""Those that only an accelerator measures: here a plain pass over their data takes a minute."""

ON_ACCELERATOR = {"mlp": 8192, "cnn": 4096, "cnn-norms": 4096, "transformer": 2048, "gpt2": 256}
"""Observations there: enough that what is paid once, as the certificate, does not decide."""


def benchmarks(device: str = "cpu") -> dict[str, Benchmark]:
    """Return what is measured on a device: on an accelerator more data, and larger models too.

    Parameters
    ----------
    device
        As PyTorch names it, ``"cpu"`` or ``"cuda"``.

    Examples
    --------
    >>> [(name, b.n) for name, b in benchmarks("cuda").items() if name not in benchmarks()]
    [('resnet18', 1024), ('gpt2-124m', 32)]
    """
    if torch.device(device).type == "cpu":
        return BENCHMARKS
    found = {**BENCHMARKS, **LARGE}
    sizes = {name: ON_ACCELERATOR.get(name, benchmark.n) for name, benchmark in found.items()}
    return {name: b._replace(n=sizes[name], device=device) for name, b in found.items()}
