r"""What keeps task A while a model is fine-tuned on task B: eight methods on the same data.

Every method has one setting besides the learning rate, and both are chosen alike: on validation
data of both tasks, the lowest loss on B among all that lose at most so much on A. The limits give
a curve for each method. EWC and replay may use the same few observations of A.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ewc_lib.experiments.language.starts import begin, measured
from ewc_lib.experiments.language.ways import points
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.report import interval
from ewc_lib.experiments.runs.store import Run, run_all

__all__ = ["METHODS", "PROTOCOL", "candidates", "chosen", "comparison", "flat", "table"]

METHODS = (
    "learning rate",
    "early stopping",
    "averaging",
    "L2",
    "replay",
    "EWC",
    "EWC, averaging",
    "EWC, Kronecker",
)
"""A lower rate alone; fewer updates; weights between before and after (Wortsman et al. 2022); the
squared distance to the start (Li, Grandvalet and Davoine 2018); old observations in every update;
EWC; weights between before it and after it; EWC with Kronecker factors. Each may also choose plain
fine-tuning, which is what a lower learning rate alone is, and EWC with averaging also EWC."""

PROTOCOL: Mapping[str, Any] = {
    "digits": {
        "angle": 90,
        "hidden": 64,
        "steps_a": [200, 50],
        "rate_a": 1e-3,
        "steps": 300,
        "batch": 64,
        "rates": [3e-3, 1e-3, 3e-4],
        "strengths": {
            "L2": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0],
            "EWC": [100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6],
            "EWC, Kronecker": [10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5],
        },
    },
    "texts": {
        "width": 48,
        "layers": 1,
        "heads": 2,
        "length": 32,
        "steps_a": [2000, 500],
        "rate_a": 3e-3,
        "steps": 150,
        "batch": 16,
        "rates": [1e-3, 3e-4],
        "strengths": {
            "L2": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0],
            "EWC": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3],
            "EWC, Kronecker": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3],
        },
    },
    "old": 100,
    "metric": "euclidean",
    "plain_rates": [3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5],
    "checkpoints": [0.02, 0.05, 0.1, 0.2, 0.5],
    "shares": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "few_shares": [0.5, 0.75],
    "weights": [0.1, 0.3, 1.0, 3.0, 10.0],
    "limits": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
}
"""Both pairs of tasks, and the settings. Task A is learned in two stages, the second at a tenth of
the rate. ``plain_rates`` are those of fine-tuning without a penalty. ``checkpoints`` are shares of
the updates; ``shares`` how far to go from before to after; ``weights`` those of the old
observations; ``old`` how many of these there are; ``limits`` what may be lost on A, in nats. All
training is by Adam, with the proximal step of a penalty in this ``metric``."""


def comparison(
    path: Path = OUTPUT / "fine_tuning.json",
    *,
    seeds: int = 3,
    protocol: Mapping[str, Any] = PROTOCOL,
    workers: int = 1,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Fine-tune with every method, learning rate and setting.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    seeds
        Each sets the initial weights, the order of the data and the old observations.
    protocol
        Both pairs of tasks and the settings, as in :data:`PROTOCOL`.
    workers
        Processes, each with one thread.
    fresh
        Drop what the file holds.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        As :func:`.run_all` returns it; :func:`flat` reads it.

    Raises
    ------
    ValueError
        As :func:`.run_all`.
    """
    pairs = [name for name in ("digits", "texts") if name in protocol]
    kept = "replay", "L2", "EWC", "EWC, Kronecker"
    runs = []
    for name, seed in product(pairs, range(seeds)):
        plain = [("plain", rate) for rate in protocol["plain_rates"]]
        for method, rate in [*plain, *product(kept, protocol[name]["rates"])]:
            runs.append({"data": name, "seed": seed, "rate": rate, "trained": method})
    return run_all(
        path,
        partial(_play, protocol),
        runs,
        experiment="fine-tuning",
        data="digits and standard library",
        protocol=protocol,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )


