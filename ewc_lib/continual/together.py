"""Several networks of one shape, trained at once.

A step of a small network costs little more than the calls that it is made of. Networks of one
shape, stacked along a new first axis, share these calls and nothing else: each has its own data,
its own order of them and its own penalty, and ends where it would have ended alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ewc_lib._anchored import go_
from ewc_lib._anchored import shares as shares_of
from ewc_lib._foreach import within_range
from ewc_lib._metric import rates_of
from ewc_lib._progress import progress as show_progress
from ewc_lib._rounding import Rests
from ewc_lib.attaching import Metric
from ewc_lib.continual._course import course_of
from ewc_lib.continual._measuring import Learned, Measure
from ewc_lib.continual._reading import batches, some
from ewc_lib.continual.learning import task_seed
from ewc_lib.continual.metrics import accuracy
from ewc_lib.continual.tasks import Stream
from ewc_lib.continual.training import adam, proximal_metric
from ewc_lib.ewc import EWC
from ewc_lib.fisher.structures import Diagonal, Vector
from ewc_lib.heads import MultiHead

__all__ = ["Together", "learn_together"]

Labelled = tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]


class Together:
    """Networks of one shape, of which each is trained as :func:`train` would train it alone.

    Parameters
    ----------
    models
        Networks without dropout and their like, on one device. Their parameters become parts of
        one stack, and are changed in place.
    penalties
        One for each network, or None. Those with a diagonal precision make one sweep.
    optimizer
        Makes the optimizer from the stacked parameters, and is kept from task to task. It has to
        treat every number alone, as Adam and SGD do.
    proximal
        Whether the penalties make a proximal step, or its metric, as in :func:`train`. Then their
        precisions have to be diagonal.

    Raises
    ------
    ValueError
        If there is not one penalty for each network.

    Examples
    --------
    >>> from ewc_lib import data
    >>> from ewc_lib.continual import accuracy, mlp
    >>> digits, models = data.digits(), [mlp((64, 32, 10), seed) for seed in range(3)]
    >>> Together(models).train([digits.train] * 3, steps=200, seeds=range(3))
    >>> [accuracy(model, digits.test) > 0.8 for model in models]
    [True, True, True]
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        penalties: Sequence[EWC | None] | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adam,
        proximal: bool | Metric = False,
    ) -> None:
        self.models = list(models)
        self.penalties = [None] * len(self.models) if penalties is None else list(penalties)
        if len(self.models) != len(self.penalties):
            raise ValueError(
                f"{len(self.models)} networks need as many penalties, got {len(self.penalties)}"
            )
        self.metric = proximal_metric(proximal)
        self.parameters = _stack(self.models)
        self.optimizer = optimizer(self.parameters.values())

    def train(
        self,
        data: Sequence[Labelled],
        *,
        steps: int,
        seeds: Iterable[int],
        batch_size: int = 64,
        progress: bool | None = None,
    ) -> None:
        """Train each network on its own data, in the order of its own seed.

        Parameters
        ----------
        data
            Inputs ``[N, D]`` and labels ``[N]`` for each network.
        steps, batch_size, progress
            As in :func:`train`.
        seeds
            Of the order of the data, for each network.

        Raises
        ------
        ValueError
            If a proximal step is due and a precision is not diagonal.
        """
        stiffness, anchors = self._springs()
        alone = [
            i
            for i, penalty in enumerate(self.penalties)
            if penalty is not None and not isinstance(penalty.precision, Diagonal | None)
        ]
        if alone and self.metric:
            raise ValueError("networks make proximal steps together only with diagonal precisions")
        orders = [
            batches(len(y), batch_size, steps, seed)
            for (_, y), seed in zip(data, seeds, strict=True)
        ]
        bar = show_progress(zip(*orders, strict=True), "training", progress, total=steps)
        for rows in bar:
            x, y = (
                torch.stack([own[i][part] for own, part in zip(data, rows, strict=True)])
                for i in (0, 1)
            )
            self.optimizer.zero_grad()
            outputs = vmap(self._outputs)(self.parameters, x)
            loss = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum")
            (loss / batch_size).backward()  # the sum over networks of their mean losses
            if not self.metric:
                self._add_gradients_(stiffness, anchors)
                for i in alone:
                    self._add_gradient_of_(i)
            self.optimizer.step()
            if self.metric:
                self._proximal_step_(stiffness, anchors)

    def _outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(self.models[0], dict(parameters), (x,))
        return found

    def _springs(self) -> tuple[Vector, Vector]:
        """Return strength times precision, and anchors, of the diagonal penalties if there are any.

        Where no penalty holds, the stiffness is zero.
        """
        stiffness: Vector = {}
        anchors: Vector = {}
        for i, penalty in enumerate(self.penalties):
            if penalty is not None and isinstance(penalty.precision, Diagonal):
                for name, anchor in penalty.anchor.items():
                    stack = self.parameters[name].detach()
                    anchors.setdefault(name, stack.clone())[i] = anchor
                    values = penalty.precision.values[name]
                    pull = within_range(penalty.strength, [values]) * values
                    stiffness.setdefault(name, torch.zeros_like(stack))[i] = pull
        return stiffness, anchors

    @torch.no_grad()
    def _add_gradients_(self, stiffness: Vector, anchors: Vector) -> None:
        for name, pull in stiffness.items():
            stack = self.parameters[name]
            assert stack.grad is not None
            stack.grad.addcmul_(pull, stack - anchors[name])

    def _add_gradient_of_(self, i: int) -> None:
        """Let a penalty add to the parts of the gradient that belong to its network."""
        for name, parameter in self.models[i].named_parameters():
            gradient = self.parameters[name].grad
            parameter.grad = None if gradient is None else gradient[i]
        penalty = self.penalties[i]
        assert penalty is not None
        penalty.add_gradient_()

    @torch.no_grad()
    def _proximal_step_(self, stiffness: Vector, anchors: Vector) -> None:
        assert self.metric is not None
        held = {name: self.parameters[name] for name in stiffness}
        rates = rates_of(self.optimizer, held, self.metric)
        shares = shares_of(stiffness, anchors, 1.0, rates)
        go_(held, anchors, shares, Rests())


