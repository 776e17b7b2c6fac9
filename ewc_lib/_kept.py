r"""What a penalty keeps of the tasks so far, in a model that may change: anchor and precision.

.. math:: (\theta - m)^\top A\, (\theta - m) + c

Here are the ways in which they change: with the model, and with one more task.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ewc_lib._anchored import in_layout_of, product, quadratic, solve
from ewc_lib._foreach import each
from ewc_lib._held import Held, held_ones, names_like
from ewc_lib._misuse import warn_of_adapters
from ewc_lib._names import plain_name
from ewc_lib._parameters import Vector
from ewc_lib._rounding import Rests
from ewc_lib._selecting import Chooser, Selection, fixed, select_parameters
from ewc_lib._sharded import any_sharded, is_sharded, placed_like, reshard
from ewc_lib._warning import Once
from ewc_lib.fisher.structures import Diagonal, Fisher
from ewc_lib.fisher.structures.base import Join
from ewc_lib.fisher.structures.vectors import grown
from ewc_lib.norms import warn_of_moving


class Kept:
    """An anchor and a precision of parameters of a model, which are none before the first task.

    Parameters
    ----------
    model
        The network that is being trained.
    params
        The parameters to hold from the next task on.
    """

    def __init__(self, model: nn.Module, params: Selection) -> None:
        self.model = model
        self.params = fixed(model, params)
        self._choose = Chooser()
        self._precision: Fisher | None = None
        self._anchor: Vector = {}
        self._offset = torch.zeros(())
        self._n_tasks = 0
        self._rests = Rests()
        self._is_sharded = False
        self._say, self._warned = Once(), False
        self._known: dict[str, int] = {}
        self._kept_held: tuple[Any, Held] | None = None
        select_parameters(model, self.params)

    @property
    def precision(self) -> Fisher | None:
        """The merged importance of all tasks so far; None before the first."""
        return self._precision

    @property
    def anchor(self) -> Vector:
        """The parameters where the penalty is smallest; empty before the first task."""
        return dict(self._anchor)

    @property
    def n_tasks(self) -> int:
        """Number of consolidated tasks."""
        return self._n_tasks

    def forget(self, pattern: str | Iterable[str]) -> None:
        """Drop parameters from the penalty, which then are free until the next task is finished.

        What remains is the penalty of the others with the dropped ones at their anchor. Call it
        for parameters that the model does not have any more, or that are smaller now; until then
        the penalty raises a ValueError. Call it, too, where a layer was replaced by a new one of
        the same or a larger shape, as a fresh head: it has the name of the old one, so that it
        would be held where that was. A penalty that has forgotten everything is as before the
        first task.

        Parameters
        ----------
        pattern
            A name, a glob pattern such as ``"head.*"``, or several. Names are those of
            :attr:`anchor`, without what wrappers such as ``DataParallel`` put around them.

        Raises
        ------
        ValueError
            If one matches nothing that is held, or if the structure cannot hold what remains.
            Nothing has changed then.

        Examples
        --------
        >>> import torch
        >>> from ewc_lib import EWC
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> ewc = EWC(model, strength=10.0)
        >>> F = ewc.consolidate((torch.randn(8, 3), torch.arange(8) % 2))
        >>> model[1] = torch.nn.Linear(4, 2)  # a head of its own for the second task
        >>> ewc.forget("1.*")
        >>> list(ewc.anchor)
        ['0.weight', '0.bias']
        """
        dropped = names_like(pattern, self._anchor)
        left = {name: value for name, value in self._anchor.items() if name not in dropped}
        if self._precision is None or not left:
            self._keep(None, {})
            self._offset, self._n_tasks = torch.zeros_like(self._offset), 0
        else:
            self._keep(self._precision._within(left), left)
        self._known = {name: i for name, i in self._known.items() if name not in dropped}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters that are chosen, by plain names; there may be none."""
        return self._choose(self.model, self.params)

    def _of_task(self) -> dict[str, nn.Parameter]:
        """Return what the next task is to hold, by the names that it has in the model.

        Raise a ValueError if there is nothing, or if something that is held has gone.
        """
        if self._precision is not None:
            self._held()
        chosen = self._parameters()
        if not chosen:
            return select_parameters(self.model, self.params)  # says why
        named = {short: name for name, short in self._choose.plain(self.model).items()}
        return {named[short]: parameter for short, parameter in chosen.items()}

    def _plain_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the plain names of parameters of the model, or of one that is wrapped."""
        known = self._choose.plain(self.model)
        own = set(known.values())
        return {n: known.get(n, n if n in own else plain_name(n)) for n in names}

    def _plain(self, fisher: Fisher) -> Fisher:
        """Return a Fisher information with plain names."""
        names = self._plain_names(fisher.shapes)
        return fisher if all(map(operator.eq, names, names.values())) else fisher._renamed(names)

    def _held(self) -> Held:
        """Return what is held, after everything else has followed the model.

        Raise a ValueError if that cannot be.
        """
        compiling = torch.compiler.is_compiling()
        if self._is_sharded and not compiling:
            reshard(self.model)
        every = self._choose.every(self.model)
        if not compiling and self._kept_held is not None:
            seen, held = self._kept_held
            if every is seen and held.is_of(self._precision, self._anchor):
                return held
        if not compiling:  # it may have been sharded since, and hold whole parameters now
            reshard(self.model)
            every = self._choose.every(self.model)
        parameters = held_ones(every, self._anchor)
        if not compiling:
            warn_of_adapters(self._say, self.model, self._anchor.keys())
        self._follow(next(iter(parameters.values())).device)
        self._shard(parameters)
        self._grow(parameters)
        assert self._precision is not None
        held = Held(self._precision, self._anchor, parameters, self._rests)
        if not compiling:
            self._kept_held = every, held
        return held

    def _shard(self, parameters: dict[str, nn.Parameter]) -> None:
        """Keep on this process what it has of the parameters, if they were sharded since."""
        if any(is_sharded(p) != is_sharded(self._anchor[name]) for name, p in parameters.items()):
            rests = placed_like(parameters, self._rests.values)
            self._keep(self._precision, self._anchor)
            self._rests.values.update(rests)

    def _grow(self, parameters: dict[str, nn.Parameter]) -> None:
        """Give what has grown a precision of zero where it is new."""
        assert self._precision is not None
        shapes = {name: p.shape for name, p in parameters.items()}
        if any(shape != self._anchor[name].shape for name, shape in shapes.items()):
            anchor = {name: grown(value, parameters[name]) for name, value in self._anchor.items()}
            self._keep(self._precision._embedded(shapes), anchor)

    def _uncast(self) -> AbstractContextManager[Any]:
        """Let no region of autocast round a product with a matrix."""
        if isinstance(self._precision, Diagonal):
            return nullcontext()
        return torch.autocast(self._offset.device.type, enabled=False)

    def _follow(self, device: torch.device) -> None:
        """Move everything to where the model has gone."""
        if self._precision is not None and self._offset.device != device:
            self._precision = self._precision.to(device)
            self._anchor = {name: value.to(device) for name, value in self._anchor.items()}
            self._offset = self._offset.to(device)

    def _optimum(self, precision: Fisher) -> Vector:
        """Copy the present parameters, where a precision is and in its dtypes."""
        reshard(self.model)
        every, found = self._choose.every(self.model), {}
        for name, like in precision.diagonal().items():
            parameter, dtype = every[name], like.dtype
            dtype = dtype.to_complex() if parameter.is_complex() else dtype
            found[name] = parameter.detach().to(like.device, dtype, copy=True)
        return found

    def _merge(self, precision: Fisher) -> None:
        r"""Add the quadratic of one more task around the present parameters, exactly.

        The sum of two quadratics is one quadratic (:eq:`eq-ewc-merge`), with :math:`A + F`,
        the centre :math:`m' = m + (A + F)^{-1} F (t - m)` and a constant. What only one of the
        two holds has the precision zero in the other.
        """
        if self._precision is None:
            self._replace(precision)
            return
        self._warn()
        merged, optimum = self._joined(precision), self._optimum(precision)
        old = self._precision
        both = {**optimum, **self._anchor}
        anchor = {name: both[name] for name in merged.shapes}
        pull = product(precision, {name: t - anchor[name] for name, t in optimum.items()})
        nothing = {name: torch.zeros_like(m) for name, m in anchor.items() if name not in pull}
        centre = each("add", anchor, solve(merged, {**nothing, **pull}))
        self._offset = (
            self._offset
            + quadratic(old, {name: centre[name] - m for name, m in self._anchor.items()})
            + quadratic(precision, {name: t - centre[name] for name, t in optimum.items()})
        )
        self._keep(merged, centre)
        self._n_tasks += 1

    def _joined(self, task: Fisher, decay: float = 1.0, join: Join = operator.add) -> Fisher:
        """Join the precision so far with that of a task."""
        if self._precision is None:
            return task
        self._held()
        self._follow(task.device)
        old = self._precision if decay == 1 else decay * self._precision
        return self._in_order(old, task, join)

    def _in_order(self, old: Fisher, task: Fisher, join: Join = operator.add) -> Fisher:
        """Join two precisions, their parameters in the order of the model."""
        known = old.shapes.keys() | task.shapes.keys()
        every = self._choose.every(self.model)
        return old._united(task, {n: p.shape for n, p in every.items() if n in known}, join)

    def _replace(self, precision: Fisher) -> None:
        """Take this precision around the present parameters instead of what was there."""
        self._warn()
        self._keep(precision, self._optimum(precision))
        self._offset = precision.trace().new_zeros(())
        self._n_tasks += 1

    def _warn(self) -> None:
        """Warn once of what moves and is not held; note what there is to hold."""
        self._known = {name: id(p) for name, p in self._choose.every(self.model).items()}
        self._warned = self._warned or warn_of_moving(self.model)

    def _keep(self, precision: Fisher | None, anchor: Vector) -> None:
        """Keep both in the memory layout of the parameters, so that one sweep takes all."""
        every = self._choose.every(self.model)
        self._is_sharded = any_sharded(every.values())
        if self._is_sharded:
            anchor = placed_like(every, anchor)
            if isinstance(precision, Diagonal):
                precision = replace(precision, values=placed_like(every, precision.values))
        if isinstance(precision, Diagonal):
            anchor = in_layout_of(every, anchor)
            precision = replace(precision, values=in_layout_of(every, precision.values))
        self._precision, self._anchor = precision, anchor
        self._rests.values.clear()
        self._kept_held = None  # free what was held