def _play(protocol: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Fine-tune once for each setting of a method, at one learning rate."""
    start = begin(json.dumps(protocol), run["data"], run["seed"])
    own = {**protocol[run["data"]], "metric": protocol["metric"]}
    found = list(points(start, own, _settings(protocol, own), run))
    return {"before": measured(start, start.model.state_dict())["losses"], "points": found}


def _settings(protocol: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of each way on one pair of tasks."""
    return {
        "early stopping": protocol["checkpoints"],
        "averaging": protocol["shares"],
        "replay": protocol["weights"],
        "EWC, averaging": [
            [strength, share]
            for strength, share in product(own["strengths"]["EWC"], protocol["few_shares"])
        ],
        **own["strengths"],
    }


def flat(result: Mapping[str, Any], data: str, **wanted: Any) -> list[dict[str, Any]]:
    """Return every setting of every method on one pair of tasks, as one flat row.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    data
        ``"digits"`` or ``"texts"``.
    **wanted
        What the rows must have, as ``method="EWC"``.

    Returns
    -------
    list of dict
        Each with ``method``, ``seed``, ``rate``, ``setting``; the losses ``a`` and ``b`` on test
        data and ``valid_a`` and ``valid_b``, those on A less what they were before; ``both``, the
        mean loss of A and B on test data, and ``valid``, minus that on validation data; the loss
        ``before`` on test data of A; and what :func:`.ways.points` says of each point.
    """
    found = []
    for run in result["runs"]:
        if run["data"] == data:
            for point in run["points"]:
                setting = point["setting"]
                of_point = {k: v for k, v in point.items() if k != "losses"}
                of_point["setting"] = tuple(setting) if isinstance(setting, list) else setting
                lost = _lost(run["before"], point["losses"])
                found.append({"seed": run["seed"], "rate": run["rate"], **of_point, **lost})
    return [row for row in found if all(row[name] == value for name, value in wanted.items())]


def _lost(before: list[float], losses: list[float]) -> dict[str, float]:
    """Name the losses, and take off those on A what they were before."""
    (valid, _, test, _), (valid_a, valid_b, a, b) = before, losses
    lost = {"a": a - test, "b": b, "valid_a": valid_a - valid, "valid_b": valid_b}
    return {**lost, "both": (a + b) / 2, "valid": -(valid_a + valid_b) / 2, "before": test}


def candidates(result: Mapping[str, Any], data: str, method: str) -> list[dict[str, Any]]:
    """Return what a method may choose from.

    These are its own rows, those of plain fine-tuning, and one for each seed that does nothing. EWC
    with averaging may also stay at its end, which is EWC.

    Parameters
    ----------
    result, data
        As for :func:`flat`.
    method
        Of :data:`METHODS`.
    """
    runs = [run for run in result["runs"] if run["data"] == data]
    before = {run["seed"]: run["before"] for run in runs}
    still = [
        {"method": "none", "seed": seed, **_lost(losses, losses)} for seed, losses in before.items()
    ]
    known = {"learning rate", method} | ({"EWC"} if method == "EWC, averaging" else set())
    return [row for row in flat(result, data) if row["method"] in known] + still


def chosen(rows: Iterable[Mapping[str, Any]], limit: float) -> list[Mapping[str, Any]]:
    """Return for each seed the row that validation data choose.

    Parameters
    ----------
    rows
        Of one method, as :func:`flat` returns them.
    limit
        What may be lost on A, in nats. Among the rows that lose at most that, the lowest loss
        on B is chosen.
    """
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    within = {seed: [r for r in some if r["valid_a"] <= limit] for seed, some in by_seed.items()}
    return [min(within[seed], key=lambda row: row["valid_b"]) for seed in sorted(within)]


def table(result: Mapping[str, Any]) -> str:
    """Return the test loss on B, and what is lost on A, within each limit, as text.

    Parameters
    ----------
    result
        As :func:`comparison` returns it, with at least two seeds.
    """
    lines = []
    for name in dict.fromkeys(run["data"] for run in result["runs"]):
        limits = result["protocol"]["limits"]
        head = "".join(f"{limit:>17g}" for limit in limits)
        lines.append(f"{name + ', lost on A at most':25}{head}")
        for method in METHODS:
            rows = candidates(result, name, method)
            cells = [_cell(chosen(rows, limit)) for limit in limits]
            lines.append(f"{method:25}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _cell(rows: Iterable[Mapping[str, Any]]) -> str:
    b = [row["b"] for row in rows]
    return f"{statistics.mean(b):.3f} ± {interval(b):.3f}"
