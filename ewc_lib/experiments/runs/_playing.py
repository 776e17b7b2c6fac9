"""One run of an experiment on a stream: methods by their names, training, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ewc_lib.continual import (
    Learned,
    MultiHead,
    Stream,
    accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    learn,
    learning_accuracy,
    min_accuracy,
    mlp,
)
from ewc_lib.ewc import EWC
from ewc_lib.regularizers import (
    EWCDR,
    L2,
    MAS,
    SI,
    KroneckerLaplace,
    LwF,
    Regularizer,
    Replay,
    RWalk,
)

Protocol: TypeAlias = Mapping[str, Any]
"""What all runs of an experiment share, plain values for JSON."""


def _from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


METHODS: dict[str, Callable[[nn.Module, float, int], Regularizer | None]] = {
    "none": lambda model, strength, seed: None,
    "EWC": lambda model, strength, seed: EWC(model, strength),
    "online EWC": lambda model, strength, seed: EWC(model, strength, "online"),
    "SI": lambda model, strength, seed: SI(model, strength),
    "MAS": lambda model, strength, seed: MAS(model, strength),
    "RWalk": lambda model, strength, seed: RWalk(model, strength),
    "EWC-DR": lambda model, strength, seed: EWCDR(model, strength),
    "L2": lambda model, strength, seed: L2(model, strength),
    "Kronecker Laplace": lambda model, strength, seed: KroneckerLaplace(model, strength),
    "LwF": lambda model, strength, seed: LwF(model),
    "replay": lambda model, strength, seed: Replay(model, capacity=100, generator=_from(seed)),
    "joint": lambda model, strength, seed: Replay(model, generator=_from(seed)),
}
"""Methods by the name that tables show, made from a model, a strength and a seed.

LwF and replay weigh each task alike. Replay keeps 100 observations of each class, as van de Ven
et al. (2022) do, and joint training keeps everything.
"""


def play(
    stream: Stream,
    protocol: Protocol,
    device: str,
    regularizer: Callable[[MultiHead], Regularizer | None],
    *,
    seed: int,
    valid: Stream | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Learn a stream by Adam, with a multilayer perceptron, and return the outcome.

    Of a training that diverged before its last task it is only that: ``diverged`` is true, and
    accuracies are NaN.

    Parameters
    ----------
    stream
        The tasks.
    protocol
        ``hidden`` (units of each layer), ``rate`` (of Adam), ``steps`` (of each task), ``batch``.
    device
        Where to train.
    regularizer
        Makes the method from the model.
    seed
        Of the initial weights and of the order of the data.
    valid
        The same tasks with validation images in the place of the test images, as
        :func:`ewc_lib.data.hold_out` makes them. The outcome then has ``valid``, the average
        accuracy on these after the last task.
    **options
        For :func:`ewc_lib.continual.learn`; with ``watch``, the outcome has ``worst``.
    """
    sizes = (stream.n_features, *protocol["hidden"], stream.n_outputs)
    model = MultiHead(mlp(sizes, seed)).to(device)
    if "optimizer" not in options:  # fused: the same update in one kernel, in half the time
        options["optimizer"] = partial(torch.optim.Adam, lr=protocol["rate"], fused=True)
    try:
        learned = learn(
            stream,
            model,
            regularizer(model),
            steps=protocol["steps"],
            batch_size=protocol["batch"],
            seed=seed,
            progress=False,
            **options,
        )
    except ValueError as problem:  # the parameters are NaN when the Fisher information is due
        if "NaN" not in str(problem) and "not finite" not in str(problem):
            raise
        lost = {"accuracy": math.nan} | ({} if valid is None else {"valid": math.nan})
        return {**lost, "diverged": True}
    found = outcome(learned)
    evaluate = options.get("evaluate") or accuracy
    return found if valid is None else {**found, "valid": average_over(model, valid, evaluate)}


def average_over(
    model: MultiHead, stream: Stream, evaluate: Callable[[nn.Module, Any], float] = accuracy
) -> float:
    """Return the average accuracy on the test data of all tasks of a stream, all being learned."""
    accuracies, last = [], len(stream) - 1
    for t in range(len(stream)):
        model.outputs = stream.outputs(t, last)
        accuracies.append(evaluate(model, stream.test(t)))
    return math.fsum(accuracies) / len(accuracies)


METRICS: dict[str, Callable[[Any], float]] = {
    "learning": learning_accuracy,
    "forgetting": forgetting,
    "transfer": backward_transfer,
}
"""What is kept of a matrix of accuracies besides the average."""


def _worst(learned: Learned) -> float:
    return round(min_accuracy(learned.accuracies, learned.lowest), 5)


def outcome(learned: Learned) -> dict[str, Any]:
    """Return what is kept of a run: accuracies after each task, and seconds.

    ``accuracy`` is the average over all tasks after the last one, None if training diverged;
    ``final`` its parts; ``average`` the average over the tasks seen so far, after each task;
    ``learning``, ``forgetting`` and ``transfer`` are learning accuracy, forgetting and backward
    transfer; ``worst``, where tasks were watched, how low the earlier tasks have ever fallen.
    """
    R = learned.accuracies
    T = len(R)
    average = [float(R[t, : t + 1].mean()) for t in range(T)]
    return {
        "accuracy": average_accuracy(R),
        "final": [round(value, 5) for value in R[-1].tolist()],
        "average": [round(value, 5) for value in average],
        **{name: round(metric(R), 5) for name, metric in METRICS.items()},
        **({} if bool(learned.lowest.isnan().all()) else {"worst": _worst(learned)}),
        "seconds_training": round(math.fsum(learned.seconds_training), 2),
        "seconds_consolidation": round(math.fsum(learned.seconds_consolidation), 2),
    }
