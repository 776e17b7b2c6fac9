"""A small language model of bytes: two texts, a network, its training and its likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ewc_lib.continual import train
from ewc_lib.experiments.cost.models import GPT2
from ewc_lib.experiments.language.texts import (
    VOCABULARY,
    Text,
    documentation,
    sequences,
    source_code,
)
from ewc_lib.fisher import fisher_information
from ewc_lib.regularizers import Regularizer

__all__ = ["adaptable", "language_model", "learn", "log_likelihood", "texts", "token_trace"]


def texts(length: int) -> tuple[Text, Text]:
    """Return documentation and source code, as many sequences of each.

    Parameters
    ----------
    length
        Bytes of a sequence.
    """
    english = sequences(documentation(), length)
    n = len(english.train[0]) + len(english.test[0])
    return english, sequences(source_code(), length, n)


def language_model(protocol: Mapping[str, Any], seed: int) -> GPT2:
    """Return a network that has learned nothing yet.

    Parameters
    ----------
    protocol
        ``width``, ``layers``, ``heads`` and ``length``.
    seed
        Of the weights; the global random state is left as it was.
    """
    shape = {name: protocol[name] for name in ("width", "layers", "heads", "length")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2(VOCABULARY, **shape)


def adaptable(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of the blocks: all but the head.

    Examples
    --------
    >>> adaptable(GPT2(layers=1))[:2]
    ['blocks.0.attention.project', 'blocks.0.attention.out']
    """
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if name != "head"]


class ClassesSecond(nn.Module):
    """A language model whose logits lie where ``cross_entropy`` looks for classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int64[Tensor, "N T"]) -> Float[Tensor, "N V T"]:
        logits: Tensor = self.model(tokens)
        return logits.mT


def learn(
    model: nn.Module,
    data: tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]],
    protocol: Mapping[str, Any],
    *,
    steps: int,
    seed: int,
    regularizer: Regularizer | None = None,
) -> None:
    """Train on the mean cross-entropy of a byte, by Adam.

    Parameters
    ----------
    model
        Returns logits ``[N, T, V]``. Its parameters that require a gradient are trained.
    data
        Inputs and targets.
    protocol
        ``rate`` (of Adam) and ``batch`` (sequences of an update).
    steps
        Number of updates.
    seed
        Of the order of the sequences.
    regularizer
        What holds on to an earlier text. If it has a proximal step, that is taken.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    train(
        ClassesSecond(model),
        data,
        steps=steps,
        seed=seed,
        regularizer=regularizer,
        optimizer=torch.optim.Adam(trainable, lr=protocol["rate"], fused=True),
        proximal=hasattr(regularizer, "proximal_step_"),
        batch_size=protocol["batch"],
        progress=False,
    )


@torch.no_grad()
def log_likelihood(
    model: nn.Module, data: tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]]
) -> float:
    """Return the mean log-likelihood of a byte, in nats; ``exp`` of minus it is the perplexity.

    Parameters
    ----------
    model
        Returns logits ``[N, T, V]``.
    data
        Inputs and targets.

    Examples
    --------
    >>> model = language_model({"width": 8, "layers": 1, "heads": 1, "length": 4}, seed=0)
    >>> tokens = torch.tensor([[1, 2, 3, 4, 5]])
    >>> 200 < math.exp(-log_likelihood(model, (tokens[:, :-1], tokens[:, 1:]))) < 300
    True
    """
    batches = zip(*(part.split(64) for part in data), strict=True)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in batches
    ]
    return -math.fsum(losses) / data[1].numel()


def token_trace(model: nn.Module, data: tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]]) -> float:
    r"""Return the trace of the empirical Fisher of *tokens*, added up over a sequence.

    .. math:: \frac1N \sum_n \sum_t \lVert s_{nt} \rVert^2 , \qquad
              s_{nt} = \nabla_\theta \log p(x_{nt} \mid x_{n,<t}, \theta)

    The empirical Fisher of sequences squares :math:`\sum_t s_{nt}` instead.

    Parameters
    ----------
    model
        Returns logits ``[N, T, V]``.
    data
        Inputs and targets. Each token is an observation of its own: its sequence, with all other
        targets ignored.

    Examples
    --------
    >>> model = language_model({"width": 8, "layers": 1, "heads": 1, "length": 4}, seed=0)
    >>> tokens = torch.tensor([[1, 2, 3, 4, 5]])
    >>> token_trace(model, (tokens[:, :-1], tokens[:, 1:])) > 0
    True
    """

    def each_alone() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(*data, strict=True):
            alone = torch.eye(len(y), dtype=torch.bool, device=y.device)
            yield x.expand(len(y), -1), y.where(alone, -100)

    tokens = fisher_information(model, each_alone(), kind="empirical", progress=False)
    return data[1].shape[1] * tokens.trace().item()
