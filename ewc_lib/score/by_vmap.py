"""Per-observation gradients of any model: slow, and with no rule that could be wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._C import _functorch
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ewc_lib._calling import Caller, forward
from ewc_lib._sharded import present
from ewc_lib.score import memory

Gradients: TypeAlias = dict[str, Float[Tensor, "K n ..."]]


class DisagreementError(RuntimeError):
    """Observations of which the model wants to know a value that they do not share.

    Parameters
    ----------
    groups
        For each observation the number of its group, in which all share the value.
    """

    def __init__(self, groups: Int[Tensor, " n"]) -> None:
        super().__init__("what is computed depends on a value that is another in each observation")
        self.groups = groups


class Agreement(TorchFunctionMode):
    """Let a model know the values that are the same in all observations of a vmap."""

    asking = frozenset(
        {
            Tensor.__bool__,
            Tensor.__int__,
            Tensor.__float__,
            Tensor.__index__,
            Tensor.item,
            Tensor.tolist,
            Tensor.nonzero,
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.asking:
            args = (self._common(args[0]), *args[1:])
        return func(*args, **kwargs or {})

    @classmethod
    def _common(cls, tensor: Tensor) -> Tensor:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return tensor
        inner = _functorch.get_unwrapped(tensor)
        if _functorch.is_batchedtensor(tensor):
            rows = inner.movedim(_functorch.maybe_get_bdim(tensor), 0)
            groups = rows.reshape(len(rows), -1).unique(dim=0, return_inverse=True)[1]
            if groups.any():
                raise DisagreementError(groups)
            inner = rows[0]
        return cls._common(inner)


class VmapGradients:
    """Gradients of the named parameters for each observation, by :mod:`torch.func`.

    Chunks of observations go through ``vmap``, each group apart of which the model computes
    something else; a model that vmap cannot follow is run one observation at a time, and one
    warning says so.

    Parameters
    ----------
    caller
        Calls the network, which is in eval mode.
    parameters
        All parameters that could be asked for, by name.
    """

    def __init__(self, caller: Caller, parameters: dict[str, nn.Parameter]) -> None:
        self.caller = caller
        self.parameters = parameters
        self.by_loop = False
        """Whether observations are taken one at a time."""
        self.looped: set[str] = set()
        """Parameters that were."""

    def gradients(
        self, names: list[str], inputs: Any, columns: Float[Tensor, "K N ..."]
    ) -> Iterator[tuple[slice, Gradients]]:
        """Yield, for parts of the batch, the gradient of every column and observation."""
        size = sum(self.parameters[name].numel() for name in names) * columns.element_size()
        room = memory.budget(columns.device).vmap
        for part in memory.pieces(columns.shape[1], size * len(columns), room):
            xs = tree_map(lambda leaf, part=part: leaf[part], inputs)
            yield part, self._part(names, xs, columns[:, part])

    def _part(self, names: list[str], inputs: Any, columns: Tensor) -> Gradients:
        with present(self.parameters.values()):  # a transform sees no values that come later
            return self._of_present(names, inputs, columns)

    def _of_present(self, names: list[str], inputs: Any, columns: Tensor) -> Gradients:
        if not self.by_loop:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return self._in_groups(names, inputs, columns)
            except (RuntimeError, AssertionError) as error:
                self.by_loop = True
                self.warn(str(error).splitlines()[0])
        self.looped |= set(names)
        return self._one_by_one(names, inputs, columns)

    def warn(self, reason: str) -> None:
        """Tell that observations are taken one at a time, and why."""
        warnings.warn(
            f"vmap cannot follow {type(self.caller.model).__name__}; its gradients are computed "
            f"one observation at a time, which is slow ({reason})",
            RuntimeWarning,
            stacklevel=_depth(),
        )

    def _in_groups(self, names: list[str], inputs: Any, columns: Tensor) -> Gradients:
        """Take together the observations of which the model computes the same."""
        try:
            return self._vectorised(names, inputs, columns)
        except DisagreementError as found:
            count = int(found.groups.max()) + 1
            if 2 * count > columns.shape[1]:
                raise
            at = [(found.groups == number).nonzero().squeeze(1) for number in range(count)]
        parts = [
            self._in_groups(names, tree_map(lambda leaf, i=i: leaf[i], inputs), columns[:, i])
            for i in at
        ]
        order = torch.cat(at).argsort()
        return {name: torch.cat([g[name] for g in parts], 1)[:, order] for name in names}

    def _vectorised(self, names: list[str], inputs: Any, columns: Tensor) -> Gradients:
        detached = {name: p.detach() for name, p in self.caller.model.named_parameters()}
        chosen = {name: detached.pop(name) for name in names}

        def pull(x: Any, column: Tensor) -> dict[str, Tensor]:
            one = tree_map(lambda leaf: leaf.unsqueeze(0), x)

            def output(p: dict[str, Tensor]) -> Tensor:
                with self.caller.prepared(one) as given:
                    return forward(self.caller.model, given, {**detached, **p}).squeeze(0)

            pullback = vjp(output, chosen)[1]
            # One vmap only: within another, some backward operations are silently wrong.
            by_column = [pullback(column[k])[0] for k in range(len(column))]
            return {name: torch.stack([g[name] for g in by_column]) for name in names}

        with Agreement():
            by_observation: Gradients = vmap(pull)(inputs, columns.transpose(0, 1))
        return {name: g.transpose(0, 1) for name, g in by_observation.items()}

    def _one_by_one(self, names: list[str], inputs: Any, columns: Tensor) -> Gradients:
        chosen = [self.parameters[name] for name in names]
        k, n = columns.shape[:2]
        result = {name: columns.new_zeros(k, n, *self.parameters[name].shape) for name in names}
        for i in range(n):
            one = tree_map(lambda leaf, i=i: leaf[i : i + 1], inputs)
            with torch.enable_grad(), self.caller.prepared(one) as given:
                output = forward(self.caller.model, given)
            for j in range(k):
                gradients = torch.autograd.grad(
                    output, chosen, columns[j, i : i + 1], retain_graph=True, allow_unused=True
                )
                for name, g in zip(names, gradients, strict=True):
                    if g is not None:
                        result[name][j, i] = g.to_dense() if g.is_sparse else g
        return result


def _depth() -> int:
    """Count the calls down to the user's own line, where a warning belongs."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("ewc_lib."):
        frame, depth = frame.f_back, depth + 1
    return depth
