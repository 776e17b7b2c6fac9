"""What the experiments on streams of tasks have in common: protocols, and stages of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ewc_lib import data
from ewc_lib.data import Images
from ewc_lib.experiments.runs._playing import METHODS, Protocol, outcome, play
from ewc_lib.experiments.runs.folders import OUTPUT, RESULTS
from ewc_lib.experiments.runs.store import Run, load, run_all

__all__ = ["METHODS", "RESULTS", "Experiment", "Protocol", "measure", "outcome", "play"]

Stage: TypeAlias = Callable[[Protocol, int, Sequence[Run]], Iterable[Run]]
"""Which runs to do, for a protocol, a number of seeds, and the runs that are finished."""


@dataclass(frozen=True)
class Experiment:
    """An experiment: what is the same in all runs, and which runs there are.

    Attributes
    ----------
    name
        On the command line.
    summary
        One sentence about the question.
    protocols
        By name. ``"digits"`` is the demonstration without MNIST; the first of the others is
        what the command measures if MNIST is there.
    stages
        Each says which runs to do, given the runs of earlier stages.
    play
        One run: its outcome from images, protocol, device and settings.
    images
        The data sets that it takes, as they are called in its file; the first is the usual one.
    """

    name: str
    summary: str
    protocols: Mapping[str, Protocol]
    stages: tuple[Stage, ...]
    play: Callable[[Images, Protocol, str, Run], dict[str, Any]]
    images: tuple[str, ...] = ("mnist", "fashion-mnist", "kmnist")

    def file(self, preset: str) -> str:
        """Return the name of the file of results."""
        stem = self.name.replace("-", "_")
        standard = next(iter(self.protocols)) == preset
        return f"{stem}.json" if standard else f"{stem}_{preset.replace('-', '_')}.json"


def measure(
    experiment: Experiment,
    *,
    preset: str | None = None,
    root: str | None = None,
    seeds: int | None = None,
    out: Path = OUTPUT,
    device: str = "auto",
    workers: int | None = None,
    only: Mapping[str, Collection[str]] | None = None,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Do all runs of an experiment that its file does not hold yet.

    Parameters
    ----------
    experiment
        What to measure.
    preset
        The protocol; by default the first one, or the demonstration if there is no MNIST.
    root
        A local copy, as in :func:`ewc_lib.data.local_copy`; by default ``$EWC_DATA``.
    seeds
        How many seeds each row has; by default 5, and 1 for the demonstration.
    out
        The folder for the file.
    device
        ``"cpu"``, ``"cuda"`` and so on; ``"auto"`` takes an accelerator if there is one.
    workers
        Processes with one thread each; by default one for each core, and one on an accelerator.
    only
        Names of settings and the values that a run may have there, as they are printed; by
        default all runs are done. The others are left for another time.
    fresh
        Drop what the file holds.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        The content of the file, as :func:`.run_all` returns it.

    Raises
    ------
    ValueError
        If the preset is unknown or needs data and there are none, if the data are others than the
        experiment takes, if no run is as wanted, or as :func:`.run_all`.
    """
    root = root or os.environ.get("EWC_DATA") or None
    preset = preset or (next(iter(experiment.protocols)) if root else "digits")
    if preset not in experiment.protocols:
        known = ", ".join(experiment.protocols)
        raise ValueError(f"unknown preset {preset!r} of {experiment.name}; there are {known}")
    title = {"mnist": "MNIST", "cifar10": "CIFAR-10"}[experiment.images[0]]
    if preset != "digits" and root is None:
        raise ValueError(f"the preset {preset!r} needs {title}: give --data or set EWC_DATA")
    protocol = experiment.protocols[preset]
    seeds = seeds or (1 if preset == "digits" else 5)
    source = None if preset == "digits" else root
    shown = _images(source).name
    if source is not None and shown not in experiment.images:
        raise ValueError(f"{experiment.name} needs {title}, and {root} holds {shown}")
    device = accelerator() if device == "auto" else device
    path = out / experiment.file(preset)
    result: dict[str, Any] = {}
    n_wanted = 0
    for stage in experiment.stages:
        runs = [
            r for r in stage(protocol, seeds, result.get("runs", ())) if _is_among(r, only or {})
        ]
        n_wanted += len(runs)
        result = run_all(
            path,
            partial(_play, experiment, source, protocol, device),
            runs,
            experiment=experiment.name,
            data=shown,
            protocol={"preset": preset, **protocol},
            workers=workers or (1 if device != "cpu" else os.cpu_count() or 1),
            fresh=fresh and not result,
            progress=progress,
        )
    if not n_wanted:
        raise ValueError(f"no run of {experiment.name} has {' and '.join(only or {})} as wanted")
    return result


def _is_among(run: Run, only: Mapping[str, Collection[str]]) -> bool:
    """Tell whether the settings of a run are among the wanted ones."""
    return all(str(run.get(name)) in wanted for name, wanted in only.items())


def accelerator() -> str:
    """Return the device that there is."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _play(
    experiment: Experiment, root: str | None, protocol: Protocol, device: str, run: Run
) -> dict[str, Any]:
    return experiment.play(_images(root), protocol, device, run)


@cache
def _images(root: str | None) -> Images:
    return data.digits() if root is None else data.local_copy(root)


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a result of the book.

    Parameters
    ----------
    name
        The file without its ending, such as ``"split_mnist"``.
    folder
        Where it is.
    """
    return load(folder / f"{name}.json")