def _stack(models: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Stack the parameters of networks, which then hold the parts of the stack."""
    owned = [dict(model.named_parameters()) for model in models]
    stacks = {}
    for name in owned[0]:
        stack = nn.Parameter(torch.stack([own[name].detach() for own in owned]))
        for own, part in zip(owned, stack.data, strict=True):
            own[name].data = part
        stacks[name] = stack
    return stacks


def learn_together(
    streams: Sequence[Stream],
    models: Sequence[MultiHead],
    penalties: Sequence[EWC | None],
    *,
    steps: int,
    seeds: Sequence[int],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adam,
    batch_size: int = 128,
    proximal: bool | Metric = False,
    n_samples: int | None = None,
) -> list[Learned]:
    """Learn several streams at once, each as :func:`learn` would learn it alone.

    Parameters
    ----------
    streams, models, penalties, seeds
        One for each run. The streams have equally many tasks, with the same outputs.
    steps, optimizer, batch_size, proximal, n_samples
        As in :func:`learn` and :class:`Together`.

    Returns
    -------
    list of Learned
        Accuracies without times. Those of a network that diverges are NaN from then on.

    Examples
    --------
    >>> from ewc_lib import data
    >>> from ewc_lib.continual import average_accuracy, mlp, permuted
    >>> streams = [permuted(data.digits(), 2, seed=seed) for seed in (0, 1)]
    >>> models = [MultiHead(mlp((64, 64, 10), seed)) for seed in (0, 1)]
    >>> penalties = [EWC(model, strength=30.0) for model in models]
    >>> found = learn_together(streams, models, penalties, steps=100, seeds=[0, 1])
    >>> [average_accuracy(learned.accuracies) > 0.7 for learned in found]
    [True, True]
    """
    together = Together(models, penalties, optimizer=optimizer, proximal=proximal)
    pairs = zip(streams, models, strict=True)
    measures = [Measure(course_of(stream, model), model, accuracy) for stream, model in pairs]
    found = [measure.untrained() for measure in measures]
    for t in range(len(streams[0])):
        tasks = [stream[t] for stream in streams]
        own_seeds = [task_seed(seed, t) for seed in seeds]
        for task, model in zip(tasks, models, strict=True):
            model.outputs = task.outputs
        together.train(
            [task.train for task in tasks], steps=steps, seeds=own_seeds, batch_size=batch_size
        )
        for i, (model, penalty) in enumerate(zip(models, penalties, strict=True)):
            seen = some(tasks[i].train, n_samples, own_seeds[i])
            if not _is_finite(model, seen[0]):
                continue
            if penalty is not None:
                penalty.consolidate(seen)
            measures[i].after(t, found[i])
            if t + 1 < len(streams[i]):
                measures[i].before(t + 1, found[i])
    for stream, model in zip(streams, models, strict=True):
        model.outputs = stream.outputs(len(stream) - 1, after=len(stream) - 1)
    return found


@torch.no_grad()
def _is_finite(model: nn.Module, x: Tensor) -> bool:
    tensors = [*model.parameters(), model(x)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
