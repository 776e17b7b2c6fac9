r"""Experience replay: train on stored observations of earlier tasks as well.

.. math:: \Omega(\theta) = -\frac{\lambda}{B} \sum_b \log p(y_b \mid x_b; \theta)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_lib._arguments import random_source
from ewc_lib._batches import Reading, batches
from ewc_lib._forms import Pick, is_whole, pair, picked
from ewc_lib._parameters import count
from ewc_lib.heads import all_outputs, contains, read, read_now
from ewc_lib.likelihood.agreement import Criterion
from ewc_lib.likelihood.base import precise
from ewc_lib.likelihood.outputs import Categorical, Likelihood, OutputDistribution
from ewc_lib.regularizers._function import no_step
from ewc_lib.regularizers._memory import Part, by_form, joined, parts_from, taken, written
from ewc_lib.regularizers._outputs import OutputPenalty, classes_last, reading_last

__all__ = ["Replay"]


class Replay(OutputPenalty):
    r"""Train on observations of earlier tasks as well.

    .. math:: \Omega(\theta) = -\frac{\lambda}{B} \sum_b \log p(y_b \mid x_b; \theta)

    with :math:`B` observations drawn from all that are stored, with replacement, in each step.
    This is the honest reference for methods that keep no data. With ``capacity=None`` all data
    are kept, which makes it *joint training*: the upper reference that forgets nothing.

    An observation is read by the head of its task. Where the outputs that are read now contain
    that head (classes that are added to one head, or domains), they are read instead, so that
    old and new classes compete.

    Nothing is padded: batches of several lengths are kept apart, and what is drawn of each length
    is run by itself.

    Parameters
    ----------
    model
        The network that is being trained: :class:`ewc_lib.continual.MultiHead`, or any network
        that :func:`ewc_lib.fisher_information` takes.
    strength
        :math:`\lambda \ge 0`. By default the number of earlier tasks, so that each task weighs
        the same: up to a factor, the loss in task :math:`t` is :math:`\frac1t` times that of
        the task plus :math:`1 - \frac1t` times this.
    capacity
        Observations to keep of each class of each task, drawn at random (of each task, where an
        observation has not one class); None for all of them: then tensors are kept, not copied.
    batch_size
        :math:`B`, observations of earlier tasks in each step.
    generator
        Of what is kept and of what is drawn, on the processor. By default a fresh one with seed
        0; the global random state is not used. A state holds that of the generator, too.
    likelihood, criterion
        How to read the outputs, as in :func:`ewc_lib.fisher_information`. Where an observation
        has several labels, as a text has, :math:`B` counts all that count: the loss is their
        mean, as in training.

    Raises
    ------
    ValueError
        If the strength is negative or not finite, or a number is not positive.

    References
    ----------
    Robins 1995; Chaudhry et al. 2019 for small memories; the weighting of van de Ven,
    Tuytelaars and Tolias 2022.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> regularizer = Replay(model, capacity=5)
    >>> regularizer.consolidate((torch.randn(40, 3), torch.arange(40) % 2))
    >>> regularizer.n_stored  # five of each class
    10
    >>> regularizer.before_step()
    >>> regularizer.penalty().item() > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | None = None,
        capacity: int | None = None,
        batch_size: int = 128,
        generator: torch.Generator | None = None,
        *,
        likelihood: Likelihood | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, or None for all, got {capacity}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(model, strength, likelihood, criterion)
        self.capacity, self.batch_size = capacity, batch_size
        self._generator = random_source(generator, torch.device("cpu"))
        self._stored: list[list[Part]] = []
        self._batch: list[tuple[int, Part]] | None = None

    @property
    def n_stored(self) -> int:
        """Number of stored observations."""
        return sum(map(_length, self._stored))

    def before_step(self, inputs: Any = None) -> None:
        """Draw the observations of this step.

        Parameters
        ----------
        inputs
            Not used.
        """
        if self._n_tasks == 0:
            return
        drawn = torch.randint(self.n_stored, (self.batch_size,), generator=self._generator)
        self._batch, start = [], 0
        for task, parts in enumerate(self._stored):
            rows = drawn[(drawn >= start) & (drawn < start + _length(parts))] - start
            own = (part.map(lambda t: t.to(self._device)) for part in taken(parts, rows))
            self._batch += [(task, part) for part in own]
            start += _length(parts)

    def _loss(self) -> Float[Tensor, ""]:
        if self._batch is None:
            raise no_step()
        groups: dict[Any, list[tuple[int, Part]]] = {}
        for task, part in self._batch:
            groups.setdefault(part.form, []).append((task, part))
        found = [term for group in groups.values() for term in self._terms(group)]
        losses, numbers = zip(*found, strict=True)
        loss: Tensor = torch.stack(losses).sum() / max(1, sum(numbers))
        return loss

    def _terms(self, group: list[tuple[int, Part]]) -> list[tuple[Tensor, int]]:
        """Return the loss of the observations of each task, and the number of their labels."""
        whole = joined([part for _, part in group])
        outputs = precise(classes_last(self._distribution, all_outputs(self.model, whole.inputs)))
        parts = zip(group, outputs.split([len(part) for _, part in group]), strict=True)
        return [self._negative_log_likelihood(task, part, own) for (task, part), own in parts]

    def _negative_log_likelihood(self, task: int, part: Part, outputs: Tensor) -> tuple[Any, int]:
        distribution, target = reading_last(self._distribution), part.target
        if outputs.dim() > 1:
            now = read_now(self.model, outputs.shape[-1])
            which = now if contains(now, self._heads[task]) else self._heads[task]
            outputs, target = read(outputs, which), _moved(distribution, target, -which.start)
        mask = distribution.mask(target)
        number = target.numel() if mask is None else int(mask.sum())
        return -distribution.log_prob(outputs, target).sum(), number

    def consolidate(self, data: Any, *, batch: Pick | None = None) -> None:
        """Finish a task: store some of its observations, or all.

        Parameters
        ----------
        data
            As in :func:`ewc_lib.fisher_information`. Labels count from the first output that is
            read.
        batch
            As in :func:`ewc_lib.fisher_information`.

        Raises
        ------
        ValueError
            If the data are empty or of unequal lengths, or a target is none that the outputs can
            be about, or if the likelihood is not the one of the loss that the model or the
            criterion has. Nothing has changed then.
        """
        data = picked(data, batch)
        reading, distribution = self._agree(data)
        parts = self._parts(data, reading)
        head = self._check(parts, distribution)
        if self.capacity is not None:
            parts = taken(parts, self._choose(parts, distribution, self.capacity))
        self._distribution = distribution
        self._stored.append(
            [Part(part.inputs, _moved(distribution, part.target, head.start)) for part in parts]
        )
        self._heads.append(head)
        self._batch = None
        self._n_tasks += 1

    def _parts(self, data: Any, reading: Reading) -> list[Part]:
        if is_whole(data):
            whole = Part(*pair(data, "data"))
            count((whole.inputs, whole.target))
            return [whole]
        pieces = [batch.checked() for batch in batches(reading, self._device)]
        return by_form([Part(piece.inputs, piece.target) for piece in pieces])

    def _check(self, parts: list[Part], distribution: OutputDistribution) -> range:
        """Return the outputs that are read now; raise a ValueError for targets that do not fit."""
        head = range(0)
        for part in parts:
            first = part.take(torch.arange(1)).map(lambda t: t.to(self._device))
            outputs = classes_last(distribution, self._outputs_of(first.inputs))
            head = read_now(self.model, outputs.shape[-1] if outputs.dim() > 1 else 1)
            read_head = outputs if outputs.dim() == 1 else read(outputs, head)
            if isinstance(distribution, Categorical):
                _check_labels(distribution, part.target, len(head))
            target = first.target
            reading_last(distribution).check(read_head, target)
        return head

    def _choose(self, parts: list[Part], distribution: OutputDistribution, capacity: int) -> Tensor:
        """Choose observations at random: of each class, if each has one."""
        found = [torch.arange(_length(parts))]
        if isinstance(distribution, Categorical) and parts[0].target.dim() == 1:
            y = torch.cat([part.target for part in parts]).cpu()
            found = [(y == label).nonzero().squeeze(1) for label in y.unique()]
        keep = []
        for rows in found:
            keep.append(rows[torch.randperm(len(rows), generator=self._generator)[:capacity]])
        return torch.cat(keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is stored, and the state of the random draws, as plain tensors.

        Tensors that are stored are given out, not copied, unless they share their memory.
        """
        state, seen = self._state() | {"generator": self._generator.get_state()}, set()
        for t, parts in enumerate(self._stored):
            for key, tensor in written(parts).items():
                memory = tensor.untyped_storage().data_ptr()
                state[f"{key}.{t}"] = tensor.clone() if memory in seen else tensor.contiguous()
                seen.add(memory)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        Raises
        ------
        ValueError
            If it is not such a state. Nothing has changed then.
        """
        self._check_state(state, "generator")
        stored = []
        for t in range(int(state["n_tasks"])):
            own = {k.removesuffix(f".{t}"): v for k, v in state.items() if k.endswith(f".{t}")}
            try:
                parts = parts_from(own)
            except KeyError as error:
                name = f"{error.args[0]}.{t}"
                raise ValueError(f"this is not the state of Replay: it has no {name!r}") from None
            stored.append([part.map(lambda x: x.to(self._device)) for part in parts])
        self._generator.set_state(state["generator"].cpu())
        self._stored, self._batch = stored, None
        self._load(state)


def _length(parts: list[Part]) -> int:
    return sum(map(len, parts))


def _moved(distribution: OutputDistribution, target: Tensor, by: int) -> Tensor:
    """Count labels from another output; what does not count stays as it is."""
    if by == 0 or not isinstance(distribution, Categorical):
        return target
    return torch.where(target == distribution.ignore_index, target, target + by)


def _check_labels(distribution: Categorical, target: Tensor, n: int) -> None:
    if target.is_floating_point():
        return  # refused with its form
    found = target[target != distribution.ignore_index].unique().tolist()
    if bad := [label for label in found if not 0 <= label < n]:
        raise ValueError(f"the labels {bad} are not those of the {n} outputs read now")
