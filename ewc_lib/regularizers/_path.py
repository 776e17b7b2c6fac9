"""What the methods share that watch the path of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ewc_lib._anchored import displacement
from ewc_lib._foreach import each
from ewc_lib._held import grown_from
from ewc_lib._parameters import Vector
from ewc_lib._selecting import Selection
from ewc_lib._states import Loader, by_plain_names
from ewc_lib.attaching import Form, Metric, own_parameters
from ewc_lib.fisher.structures import check_shapes
from ewc_lib.fisher.structures.states import under
from ewc_lib.fisher.structures.vectors import grown, has_room
from ewc_lib.regularizers._importance import ImportancePenalty, copies

NO_STEPS = "Call before_step and after_step in every step of a task."


class PathPenalty(ImportancePenalty):
    """A penalty that is told, for each step, the gradient of the task and the movement.

    The gradient is read before the penalty adds its own. The movement is measured from
    ``before_step`` to ``after_step``, so that of a proximal step is part of it.
    """

    def __init__(self, model: nn.Module, strength: float, *, params: Selection = None) -> None:
        super().__init__(model, strength, params=params)
        self._memory: dict[str, Vector] = {}
        self._noted: tuple[Vector, Vector] | None = None
        self._n_steps = 0
        self._stepping: ref[torch.optim.Optimizer] | None = None
        self._counts = True

    def _check_goes_with(
        self, optimizer: torch.optim.Optimizer, form: Form, metric: Metric
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{type(self).__name__} adds up gradient times movement, step by step, and LBFGS "
                "makes many steps in one"
            )
        super()._check_goes_with(optimizer, form, metric)

    def _reads_gradients(self, form: Form) -> bool:
        return True

    def _note_before(self, optimizer: torch.optim.Optimizer) -> None:
        self.before_step()
        assert self._noted is not None
        now, gradients = self._noted
        own, mine = own_parameters(optimizer), self._parameters()
        others = [name for name, p in mine.items() if id(p) not in own]
        self._noted = now, gradients | {n: torch.zeros_like(gradients[n]) for n in others}
        first = self._stepping and self._stepping()
        if self._n_steps == 0 or first is None:
            self._stepping = ref(optimizer)
        elif first is not optimizer:
            self._of_another()

    def _of_another(self) -> None:
        """Let a step of a second optimizer in the same task not count as one more."""
        self._counts = False

    def before_task(self) -> None:
        self._noted = self._stepping = None
        self._begin()

    @torch.no_grad()
    def before_step(self, inputs: Any = None) -> None:
        self._counts = True
        if self._n_steps == 0:
            self._begin()
        parameters, start = self._parameters(), self._memory["start"]
        now = self._copy()
        if any(n not in start or start[n].shape != p.shape for n, p in parameters.items()):
            self._memory["start"] = self._recall("start", now)
        self._noted = now, copies({name: _gradient(p) for name, p in parameters.items()})

    @torch.no_grad()
    def after_step(self) -> None:
        if self._noted is None:
            return
        before, gradients = self._noted
        movements = displacement(self._parameters(), before)
        self._noted = None
        self._n_steps += self._counts
        self._moved(gradients, movements)

    def _begin(self) -> None:
        """Begin a task at the present parameters."""
        raise NotImplementedError

    def _moved(self, gradients: Vector, movements: Vector) -> None:
        """Take one step into account."""
        raise NotImplementedError

    def _recall(self, quantity: str, new: Vector | None = None) -> Vector:
        """Return a remembered quantity of the parameters as they are in the model now.

        Where nothing is remembered, because a parameter is new or has grown, it is another one;
        by default zero.
        """
        values = self._memory.get(quantity, {})
        found = {name: values[name].to(p.device) for name, p in self._detached() if name in values}
        changed = [n for n, p in self._detached() if n not in found or found[n].shape != p.shape]
        if changed:
            new = self._zeros() if new is None else new
            for name in changed:
                old = found.get(name, new[name])
                fits = has_room(new[name].shape, old.shape)
                found[name] = grown(old, new[name]) if fits else new[name]
        return {name: found[name] for name, _ in self._detached()}

    def _add(self, quantity: str, values: Vector, factor: float = 1.0) -> None:
        """Add to a remembered quantity."""
        if quantity in self._memory:
            total = each("add_", self._recall(quantity), values, alpha=factor)
        else:
            total = each("mul", values, factor)
        self._memory[quantity] = {**self._memory.get(quantity, {}), **total}

    def forget(self, pattern: str | Iterable[str]) -> None:
        before = list(self._anchor)
        super().forget(pattern)
        gone = [name for name in before if name not in self._anchor]
        self._memory = {
            quantity: {name: value for name, value in values.items() if name not in gone}
            for quantity, values in self._memory.items()
        }
        self._noted = None

    def state_dict(self) -> dict[str, Tensor]:
        memory = {
            f"memory.{quantity}.{name}": value
            for quantity, values in self._memory.items()
            for name, value in by_plain_names(values).items()
        }
        return super().state_dict() | {"n_steps": torch.tensor(self._n_steps)} | memory

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        every = self._choose.every(self.model)
        loader = Loader(every, next(self.model.parameters()).device)
        quantities = dict.fromkeys(key.split(".")[0] for key in under("memory.", state))
        memory = {q: loader.vector(under(f"memory.{q}.", state)) for q in quantities}
        for values in memory.values():
            shapes = {name: value.shape for name, value in values.items()}
            check_shapes(grown_from(shapes, every), shapes)
        super().load_state_dict(state)
        self._memory, self._noted = memory, None
        self._n_steps = int(state.get("n_steps", torch.tensor(0)))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient; zero if there is none, and whole if it is sparse."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
