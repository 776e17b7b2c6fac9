r"""Two tasks with every structure of the Fisher information, to see what the coupling buys.

.. math:: \Omega(\theta) = \frac{\lambda}{2} \Delta^\top \hat F \Delta, \qquad
          \Delta = \theta - \theta^*_A

for the approximations :math:`\hat F` of one Fisher information. Every method has as many settings
to choose from as any other, and validation images choose. Of each setting it is kept how far the
network has moved, by several measures, and what it has forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ewc_lib.experiments.runs.choosing import Choice, choose
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.report import interval
from ewc_lib.experiments.runs.store import Run, run_all
from ewc_lib.experiments.structures.two_tasks import OUTCOMES, STRUCTURES, play

__all__ = ["METHODS", "PROTOCOL", "chosen", "comparison", "flat", "table", "usual_form"]

METHODS = ("plain", "averaging", "L2", *STRUCTURES, "damped", "predictions")
"""What the rows of the result are.

``plain`` training at several learning rates; ``averaging`` of the parameters before and after; L2
to the anchor, with the trace of the Fisher information; EWC with each structure, and with the
whole matrix plus a multiple of the identity; and functional regularisation.
"""

PROTOCOL: Mapping[str, Any] = {
    "hidden": [16],
    "steps": 300,
    "batch": 64,
    "validation": 0.2,
    "optimizers": {"SGD": 0.1, "Adam": 1e-3},
    "strengths": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0],
    "rates": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0],
    "shares": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
    "damping": 0.1,
    "crossed": ["L2", "diagonal", "kronecker", "lowrank", "dense"],
    "costly": ["kronecker", "lowrank", "dense"],
    "costly_seeds": 6,
}
"""Task A is learned by Adam, task B by both optimizers.

The usual form of SGD is the proximal step, that of Adam the gradient; ``crossed`` methods have the
other one, too. Adam's proximal step in its own metric needs a new solution in every step: of the
``costly`` matrices it is measured with fewer seeds. Rates are multiples of the optimizer's own.
"""

USUAL = {"SGD": "proximal", "Adam": "gradient"}
"""The form of a quadratic penalty that is measured for every structure."""


def comparison(
    path: Path = OUTPUT / "beyond_diagonal.json",
    *,
    seeds: int = 10,
    protocol: Mapping[str, Any] = PROTOCOL,
    methods: Sequence[str] = METHODS,
    workers: int = 1,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Learn the digits, then the digits with permuted pixels, with each method and setting.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    seeds
        Each sets the initial weights, the order of the data, the permutation, and the images that
        are held out for validation.
    protocol
        As :data:`PROTOCOL`.
    methods
        Some of :data:`METHODS`.
    workers
        Processes, each with one thread.
    fresh
        Drop what the file holds.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        As :func:`.run_all` returns it, one run for each optimizer, form, method and seed;
        :func:`flat` reads it. All numbers are in double precision.

    Raises
    ------
    ValueError
        As :func:`.run_all`.
    """
    return run_all(
        path,
        partial(play, protocol),
        _settings(protocol, seeds, methods),
        experiment="beyond-diagonal",
        data="digits",
        protocol=protocol,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )


def _settings(protocol: Mapping[str, Any], seeds: int, methods: Sequence[str]) -> list[Run]:
    """Return the settings of all runs; seed by seed, and what takes long at the end."""
    cheap: list[Run] = []
    costly: list[Run] = []
    for seed, optimizer, method in product(range(seeds), protocol["optimizers"], methods):
        for form in _forms(protocol, optimizer, method):
            run = {"optimizer": optimizer, "form": form, "method": method, "seed": seed}
            if form == USUAL[optimizer] or optimizer == "SGD" or method not in protocol["costly"]:
                cheap.append(run)
            elif seed < protocol["costly_seeds"]:
                costly.append(run)
    return cheap + costly


def _forms(protocol: Mapping[str, Any], optimizer: str, method: str) -> tuple[str, ...]:
    crossed = method in protocol["crossed"]
    return ("gradient", "proximal") if crossed else (usual_form(optimizer, method),)


