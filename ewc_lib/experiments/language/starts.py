"""Two pairs of tasks, models that have learned the first of a pair, and fine-tuning on the other.

The digits upright and turned, by a perceptron; English documentation and source code, by a small
language model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, nll_loss

from ewc_lib import data
from ewc_lib.continual import mlp, rotated, train
from ewc_lib.experiments.language.model import ClassesSecond, language_model, texts
from ewc_lib.fisher import Fisher, MatrixFree, fisher_information
from ewc_lib.fisher.estimate import Structure
from ewc_lib.fisher.output import Kind
from ewc_lib.likelihood import Categorical
from ewc_lib.quadratic import QuadraticPenalty

__all__ = [
    "Examples",
    "Start",
    "State",
    "Task",
    "begin",
    "measured",
    "rows_of",
    "tuned",
]

Examples: TypeAlias = tuple[Tensor, Tensor]
State: TypeAlias = Mapping[str, Tensor]


class Task(NamedTuple):
    """Data to train on, to choose settings on, and to report."""

    train: Examples
    valid: Examples
    test: Examples


class Start(NamedTuple):
    """A model that has learned task A, both tasks, and what is known of A.

    Parameters
    ----------
    model
        Returns logits with the classes second.
    a, b
        The tasks.
    old
        Observations of A that may be used while B is learned.
    seen
        Those that the Fisher information is computed from.
    fisher
        The Fisher information, by structure.
    whole
        All of it, from the old observations.
    said
        Logarithms of the probabilities that the model gives on the test data of both tasks.
    likelihood
        Of an observation; None for classes.
    terms
        Terms of the mean loss in one observation: the bytes of a sequence.
    kind
        Of the Fisher information.
    """

    model: nn.Module
    a: Task
    b: Task
    old: Examples
    seen: Examples
    fisher: Mapping[Structure, Fisher]
    whole: MatrixFree
    said: tuple[Tensor, Tensor]
    likelihood: Categorical | None
    terms: int
    kind: Kind


@lru_cache(maxsize=8)
def begin(protocol: str, name: str, seed: int) -> Start:
    """Learn task A, and compute its Fisher information from the old observations.

    Parameters
    ----------
    protocol
        As :data:`.fine_tuning.PROTOCOL`, in JSON. ``old`` is the number of old observations, and
        ``seen`` that of those for the Fisher information, by default the same.
    name
        ``"digits"`` or ``"texts"``.
    seed
        Of the weights, the order of the data and the old observations.
    """
    settings = json.loads(protocol)
    own = settings[name]
    make = {"digits": _digits, "texts": _texts}[name]
    model, a, b, likelihood, terms = make(own, seed)
    for steps, rate in zip(own["steps_a"], (own["rate_a"], own["rate_a"] / 10), strict=True):
        adam = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        options = {"steps": steps, "batch_size": own["batch"], "progress": False}
        train(model, a.train, seed=seed, optimizer=adam, **options)
    rows = torch.randperm(len(a.train[0]), generator=torch.Generator().manual_seed(seed))
    old, seen = (
        rows_of(a.train, rows[:n]) for n in (settings["old"], settings.get("seen", settings["old"]))
    )
    measure = partial(fisher_information, model, seen, likelihood, progress=False)
    kind: Kind = "sketch" if terms > 1 else "exact"
    structures: tuple[Structure, ...] = "diagonal", "kronecker"
    fisher = {s: measure(kind=kind, structure=s) for s in structures}
    whole = MatrixFree(model, old, likelihood)
    with torch.no_grad():
        said = model(a.test[0]).log_softmax(1), model(b.test[0]).log_softmax(1)
    return Start(model, a, b, old, seen, fisher, whole, said, likelihood, terms, kind)


def _digits(own: Mapping[str, Any], seed: int) -> tuple[nn.Module, Task, Task, None, int]:
    """Return a perceptron, and the digits upright and turned."""
    images = data.digits()
    upright, turned = (
        Task(rows_of(t.train, slice(300, None)), rows_of(t.train, slice(300)), t.test)
        for t in rotated(images, [0, own["angle"]])
    )
    sizes = (images.n_features, own["hidden"], own["hidden"], images.n_classes)
    return mlp(sizes, seed), upright, turned, None, 1


def _texts(own: Mapping[str, Any], seed: int) -> tuple[nn.Module, Task, Task, Categorical, int]:
    """Return a language model, and two texts."""
    english, code = (
        Task(t.train, rows_of(t.test, slice(0, None, 2)), rows_of(t.test, slice(1, None, 2)))
        for t in texts(own["length"])
    )
    model = ClassesSecond(language_model(own, seed))
    return model, english, code, Categorical(class_dim=1), own["length"]


def rows_of(examples: Examples, rows: Any) -> Examples:
    """Return some of the examples."""
    x, y = examples
    return x[rows], y[rows]


def tuned(
    start: Start,
    own: Mapping[str, Any],
    regularizer: Any,
    at: Iterable[int] = (),
    *,
    rate: float,
    seed: int,
    proximal: str | bool = True,
) -> dict[int, State]:
    """Fine-tune by Adam from the start, which stays as it was.

    Parameters
    ----------
    start
        Where to start.
    own
        ``steps`` and ``batch``, as in :data:`.fine_tuning.PROTOCOL`.
    regularizer
        What holds on to task A.
    at
        Numbers of updates.
    rate
        The learning rate.
    seed
        Of the order of the data.
    proximal
        The metric in which a quadratic penalty makes its proximal step; or False, for its gradient.

    Returns
    -------
    dict
        The weights after each of these numbers of updates, and after all.
    """
    model = start.model
    before = copy.deepcopy(model.state_dict())
    wanted, passed = {*at, own["steps"]}, dict[int, State]()

    def note(done: int) -> None:
        if done in wanted:
            passed[done] = copy.deepcopy(model.state_dict())

    adam = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    has_step = isinstance(regularizer, QuadraticPenalty)
    form: dict[str, Any] = {"proximal": proximal if has_step else False}
    train(
        model,
        start.b.train,
        steps=own["steps"],
        seed=seed,
        regularizer=regularizer,
        optimizer=adam,
        **form,
        batch_size=own["batch"],
        on_step=note,
        progress=False,
    )
    model.load_state_dict(before)
    return passed


@torch.no_grad()
def measured(start: Start, weights: State) -> dict[str, list[float]]:
    """Return what some weights are worth, and how far they have gone.

    Parameters
    ----------
    start
        The model, both tasks, and what the model said.
    weights
        Of the model.

    Returns
    -------
    dict
        ``losses``, the mean losses on validation A and B and on test A and B; ``kl``, the mean
        divergence of what is said from what was said, on test A and B; in nats for each term.
    """
    model = copy.deepcopy(start.model)
    model.load_state_dict(weights)
    found = [cross_entropy(model(x), y) for x, y in (start.a.valid, start.b.valid)]
    kl = []
    for (x, y), before in zip((start.a.test, start.b.test), start.said, strict=True):
        now = model(x).log_softmax(1)
        found.append(nll_loss(now, y))
        kl.append(kl_div(now, before, reduction="sum", log_target=True) / y.numel())
    return {
        name: [round(v.item(), 5) for v in own] for name, own in (("losses", found), ("kl", kl))
    }
