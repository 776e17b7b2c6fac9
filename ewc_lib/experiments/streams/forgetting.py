"""Two tasks, one after the other: what is left of the first, and what keeps it.

Task B is task A with its pixels in another order. All methods but joint training start on task B
from the same network, which has learned task A. Each has one search, with as many settings as every
other: learning rates and, where there is one, strengths, on images held out of the training images
and on seeds that no table shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib.continual import accuracy, mlp, permute_pixels, train
from ewc_lib.data import Images, hold_out
from ewc_lib.ewc import EWC
from ewc_lib.experiments.runs.choosing import Choice, choose
from ewc_lib.experiments.runs.protocols import METHODS, Experiment, Protocol
from ewc_lib.experiments.runs.store import Run
from ewc_lib.regularizers import Regularizer

__all__ = ["FORGETTING", "at_usual_rate", "chosen", "curve", "searched", "shown"]

SEARCH_SEED = 1000
"""The first of the seeds on which settings are chosen."""


def searched(runs: Iterable[Run], network: str, method: str) -> list[Run]:
    """Return the runs of one search, whose accuracies are those on validation images."""
    return [r for r in runs if r["search"] and (r["network"], r["method"]) == (network, method)]


def chosen(runs: Iterable[Run], network: str, method: str) -> Choice:
    """Return the settings with the best mean accuracy over both tasks, on validation images.

    Parameters
    ----------
    runs
        As :func:`.run_all` keeps them.
    network, method
        Which search.
    """
    return choose(searched(runs, network, method), ("rate", "strength"), "mean")


def shown(runs: Iterable[Run], network: str, method: str) -> dict[int, Run]:
    """Return the runs at the chosen settings by seed, with accuracies on test images.

    Parameters
    ----------
    runs, network, method
        As for :func:`chosen`.
    """
    runs = list(runs)
    return _final(runs, network, method, chosen(runs, network, method).settings)


def curve(
    runs: Iterable[Run], network: str, method: str
) -> tuple[list[float], Float[Tensor, "2 S"]]:
    """Return the strengths of a search, and the mean accuracies on both tasks at the chosen rate.

    Parameters
    ----------
    runs, network, method
        As for :func:`chosen`.
    """
    runs = list(runs)
    rate, found = chosen(runs, network, method).settings["rate"], dict[float, list[Any]]()
    for run in searched(runs, network, method):
        if run["rate"] == rate:
            found.setdefault(run["strength"], []).append((run["a"], run["b"]))
    return list(found), torch.tensor(list(found.values())).mean(1).T


def at_usual_rate(runs: Iterable[Run], rate: float) -> dict[int, Run]:
    """Return the runs of plain training at the rate that task A was learned with, by seed."""
    return _final(runs, "wide", "none", {"rate": rate})


def _final(
    runs: Iterable[Run], network: str, method: str, settings: Mapping[str, float]
) -> dict[int, Run]:
    wanted = {"network": network, "method": method, "search": False, **settings}
    own = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    return {run["seed"]: run for run in sorted(own, key=lambda run: run["seed"])}


def _search(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield the whole grid of each method, one seed of the search after another."""
    own = range(SEARCH_SEED, SEARCH_SEED + protocol["search_seeds"])
    for seed, (network, method) in product(own, _pairs(protocol)):
        knobs = protocol["grids"][network][method]
        for values in product(*knobs.values()):
            yield _run(network, method, dict(zip(knobs, values, strict=True)), seed, True)


def _at_the_best(protocol: Protocol, seeds: int, finished: Sequence[Run]) -> Iterable[Run]:
    """Yield what the search has chosen, and plain training at the usual rate."""
    wanted: dict[tuple[Any, ...], Run] = {}
    for seed in range(seeds):
        runs = [_run("wide", "none", {"rate": protocol["rate"]}, seed)]
        for network, method in _pairs(protocol):
            if searched(finished, network, method):
                runs.append(_run(network, method, chosen(finished, network, method).settings, seed))
        wanted |= {tuple(run.values()): run for run in runs}
    yield from wanted.values()


def _pairs(protocol: Protocol) -> list[tuple[str, str]]:
    return [(network, method) for network, found in protocol["grids"].items() for method in found]


def _run(
    network: str, method: str, found: Mapping[str, float], seed: int, search: bool = False
) -> Run:
    settings = {"network": network, "method": method, "rate": 0.0, "strength": 0.0, **found}
    return {**settings, "search": search, "seed": seed}