def usual_form(optimizer: str, method: str) -> str:
    """Return the form in which a method is measured with an optimizer, if in one only.

    Examples
    --------
    >>> usual_form("SGD", "dense"), usual_form("Adam", "dense"), usual_form("SGD", "plain")
    ('proximal', 'gradient', 'none')
    """
    if method in {"plain", "averaging"}:
        return "none"
    return "gradient" if method == "predictions" else USUAL[optimizer]


def flat(result: Mapping[str, Any], **wanted: Any) -> list[Run]:
    r"""Return one run for each optimizer, form, method, seed and setting.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    **wanted
        Settings that the runs must have, as ``optimizer="SGD"``.

    Returns
    -------
    list of dict
        Each with a ``setting``: the strength, the multiple of the learning rate, or the share of
        the way. ``valid``: mean accuracy on validation images of both tasks. On test images
        ``accuracy_a``, ``accuracy_b`` and their mean ``accuracy``, and ``loss_a``, ``loss_b``.
        ``forgotten`` and ``nats``: accuracy and log-likelihood that task A has lost.
        ``divergence``, :math:`\mathrm{KL}(\theta^*_A \| \theta)` on the inputs of task A;
        ``razor``, the same on those of task B, and ``reverse`` with the two exchanged;
        ``diagonal``, ``kronecker`` and ``whole``, half the quadratic form of these matrices;
        ``distance``, the squared length of the displacement. All outcomes are None, and
        ``diverged`` is true, where a network is not finite or knows neither task better than a
        guess, by its log-likelihood.
    """
    return list(_flat(result["runs"], wanted))


def _flat(runs: Sequence[Run], wanted: Mapping[str, Any]) -> Iterator[Run]:
    guess = math.log(10)
    for run in runs:
        if any(run[name] != value for name, value in wanted.items()):
            continue
        settings = {name: run[name] for name in ("optimizer", "form", "method", "seed")}
        accuracy_before, loss_before = run["before"]
        columns = (run[name] for name in OUTCOMES)
        for setting, *values in zip(run["settings"], *columns, strict=True):
            found = dict(zip(OUTCOMES, values, strict=True))
            losses = found["loss_a"], found["loss_b"]
            diverged = None in found.values() or min(losses) >= guess
            if diverged:
                found = dict.fromkeys((*OUTCOMES, "accuracy", "forgotten", "nats"))
            else:
                found["accuracy"] = (found["accuracy_a"] + found["accuracy_b"]) / 2
                found["forgotten"] = accuracy_before - found["accuracy_a"]
                found["nats"] = found["loss_a"] - loss_before
            yield {**settings, "setting": setting, **found, "diverged": diverged}


def chosen(result: Mapping[str, Any], **wanted: Any) -> tuple[Choice, list[Run]]:
    """Return the setting that is best on validation images, and its run for each seed.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    **wanted
        Of one row: ``optimizer``, ``form`` and ``method``.
    """
    runs = flat(result, **wanted)
    choice = choose(runs, ["setting"])
    kept = [run for run in runs if run["setting"] == choice.settings["setting"]]
    return choice, sorted(kept, key=lambda run: run["seed"])


def table(result: Mapping[str, Any]) -> str:
    """Return accuracies in percent on test images, at settings chosen on others, as text.

    Parameters
    ----------
    result
        As :func:`comparison` returns it, with at least two seeds.
    """
    keys = dict.fromkeys((run["optimizer"], run["form"], run["method"]) for run in result["runs"])
    return "\n".join(_line(result, *key) for key in keys)


def _line(result: Mapping[str, Any], optimizer: str, form: str, method: str) -> str:
    choice, runs = chosen(result, optimizer=optimizer, form=form, method=method)
    values = [run["accuracy"] for run in runs]
    mean, width = sum(values) / len(values), interval(values)
    edge = ", at the edge" if choice.at_edge else ""
    name = f"{optimizer:4} {form:8} {method:14}"
    shown = f"{100 * mean:6.2f} ± {100 * width:.2f}"
    return f"{name} {shown}  at {choice.settings['setting']:g}{edge}"
