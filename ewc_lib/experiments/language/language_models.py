r"""A small language model that has learned English documentation and goes on with Python source.

Fourteen ways to keep the first text, with as many settings each, which are chosen on validation
data of both texts. What counts is the mean log-likelihood of a byte of both texts, and the curve of
what is learned against what is lost.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ewc_lib.experiments.language.fine_tuning import flat
from ewc_lib.experiments.language.starts import begin, measured
from ewc_lib.experiments.language.ways import points
from ewc_lib.experiments.runs.choosing import Choice, choose
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.paired import Paired, paired
from ewc_lib.experiments.runs.store import Run, run_all

__all__ = ["METHODS", "PROTOCOL", "best", "choice", "comparison", "gain", "perplexity", "table"]

METHODS = (
    "learning rate",
    "early stopping",
    "averaging",
    "Fisher averaging",
    "L2",
    "EWC",
    "EWC, euclidean",
    "EWC, averaging",
    "replay",
    "joint",
    "LoRA",
    "LoRA, L2",
    "LoRA, EWC on factors",
    "LoRA, EWC",
)
"""A rate alone; fewer updates; weights between before and after (Wortsman et al. 2022), and each
weight by its Fisher information (Matena and Raffel 2022); the squared distance to the start (Li,
Grandvalet and Davoine 2018); EWC, in the metric of Adam and in that of a plain step, and weights
between before the first of them and after it; a few old sequences
in every update, and all of them; adapters (Hu et al. 2022) alone, with the squared size of their
products, with EWC of their factors, and with EWC of the weights that they make (Zheng et al. 2026).
"""

RATES = [3e-4, 1e-3, 3e-3]
OF_ADAPTERS = [6e-4, 2e-3, 6e-3, 2e-2]

PROTOCOL: Mapping[str, Any] = {
    "texts": {
        "width": 48,
        "layers": 1,
        "heads": 4,
        "length": 32,
        "rank": 4,
        "steps_a": [1000, 200],
        "rate_a": 3e-3,
        "steps": 100,
        "batch": 16,
    },
    "old": 100,
    "seen": 300,
    "metric": "optimizer",
    "rates": {
        "plain": [3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2],
        **dict.fromkeys(("replay", "joint", "EWC, euclidean"), RATES),
        "L2": [1e-4, *RATES],
        "EWC": [*RATES, 1e-2],
        "LoRA": [1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2],
        **dict.fromkeys(("LoRA, L2", "LoRA, EWC on factors", "LoRA, EWC"), OF_ADAPTERS),
    },
    "settings": {
        "along": [1e-4, *RATES],
        "early stopping": [0.25, 0.5, 0.75],
        "averaging": [0.4, 0.6, 0.8],
        "Fisher averaging": [0.4, 0.6, 0.8],
        "replay": [0.1, 0.3, 1.0, 3.0],
        "joint": [0.1, 0.3, 1.0, 3.0],
        "LoRA": [0.0],
        "LoRA, L2": [0.5, 2.0, 10.0, 50.0],
        "LoRA, EWC on factors": [1.0, 5.0, 20.0, 100.0],
        "LoRA, EWC": [1.0, 5.0, 20.0, 100.0],
        "L2": [0.03, 0.1, 0.3, 1.0],
        "EWC": [0.1, 0.3, 1.0, 3.0],
        "EWC, euclidean": [10.0, 50.0, 200.0, 1000.0],
        "EWC, averaging": [[0.1, 0.6], [0.1, 0.75], [0.3, 0.6], [0.3, 0.75]],
    },
    "limits": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
}
"""The model and the settings. The first text is learned in two stages, the second at a tenth of the
rate. ``old`` sequences may be trained on by replay, ``seen`` ones gave the Fisher information. Each
way has twelve candidates, or sixteen where the first grid was too narrow: as many rates, or some
with some settings each, as :func:`ewc_lib.experiments.language.ways.points` reads them. Penalties
on all weights take the proximal step, in this ``metric`` if nothing else is said; those on adapters
add their gradient. ``limits`` are what may be lost on the first text, in nats."""


def comparison(
    path: Path = OUTPUT / "language_models.json",
    *,
    seeds: int = 5,
    protocol: Mapping[str, Any] = PROTOCOL,
    workers: int = 1,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Learn documentation, then source code, in every way and with every setting.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    seeds
        Each sets the initial weights, the order of the sequences and which are the old ones.
    protocol
        The model and the settings, as in :data:`PROTOCOL`.
    workers, fresh, progress
        As in :func:`.fine_tuning.comparison`.

    Returns
    -------
    dict
        As :func:`.run_all` returns it, one run for each training, rate and seed, with the losses
        before and all points; :func:`.fine_tuning.flat`, :func:`.candidates` and :func:`best` read
        it.

    Raises
    ------
    ValueError
        As :func:`.run_all`.
    """
    runs = [
        {"data": "texts", "seed": seed, "rate": rate, "trained": trained}
        for (trained, rates), seed in product(protocol["rates"].items(), range(seeds))
        for rate in rates
    ]
    return run_all(
        path,
        partial(_play, protocol),
        runs,
        experiment="language-models",
        data="standard library",
        protocol=protocol,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )


