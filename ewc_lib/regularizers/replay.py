r"""Experience replay: train on stored observations of earlier tasks as well.

.. math:: \Omega(\theta) = -\frac{\lambda}{B} \sum_b \log p(y_b \mid x_b; \theta)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ewc_lib._arguments import random_source
from ewc_lib._batches import batches
from ewc_lib._forms import Pick, picked
from ewc_lib._parameters import count
from ewc_lib.heads import all_outputs
from ewc_lib.regularizers._function import FunctionPenalty, contains, no_step, read_now

__all__ = ["Replay"]


class Replay(FunctionPenalty):
    r"""Train on observations of earlier tasks as well.

    .. math:: \Omega(\theta) = -\frac{\lambda}{B} \sum_b \log p(y_b \mid x_b; \theta)

    with :math:`B` observations drawn from all that are stored, with replacement, in each step.
    This is the honest reference for methods that keep no data. With ``capacity=None`` all data
    are kept, which makes it *joint training*: the upper reference that forgets nothing.

    An observation is read by the head of its task. Where the outputs that are read now contain
    that head (classes that are added to one head, or domains), they are read instead, so that
    old and new classes compete.

    Parameters
    ----------
    model
        The network that is being trained: :class:`ewc_lib.continual.MultiHead`, or any
        classifier with outputs ``[N, C]``.
    strength
        :math:`\lambda \ge 0`. By default the number of earlier tasks, so that each task weighs
        the same: up to a factor, the loss in task :math:`t` is :math:`\frac1t` times that of
        the task plus :math:`1 - \frac1t` times this.
    capacity
        Observations to keep of each class of each task, drawn at random; None for all of them:
        then tensors are kept, not copied.
    batch_size
        :math:`B`, observations of earlier tasks in each step.
    generator
        Of what is kept and of what is drawn, on the processor. By default a fresh one with seed
        0; the global random state is not used. A state holds that of the generator, too.

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
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, or None for all, got {capacity}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(model, strength)
        self.capacity, self.batch_size = capacity, batch_size
        self._generator = random_source(generator, torch.device("cpu"))
        self._stored: list[tuple[Tensor, Tensor]] = []
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def n_stored(self) -> int:
        """Number of stored observations."""
        return sum(len(y) for _, y in self._stored)

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
        ends = torch.tensor([len(y) for _, y in self._stored]).cumsum(0)
        task = torch.bucketize(drawn, ends, right=True)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for t, (x, y) in enumerate(self._stored):
            of_task = task == t
            rows = drawn[of_task] - (ends[t] - len(y))
            parts.append((x[rows], y[rows], task[of_task]))
        x, y, task = (torch.cat(column).to(self._device) for column in zip(*parts, strict=True))
        self._batch = x, y, task

    def _loss(self) -> Float[Tensor, ""]:
        if self._batch is None:
            raise no_step()
        x, y, task = self._batch
        outputs = all_outputs(self.model, x)
        column = torch.arange(outputs.shape[1], device=outputs.device)
        start, stop = self._read(outputs.shape[1]).to(outputs.device)[task].unbind(1)
        unread = (column < start[:, None]) | (column >= stop[:, None])
        return F.cross_entropy(outputs.masked_fill(unread, -torch.inf), y)

    def _read(self, n_outputs: int) -> Int64[Tensor, "T 2"]:
        """Return the outputs that are read of an observation of each task."""
        now = read_now(self.model, n_outputs)
        which = [now if contains(now, head) else head for head in self._heads]
        return torch.tensor([[head.start, head.stop] for head in which])

    def consolidate(self, data: Any, *, batch: Pick | None = None) -> None:
        """Finish a task: store some of its observations, or all.

        Parameters
        ----------
        data
            One tuple of tensors ``(inputs, labels)``, or a DataLoader or other iterable of
            such batches. Labels count from the first output that is read.
        batch
            As in :func:`ewc_lib.fisher_information`.

        Raises
        ------
        ValueError
            If inputs are not one tensor, the data are empty or of unequal lengths, or a label
            is not the number of an output. Nothing has changed then.
        """
        x, y = self._observations(picked(data, batch))
        head = self._head(x)
        if bad := [label for label in y.unique().tolist() if not 0 <= label < len(head)]:
            raise ValueError(f"the labels {bad} are not those of the {len(head)} outputs read now")
        if self.capacity is not None:
            keep = self._choose(y, self.capacity)
            x, y = x[keep], y[keep]
        self._stored.append((x, y if head.start == 0 else y + head.start))
        self._heads.append(head)
        self._batch = None
        self._n_tasks += 1

    def _observations(self, data: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)):
            pieces = [batch.checked() for batch in batches(data, self._device)]
            if not all(isinstance(piece.inputs, Tensor) for piece in pieces):
                raise ValueError("to be replayed, the inputs must be one tensor [N, ...]")
            data = (
                torch.cat([piece.inputs for piece in pieces]),
                torch.cat([piece.target for piece in pieces]),
            )
        if len(data) != 2:
            raise ValueError(f"data must be a pair (inputs, labels), got {len(data)} tensors")
        count(data)
        x, y = data
        if y.dim() != 1 or y.is_floating_point():
            raise ValueError(f"labels must be integers [N], got {y.dtype} {tuple(y.shape)}")
        return x, y

    def _choose(self, y: Tensor, capacity: int) -> Tensor:
        """Choose observations of each class at random."""
        keep = []
        for label in y.unique():
            found = (y == label).nonzero().squeeze(1)
            order = torch.randperm(len(found), generator=self._generator)[:capacity]
            keep.append(found[order.to(found.device)])
        return torch.cat(keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is stored, and the state of the random draws, as plain tensors.

        Tensors that are stored are given out, not copied, unless they share their memory.
        """
        state, seen = self._state() | {"generator": self._generator.get_state()}, set()
        for t, pair in enumerate(self._stored):
            for key, tensor in zip((f"x.{t}", f"y.{t}"), pair, strict=True):
                memory = tensor.untyped_storage().data_ptr()
                state[key] = tensor.clone() if memory in seen else tensor.contiguous()
                seen.add(memory)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, on the model's device.

        Raises
        ------
        ValueError
            If it is not such a state. Nothing has changed then.
        """
        pairs = [(f"x.{t}", f"y.{t}") for t in range(int(state.get("n_tasks", torch.tensor(0))))]
        self._check_state(state, "generator", *(key for pair in pairs for key in pair))
        self._generator.set_state(state["generator"].cpu())
        self._stored = [(state[x].to(self._device), state[y].to(self._device)) for x, y in pairs]
        self._batch = None
        self._load(state)
