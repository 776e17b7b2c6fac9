r"""Two tasks with every structure of the Fisher information, to see what the coupling buys.

.. math:: \Omega(\theta) = \frac{\lambda}{2} \Delta^\top \hat F \Delta, \qquad
          \Delta = \theta - \theta^*_A

for the approximations :math:`\hat F` of one Fisher information, each over many strengths. Two
rows are yardsticks. One adds a multiple of the identity to the dense matrix. The other has no
matrix: its penalty is the divergence of which :math:`\frac12 \Delta^\top F \Delta` is the
beginning, computed on the inputs of task A, which it keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ewc_lib import data
from ewc_lib._parameters import Vector
from ewc_lib.continual import accuracy, mlp, permute_pixels, train
from ewc_lib.data import Images
from ewc_lib.ewc import EWC
from ewc_lib.experiments.runs.folders import OUTPUT
from ewc_lib.experiments.runs.report import interval
from ewc_lib.experiments.runs.store import Run, run_all
from ewc_lib.experiments.runs.strengths import held_out
from ewc_lib.fisher import Dense, MatrixFree, fisher_information
from ewc_lib.regularizers._function import FunctionPenalty

__all__ = [
    "METHODS",
    "PROTOCOL",
    "HeldPredictions",
    "comparison",
    "damped",
    "divergence",
    "flat",
    "learned_step",
    "table",
]

STRUCTURES = "diagonal", "block", "module", "kronecker", "eigenkronecker", "lowrank", "dense"

METHODS = ("none", *STRUCTURES, "damped", "predictions")
"""Plain training; EWC with each structure; with the damped matrix; the divergence itself."""

PROTOCOL: Mapping[str, Any] = {
    "hidden": [16],
    "steps": 690,
    "batch": 64,
    "optimizers": {"SGD": 0.1, "Adam": 1e-3},
    "grid": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0],
    "damping": 0.1,
}
"""Task A is learned by Adam. For task B, SGD has the proximal step and Adam the gradient."""


def divergence(
    model: nn.Module, inputs: Float[Tensor, "N ..."], displacement: Vector
) -> Float[Tensor, ""]:
    r"""Return how far the predictions move when the parameters do, in nats per observation.

    .. math:: \frac1N \sum_n \mathrm{KL}\big(p(\cdot \mid x_n, \theta) \,\big\|\,
              p(\cdot \mid x_n, \theta + \Delta)\big)
              = \tfrac12 \Delta^\top F(\theta)\, \Delta + O(\|\Delta\|^3)

    This is :eq:`eq-kl` for a classifier, without the expansion.

    Parameters
    ----------
    model
        A classifier that returns logits, at :math:`\theta`; it is not changed.
    inputs
        A batch of inputs.
    displacement
        :math:`\Delta`, by the names of the parameters.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(5, 3)
    >>> nowhere = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    >>> float(divergence(model, x, nowhere))
    0.0
    """
    moved = {name: p.detach() + displacement[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        return _divergence(model(inputs), functional_call(model, moved, (inputs,)))


def _divergence(old: Float[Tensor, "N C"], new: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    return F.kl_div(new, old, reduction="batchmean", log_target=True)


def damped(fisher: Dense, share: float) -> Dense:
    r"""Add a multiple of the identity, as a Gaussian prior on the parameters would.

    .. math:: F + \delta I, \qquad \delta = \text{share} \cdot \frac{\operatorname{tr} F}{P}

    Parameters
    ----------
    fisher
        The whole matrix, ``[P, P]``.
    share
        In units of the mean of its diagonal.

    Examples
    --------
    >>> import torch
    >>> shapes = {"weight": torch.Size([2])}
    >>> F = Dense(1, "exact", {"weight": "rule"}, torch.tensor([[2.0, 1.0], [1.0, 4.0]]), shapes)
    >>> damped(F, 0.5).matrix
    tensor([[3.5000, 1.0000],
            [1.0000, 5.5000]])
    """
    matrix = fisher.matrix
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return replace(fisher, matrix=matrix + share * matrix.diagonal().mean() * identity)


class HeldPredictions(FunctionPenalty):
    r"""Hold the predictions on the inputs of a task, which are kept.

    .. math:: \Omega(\theta) = \frac{\lambda}{N} \sum_n \mathrm{KL}\big(p(\cdot \mid x_n,
              \theta^*) \,\big\|\, p(\cdot \mid x_n, \theta)\big)

    The quadratic penalties approximate this one. It is a yardstick and no method against
    forgetting: it looks at all inputs of the old task in every step. :class:`.LwF` holds
    predictions too, on inputs of the *new* task.

    Parameters
    ----------
    model
        A classifier that returns logits.
    strength
        :math:`\lambda \ge 0`.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(5, 3)
    >>> held = HeldPredictions(model, 1.0)
    >>> held.consolidate((x, torch.zeros(5, dtype=torch.long)))
    >>> held.penalty().item()
    0.0
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model, strength)
        self._inputs, self._old = torch.empty(0), torch.empty(0)

    def before_step(self, inputs: Any = None) -> None:
        """Do nothing: the inputs are those of the old task."""

    def consolidate(self, data: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs of a task, and what the model says of them now."""
        self._inputs = data[0]
        with torch.no_grad():
            self._old = self.model(self._inputs)
        self._n_tasks = 1

    def _loss(self) -> Float[Tensor, ""]:
        return _divergence(self._old, self.model(self._inputs))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the inputs and outputs that are held."""
        return {**self._state(), "inputs": self._inputs, "outputs": self._old}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._check_state(state, "inputs", "outputs")
        self._inputs, self._old = state["inputs"], state["outputs"]
        self._load(state)


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
    """Learn the digits, then the digits with permuted pixels, with each method and strength.

    Parameters
    ----------
    path
        The JSON file; the same call goes on where it was stopped.
    seeds
        Each sets the initial weights, the order of the data and the permutation.
    protocol
        Units of the hidden layers, updates of each task, batch size, optimizers with their
        learning rates, strengths, and the damping of :func:`damped`.
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
        As :func:`.run_all` returns it, one run for each optimizer, method and seed;
        :func:`flat` reads it. All numbers are in double precision.

    Raises
    ------
    ValueError
        As :func:`.run_all`.
    """
    settings = product(range(seeds), protocol["optimizers"], methods)
    return run_all(
        path,
        partial(_play, protocol),
        [{"optimizer": name, "method": method, "seed": seed} for seed, name, method in settings],
        experiment="beyond-diagonal",
        data="digits",
        protocol=protocol,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )


@cache
def _images() -> Images:
    return data.digits(dtype=torch.float64)


def _play(protocol: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Learn task A, then task B once for each strength."""
    task_a, seed = _images(), run["seed"]
    task_b = permute_pixels(task_a, seed + 1000)
    model = mlp((task_a.n_features, *protocol["hidden"], task_a.n_classes), seed).double()
    options: dict[str, Any] = {
        "steps": protocol["steps"],
        "batch_size": protocol["batch"],
        "progress": False,
    }
    train(model, task_a.train, seed=seed, **options)
    optimum = copy.deepcopy(model.state_dict())
    regularizer = _regularizer(run["method"], model, task_a.train, protocol["damping"])
    whole = MatrixFree(model, task_a.train, progress=False)
    strengths = protocol["grid"] if regularizer else [0.0]
    proximal = run["optimizer"] == "SGD" and isinstance(regularizer, EWC)
    found: dict[str, list[float]] = {name: [] for name in OUTCOMES}
    for strength in strengths:
        model.load_state_dict(optimum)
        if regularizer:
            regularizer.strength = strength
        algorithm = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[run["optimizer"]]
        train(
            model,
            task_b.train,
            seed=seed + 1,
            regularizer=regularizer,
            optimizer=algorithm(model.parameters(), lr=protocol["optimizers"][run["optimizer"]]),
            proximal=proximal,
            **options,
        )
        found["accuracy_a"].append(accuracy(model, task_a.test))
        found["accuracy_b"].append(accuracy(model, task_b.test))
        expected = regularizer.penalty().item() / strength if regularizer else 0.0
        displacement = {name: p.detach() - optimum[name] for name, p in model.named_parameters()}
        model.load_state_dict(optimum)
        found["expected"].append(expected)
        found["parabola"].append(0.5 * whole.quadratic(displacement).item())
        found["divergence"].append(divergence(model, task_a.x_train, displacement).item())
    rounded = {name: [float(f"{x:.5g}") for x in values] for name, values in found.items()}
    return {"strengths": list(strengths), **rounded}


def learned_step(
    model: nn.Module,
    task: tuple[Tensor, Tensor],
    *,
    rate: float,
    regularizer: EWC | None = None,
    **options: Any,
) -> Vector:
    """Return how far SGD on a task moves the parameters, and put them back.

    Parameters
    ----------
    model
        A classifier.
    task
        Inputs and labels.
    rate
        The learning rate.
    regularizer
        What holds on to an earlier task, by its proximal step.
    **options
        ``steps``, ``seed`` and others of :func:`ewc_lib.continual.train`.

    Examples
    --------
    >>> task = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    >>> step = learned_step(mlp((3, 2), seed=0), task, rate=0.1, steps=5, seed=0)
    >>> bool(step["0.bias"][0] > 0)  # towards the label
    True
    """
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    train(model, task, regularizer=regularizer, optimizer=optimizer, proximal=True, **options)
    step = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    model.load_state_dict(start)
    return step


OUTCOMES = "accuracy_a", "accuracy_b", "expected", "parabola", "divergence"


def _regularizer(
    method: str, model: nn.Module, task: tuple[Tensor, Tensor], damping: float
) -> EWC | HeldPredictions | None:
    """Return what holds on to a finished task, its strength still 0."""
    if method == "none":
        return None
    if method == "predictions":
        held = HeldPredictions(model, 0.0)
        held.consolidate(task)
        return held
    whole = method == "damped"
    structure: Any = "dense" if whole else method
    fisher = fisher_information(model, task, structure=structure, progress=False)
    ewc = EWC(model, 0.0, structure=structure)
    ewc.remember(damped(fisher, damping) if isinstance(fisher, Dense) and whole else fisher)
    return ewc


def flat(result: Mapping[str, Any], **wanted: Any) -> list[Run]:
    """Return one run for each optimizer, method, seed and strength.

    Parameters
    ----------
    result
        As :func:`comparison` returns it.
    **wanted
        Settings that the runs must have, as ``optimizer="SGD"``.

    Returns
    -------
    list of dict
        Each with ``accuracy_a`` and ``accuracy_b`` on test images after task B and their mean
        ``accuracy``; ``expected``, the penalty divided by its strength: what it believes to be
        lost on task A, in nats; ``parabola``, the same with the whole matrix; and ``divergence``,
        what is lost (:func:`divergence`).
    """
    names = "optimizer", "method", "seed"
    found = []
    for run in result["runs"]:
        if all(run[name] == value for name, value in wanted.items()):
            settings = {name: run[name] for name in names}
            columns = (run[name] for name in ("strengths", *OUTCOMES))
            for strength, a, b, *nats in zip(*columns, strict=True):
                outcome = dict(zip(OUTCOMES, (a, b, *nats), strict=True))
                found.append({**settings, "strength": strength, **outcome, "accuracy": (a + b) / 2})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return accuracies in percent, at strengths chosen by the other seeds, as text.

    Parameters
    ----------
    result
        As :func:`comparison` returns it, with at least two seeds.
    """
    keys = dict.fromkeys((run["optimizer"], run["method"]) for run in result["runs"])
    return "\n".join(_line(flat(result, optimizer=o, method=m), o, m) for o, m in keys)


def _line(runs: Iterable[Run], optimizer: str, method: str) -> str:
    values = [run["accuracy"] for run in held_out(runs, "accuracy")]
    mean, width = sum(values) / len(values), interval(values)
    return f"{optimizer:5} {method:15} {100 * mean:6.2f} ± {100 * width:.2f}"
