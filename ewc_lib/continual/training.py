"""The plain training loop of the chapters, with room for one penalty."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ewc_lib._progress import progress as show_progress
from ewc_lib.ewc import EWC

__all__ = ["mlp", "train"]


def mlp(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between its linear layers.

    Parameters
    ----------
    sizes
        Numbers of inputs, of units of each hidden layer, and of outputs.
    seed
        Seed of the initial weights; the global random state is not used.

    Examples
    --------
    >>> sum(p.numel() for p in mlp((64, 64, 64, 10), seed=0).parameters())
    8970
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    modules: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        modules += [nn.ReLU(), layer]
    return nn.Sequential(*modules)


def train(
    model: nn.Module,
    data: tuple[Float[Tensor, "N D"], Int[Tensor, " N"]],
    *,
    steps: int,
    seed: int,
    ewc: EWC | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    on_step: Callable[[int], None] | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Train a classifier by Adam on the mean cross-entropy, plus a penalty if there is one.

    Parameters
    ----------
    model
        Changed in place.
    data
        Inputs ``[N, D]`` and labels ``[N]``. They are shuffled before each pass.
    steps
        Number of updates. A fixed number of updates, not of passes, makes data sets of
        different sizes cost the same.
    seed
        Seed of the order of the data; the global random state is not used.
    ewc
        The penalty of earlier tasks.
    batch_size
        Observations for each update.
    learning_rate
        Of Adam; 1e-3 is its usual value.
    on_step
        Called with the number of updates done, after each of them; to watch the training.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    list of float
        The loss of the task, without the penalty, before each update.

    Examples
    --------
    >>> from ewc_lib import data
    >>> digits = data.digits()
    >>> losses = train(mlp((64, 32, 10), seed=0), digits.train, steps=100, seed=0)
    >>> losses[-1] < losses[0]
    True
    """
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    losses = []
    model.train()
    for step in show_progress(range(1, steps + 1), "training", progress):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        batch, order = order[:batch_size].to(x.device), order[batch_size:]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        if ewc is not None:
            ewc.add_gradient_()
        optimizer.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step)
    return torch.stack(losses).tolist() if losses else []
