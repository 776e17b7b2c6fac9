"""Many independent runs, in several processes, into one file that can be resumed.

A *run* is a flat dict of settings, for example ``{"method": "ewc", "strength": 1e5, "seed": 0}``.
Its outcome is added to the file as soon as it is finished, so a stopped experiment loses at most
the runs that were under way. What all runs share is the *protocol*. Results of different
protocols, data or versions of PyTorch are never mixed.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import torch

from ewc_lib._progress import progress as show_progress
from ewc_lib.experiments.runs.provenance import provenance

__all__ = ["Run", "load", "run_all"]

Run: TypeAlias = dict[str, Any]

MIXED = "experiment", "data", "protocol"
"""What all runs in one file have in common."""


def run_all(
    path: Path,
    function: Callable[[Run], Mapping[str, Any]],
    runs: Iterable[Run],
    *,
    experiment: str,
    data: str,
    protocol: Mapping[str, Any],
    workers: int = 1,
    fresh: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Do all runs that the file does not hold yet, and save each when it is finished.

    Parameters
    ----------
    path
        The JSON file.
    function
        Takes the settings of a run and returns its outcome, plain numbers and lists.
    runs
        The settings of each run, flat dicts of numbers, strings and None. The first are started
        first.
    experiment, data
        Names, for the reader of the file.
    protocol
        What all runs share.
    workers
        Processes, each with one thread. With one worker, the runs are done in this process.
    fresh
        Drop what the file holds.
    progress
        True or False; by default a bar appears in terminals and notebooks after two seconds.

    Returns
    -------
    dict
        The content of the file: ``experiment``, ``data``, ``protocol``, ``sittings`` (where and
        how runs were measured, see :func:`.provenance`) and ``runs``. Each run holds its
        settings, its outcome, its ``seconds``, and the number of its ``sitting``.

    Raises
    ------
    ValueError
        If the file holds results of another experiment, data, protocol or version of PyTorch,
        or is no such file.
    RuntimeError
        If a run fails. The others are finished and saved first.
    OSError
        If the file cannot be written at the end; until then a warning is given, and every later
        result is another try.
    """
    wanted = [dict(run) for run in runs]
    header = json.loads(json.dumps({"experiment": experiment, "data": data, "protocol": protocol}))
    result = _begin(path, header, fresh)
    done = {_key(wanted[0], run) for run in result["runs"]} if wanted else set()
    missing = [run for run in wanted if _key(run, run) not in done]
    if not missing:
        return result
    start = time.perf_counter()
    result["sittings"].append(provenance(seeds=_seeds(missing), wall_seconds=0.0))
    sitting = len(result["sittings"]) - 1
    problems: list[str] = []
    for run, outcome in _outcomes(function, missing, workers, experiment, progress):
        if isinstance(outcome, str):
            problems.append(f"{run}: {outcome}")
            continue
        result["runs"].append(_finite({**run, **outcome, "sitting": sitting}))
        result["sittings"][sitting]["wall_seconds"] = round(time.perf_counter() - start, 1)
        try:
            save(path, result)
        except OSError as problem:
            warnings.warn(f"cannot write {path} ({problem}); will try again", stacklevel=2)
    save(path, result)
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(missing)} runs failed; {problems[0]}")
    return result


def _outcomes(
    function: Callable[[Run], Mapping[str, Any]],
    runs: Sequence[Run],
    workers: int,
    title: str,
    progress: bool | None,
) -> Iterator[tuple[Run, Mapping[str, Any] | str]]:
    """Yield each run with its outcome, or with what went wrong, as they finish."""
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        attempts = joblib.Parallel(return_as="generator_unordered")(
            joblib.delayed(_attempt)(function, run) for run in runs
        )
    yield from show_progress(attempts, title, progress, total=len(runs))


def _attempt(
    function: Callable[[Run], Mapping[str, Any]], run: Run
) -> tuple[Run, Mapping[str, Any] | str]:
    start = time.perf_counter()
    try:
        outcome = function(run)
    except Exception as problem:  # the other runs go on
        return run, f"{type(problem).__name__}: {problem}"
    return run, {**outcome, "seconds": round(time.perf_counter() - start, 2)}


def _begin(path: Path, header: dict[str, Any], fresh: bool) -> dict[str, Any]:
    if fresh or not path.exists():
        return {**header, "sittings": [], "runs": []}
    old = load(path)
    differing = [key for key in MIXED if old[key] != header[key]]
    versions = {sitting["versions"]["torch"] for sitting in old["sittings"]}
    if versions - {torch.__version__}:
        differing.append("version of PyTorch")
    if differing:
        raise ValueError(
            f"{path.name} holds results of another {' and '.join(differing)}, which must not be "
            "mixed with new ones; start anew with --fresh or write elsewhere with --out"
        )
    return old


def load(path: Path) -> dict[str, Any]:
    """Read the file that :func:`run_all` wrote.

    Raises
    ------
    ValueError
        If the file is damaged or something else.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result.keys() >= {*MIXED, "sittings", "runs"}:
            return result
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged or does not hold the runs of an experiment")


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write all or nothing, one run on a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    head = {key: value for key, value in result.items() if key != "runs"}
    lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in result["runs"])
    text = json.dumps({**head, "runs": []}, indent=1, allow_nan=False)
    try:
        draft.write_text(text[: -len("[]\n}")] + f"[\n  {lines}\n ]\n}}\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Replace NaN by None, which JSON knows."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _key(like: Run, run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a run from others: its settings, without its outcome."""
    return tuple((name, run.get(name)) for name in sorted(like))


def _seeds(runs: Iterable[Run]) -> list[int]:
    return sorted({run["seed"] for run in runs if "seed" in run})
