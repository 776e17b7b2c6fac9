r"""A small language model that has learned English documentation and goes on with Python source.

All weights are trained, plainly or with a penalty, or low-rank adapters are. What counts is the
*perplexity* on held-out bytes of both texts, :math:`\exp` of the mean of
:math:`-\log p(x_t \mid x_{<t})`.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ewc_lib.ewc import EWC
from ewc_lib.experiments.cost.models import GPT2
from ewc_lib.experiments.language.model import (
    adaptable,
    language_model,
    learn,
    log_likelihood,
    texts,
)
from ewc_lib.experiments.language.texts import Text
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.report import interval
from ewc_lib.experiments.runs.store import Run, run_all
from ewc_lib.experiments.runs.strengths import decades, held_out
from ewc_lib.regularizers import L2, AdapterEWC, add_adapters

__all__ = ["METHODS", "PROTOCOL", "comparison", "flat", "table"]

METHODS = "none", "L2", "EWC", "LoRA", "LoRA, EWC", "joint"
"""Plain training; with a penalty; only adapters; adapters with a penalty; both texts at once."""

PROTOCOL: Mapping[str, Any] = {
    "width": 128,
    "layers": 2,
    "heads": 4,
    "length": 128,
    "rank": 8,
    "steps_a": 1500,
    "steps_b": 300,
    "batch": 16,
    "rate": 3e-3,
    "kind": "sketch",
    "grids": {"L2": decades(-1, 2), "EWC": decades(1, 4), "LoRA, EWC": decades(-2, 1)},
}
"""Every text is learned by Adam; full training takes the proximal step of its penalty.

The grids are where a network of another seed showed an exchange between the texts. Those of full
training and of adapters are not on one scale: Adam rescales a gradient, and no proximal step.
"""


def comparison(
    path: Path = OUTPUT / "language_models.json",
    *,
    seeds: int = 3,
    protocol: Mapping[str, Any] = PROTOCOL,
    methods: Sequence[str] = METHODS,
    workers: int = 1,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Learn documentation, then source code, with each method and strength.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    seeds
        Each sets the initial weights and the order of the sequences.
    protocol
        Shape of the network, rank of the adapters, updates for each text, batch size, learning
        rate, kind of the Fisher information, and strengths for each method.
    methods, workers, fresh, progress
        As in :func:`ewc_lib.experiments.structures.beyond_diagonal.comparison`, with
        :data:`METHODS`.

    Returns
    -------
    dict
        As :func:`.run_all` returns it, one run for each method and seed; :func:`flat` reads it.

    Raises
    ------
    ValueError
        As :func:`.run_all`.
    """
    return run_all(
        path,
        partial(_play, protocol),
        [{"method": method, "seed": seed} for seed, method in product(range(seeds), methods)],
        experiment="language-models",
        data="standard library",
        protocol=protocol,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )


@lru_cache(maxsize=1)
def _learned(protocol: str, seed: int) -> tuple[Text, Text, GPT2, float]:
    """Return both texts, a network that has learned the first, and the seconds that took."""
    settings = json.loads(protocol)
    english, code = texts(settings["length"])
    model = language_model(settings, seed)
    start = time.perf_counter()
    learn(model, english.train, settings, steps=settings["steps_a"], seed=seed)
    return english, code, model, time.perf_counter() - start


def _play(protocol: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Learn documentation, then source code once for each strength."""
    method, seed = run["method"], run["seed"]
    english, code, learned, seconds_training = _learned(json.dumps(protocol), seed)
    model = copy.deepcopy(learned)
    if "LoRA" in method:
        generator = torch.Generator().manual_seed(seed)
        add_adapters(model, adaptable(model), protocol["rank"], generator=generator)
    optimum = copy.deepcopy(model.state_dict())
    start = time.perf_counter()
    regularizer = _regularizer(method, model, protocol["kind"])
    if regularizer is not None:
        regularizer.consolidate(english.train)
    seconds_consolidation = time.perf_counter() - start
    data = code.train
    if method == "joint":
        x, y = (torch.cat(parts) for parts in zip(english.train, code.train, strict=True))
        data = x, y
    found: dict[str, list[float]] = {"documentation": [], "code": []}
    strengths = protocol["grids"][method] if regularizer is not None else [0.0]
    for strength in strengths:
        model.load_state_dict(optimum)
        if regularizer is not None:
            regularizer.strength = strength
        steps = protocol["steps_b"]
        learn(model, data, protocol, steps=steps, seed=seed + 1, regularizer=regularizer)
        found["documentation"].append(log_likelihood(model, english.test))
        found["code"].append(log_likelihood(model, code.test))
    return {
        "strengths": list(strengths),
        **{name: [round(value, 5) for value in values] for name, values in found.items()},
        "before": [round(log_likelihood(learned, text.test), 5) for text in (english, code)],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sequences": len(english.train[0]),
        "seconds_training": round(seconds_training, 2),
        "seconds_consolidation": round(seconds_consolidation, 2),
    }


def _regularizer(method: str, model: nn.Module, kind: Any) -> EWC | L2 | AdapterEWC | None:
    """Return what holds on to a text, its strength still 0."""
    if method == "EWC":
        return EWC(model, 0.0, kind=kind)
    if method == "L2":
        return L2(model, 0.0)
    return AdapterEWC(model, 0.0, kind=kind) if method == "LoRA, EWC" else None


def flat(result: Mapping[str, Any], **wanted: Any) -> list[Run]:
    """Return one run for each method, seed and strength.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    **wanted
        Settings that the runs must have, as ``method="EWC"``.

    Returns
    -------
    list of dict
        Each with the log-likelihood of a held-out byte of both texts, ``documentation`` and
        ``code``, and their mean ``both``, in nats.
    """
    found = []
    for run in result["runs"]:
        if all(run[name] == value for name, value in wanted.items()):
            columns = (run[name] for name in ("strengths", "documentation", "code"))
            for strength, english, code in zip(*columns, strict=True):
                settings = {"method": run["method"], "seed": run["seed"], "strength": strength}
                outcome = {"documentation": english, "code": code, "both": (english + code) / 2}
                found.append({**settings, **outcome})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return perplexities of both texts, at strengths chosen by the other seeds, as text.

    Parameters
    ----------
    result
        As :func:`comparison` returns it, with at least two seeds.
    """
    methods = dict.fromkeys(run["method"] for run in result["runs"])
    lines = [_line(method, flat(result, method=method)) for method in methods]
    return "\n".join(["perplexity      documentation          code", *lines])


def _line(method: str, runs: Iterable[Run]) -> str:
    chosen = held_out(runs, "both")
    columns = ([math.exp(-run[text]) for run in chosen] for text in ("documentation", "code"))
    cells = (f"{sum(c) / len(c):6.2f} ± {interval(c):.2f}" for c in columns)
    return f"{method:15} " + "   ".join(cells)