def _play(images: Images, protocol: Protocol, device: str, run: Run) -> dict[str, Any]:
    """Learn both tasks; judge a run of the search by validation images, any other by test images.

    The outcome has the accuracies ``a`` and ``b`` on both tasks in the end, and their ``mean``; for
    those who learn one task after the other also the accuracy on task A ``before`` task B.
    """
    rest, valid = hold_out(images, protocol["held_out"])
    task_a = valid if run["search"] else rest
    task_b = permute_pixels(task_a, run["seed"] + 1000)
    sizes = (images.n_features, *protocol["networks"][run["network"]], images.n_classes)
    model = mlp(sizes, run["seed"]).to(device)
    if run["method"] == "joint":
        _learn_at_once(model, task_a, task_b, protocol, run)
        found = {}
    else:
        settings = (protocol[name] for name in ("held_out", "rate", "steps", "batch"))
        model.load_state_dict(_after_task_a(images, sizes, device, run["seed"], *settings))
        found = _learn_task_b(model, task_a, task_b, protocol, run)
    a, b = _accuracies(model, task_a, task_b)
    return {"a": a, "b": b, "mean": (a + b) / 2, **found}


@lru_cache(maxsize=64)
def _after_task_a(
    images: Images,
    sizes: tuple[int, ...],
    device: str,
    seed: int,
    held_out: float,
    rate: float,
    steps: int,
    batch: int,
) -> dict[str, Tensor]:
    """Learn task A, once for all methods and settings of a seed."""
    model = mlp(sizes, seed).to(device)
    rest, _ = hold_out(images, held_out)
    _train(model, rest.train, rate, batch, steps=steps, seed=seed)
    return model.state_dict()


def _learn_at_once(
    model: nn.Module, task_a: Images, task_b: Images, protocol: Protocol, run: Run
) -> None:
    """Learn the images of both tasks, with as many updates as both have in turn."""
    x, y = (torch.cat(parts) for parts in zip(task_a.train, task_b.train, strict=True))
    steps = 2 * protocol["steps"]
    _train(model, (x, y), run["rate"], protocol["batch"], steps=steps, seed=run["seed"])


def _learn_task_b(
    model: nn.Module, task_a: Images, task_b: Images, protocol: Protocol, run: Run
) -> dict[str, Any]:
    """Remember task A and learn task B; outside of the search, watch both on the way."""
    curve = [_accuracies(model, task_a, task_b)]
    regularizer = _regularizer(model, run)
    if regularizer is not None:
        regularizer.consolidate(task_a.train)

    def watch(step: int) -> None:
        if step % protocol["every"] == 0:
            curve.append(_accuracies(model, task_a, task_b))

    _train(
        model,
        task_b.train,
        run["rate"],
        protocol["batch"],
        steps=protocol["steps"],
        seed=run["seed"] + 1,
        regularizer=regularizer,
        on_step=None if run["search"] else watch,
    )
    found = {"before": curve[0][0]}
    return found if run["search"] else {**found, "curve": curve}


def _train(model: nn.Module, data: Any, rate: float, batch: int, **options: Any) -> None:
    optimizer = partial(torch.optim.Adam, lr=rate, fused=True)
    train(model, data, optimizer=optimizer, batch_size=batch, progress=False, **options)


def _regularizer(model: nn.Module, run: Run) -> Regularizer | None:
    if run["method"] == "EWC, full":
        return EWC(model, run["strength"], structure="dense")
    return METHODS[run["method"]](model, run["strength"], run["seed"])


def _accuracies(model: nn.Module, *tasks: Images) -> list[float]:
    return [round(accuracy(model, task.test), 5) for task in tasks]


def _rates(low: float) -> list[float]:
    """Return 15 learning rates from a lowest one upwards, five for each factor of ten."""
    return [float(f"{low * 10 ** (k / 5):.1e}") for k in range(15)]


def _grid(rates: Sequence[float], lowest: float) -> dict[str, list[float]]:
    """Return three rates, and five strengths from a lowest one upwards, two in a factor of ten."""
    strengths = [float(f"{lowest * 10 ** (k / 2):.0e}") for k in range(5)]
    return {"rate": list(rates), "strength": strengths}


_SHARED: dict[str, Any] = {
    "rate": 1e-3,
    "batch": 64,
    "every": 20,
    "search_seeds": 6,
}

_WIDE = {
    "none": {"rate": _rates(1e-4)},
    "L2": _grid([1e-3, 3e-3, 1e-2], 0.01),
    "EWC": _grid([3e-4, 1e-3, 3e-3], 10),
    "joint": {"rate": _rates(3e-4)},
}
"""What is searched in the large network: 15 settings of each method, as in the small one."""

FORGETTING = Experiment(
    name="forgetting",
    summary="Digits, then the same with shuffled pixels: EWC, L2, plain and joint training.",
    protocols={
        "mnist": {
            **_SHARED,
            "networks": {"wide": [100, 100]},
            "steps": 1000,
            "held_out": 0.1,
            "grids": {"wide": _WIDE},
        },
        "digits": {
            **_SHARED,
            "networks": {"wide": [64, 64], "narrow": [12]},
            "steps": 460,
            "held_out": 0.2,
            "grids": {
                "wide": _WIDE,
                "narrow": {
                    "EWC": _grid([3e-3, 1e-2, 3e-2], 0.3),
                    "EWC, full": _grid([1e-3, 3e-3, 1e-2], 3),
                },
            },
        },
    },
    stages=(_search, _at_the_best),
    play=_play,
)
"""Only on the digits there is a second network, small enough for the whole Fisher matrix."""