def _play(protocol: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Fine-tune once for each setting of a way, at one learning rate."""
    start = begin(json.dumps(protocol), run["data"], run["seed"])
    own = {**protocol["texts"], "metric": protocol["metric"]}
    found = list(points(start, own, protocol["settings"], run))
    return {"before": measured(start, start.model.state_dict())["losses"], "points": found}


def choice(result: Mapping[str, Any], method: str) -> Choice:
    """Return the rate and the setting of a method that are best on validation data.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    method
        Of :data:`METHODS`.
    """
    return choose(flat(result, "texts", method=method), ["rate", "setting"])


def best(result: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """Return the rows of a method at its choice, in the order of seeds.

    Parameters
    ----------
    result, method
        As for :func:`choice`.

    Returns
    -------
    list of dict
        As :func:`.fine_tuning.flat` returns them.
    """
    at = choice(result, method).settings
    return sorted(flat(result, "texts", method=method, **at), key=lambda row: row["seed"])


def gain(result: Mapping[str, Any], method: str, over: str, outcome: str = "both") -> Paired:
    """Compare two methods seed by seed: how much less the first has of a loss, in nats a byte.

    Parameters
    ----------
    result, method
        As for :func:`choice`.
    over
        The other method.
    outcome
        ``"both"``, the mean loss of both texts on test data, or ``"a"`` or ``"b"``.
    """
    rows = best(result, over), best(result, method)
    return paired(*({row["seed"]: row[outcome] for row in found} for found in rows))


def perplexity(rows: list[dict[str, Any]], text: str) -> float:
    """Return the mean perplexity over seeds, of the first text (``"a"``) or the second (``"b"``).

    Parameters
    ----------
    rows
        As :func:`best` returns them.
    text
        Which.
    """
    return statistics.mean(
        math.exp(row[text] + (row["before"] if text == "a" else 0)) for row in rows
    )


def table(result: Mapping[str, Any]) -> str:
    """Return test results at the choice of each method, as text.

    Parameters
    ----------
    result
        As :func:`comparison` returns it, with at least two seeds.
    """
    lines = ["perplexity:            manual   code   both: nats    gain"]
    return "\n".join([*lines, *(_line(result, method) for method in METHODS)])


def _line(result: Mapping[str, Any], method: str) -> str:
    rows = best(result, method)
    both = statistics.mean(row["both"] for row in rows)
    cells = f"{perplexity(rows, 'a'):8.2f}{perplexity(rows, 'b'):7.2f}{both:9.3f}"
    if method == METHODS[0]:
        return f"{method:21}{cells}"
    found = gain(result, method, METHODS[0])
    return f"{method:21}{cells}{found.difference:+11.3f} ± {found.half_width:.3f}"
