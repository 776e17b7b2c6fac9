"""Experiments on streams of tasks, cut short."""

import copy
from dataclasses import replace

from ewc_lib.experiments.runs.protocols import measure


def short(experiment, **changes):
    """Return an experiment with its demonstration cut to a few steps and strengths."""
    digits = copy.deepcopy(dict(experiment.protocols["digits"]))
    digits |= {"steps": 3, "hidden": [8], "batch": 16} | changes
    if "grid" in digits:
        digits["grid"] = digits["grid"][:2]
    if "searched" in digits:
        digits["searched"] = {name: grid[:2] for name, grid in digits["searched"].items()}
    return replace(experiment, protocols={**experiment.protocols, "digits": digits})


def run(experiment, tmp_path, seeds=1, only=None, **changes):
    return measure(
        short(experiment, **changes),
        seeds=seeds,
        only=only,
        out=tmp_path,
        workers=1,
        progress=False,
    )
