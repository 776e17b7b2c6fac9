"""Observations that are kept: inputs of any structure, and batches of several lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._pytree import tree_map

from ewc_lib._parameters import form
from ewc_lib.fisher.structures.states import decode, encode


@dataclass(frozen=True)
class Part:
    """Observations of one form: with the same dtypes, and the same shapes but for their number."""

    inputs: Any
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Int64[Tensor, " n"]) -> Part:
        """Return some of the observations."""
        return self.map(lambda t: t[rows.to(t.device)])

    def map(self, change: Callable[[Tensor], Tensor]) -> Part:
        """Do the same to all tensors."""
        return Part(*tree_map(change, (self.inputs, self.target)))

    @property
    def form(self) -> Any:
        """Everything but the number of observations and their values."""
        return form((self.inputs, self.target))


def joined(parts: list[Part]) -> Part:
    """Put parts of one form together."""
    if len(parts) == 1:
        return parts[0]
    pairs = [(part.inputs, part.target) for part in parts]
    return Part(*tree_map(lambda *leaves: torch.cat(leaves), *pairs))


def by_form(parts: list[Part]) -> list[Part]:
    """Put together what has the same form, and keep the rest apart: nothing is padded."""
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.form, []).append(part)
    return list(map(joined, groups.values()))


def taken(parts: list[Part], rows: Int64[Tensor, " n"]) -> list[Part]:
    """Return some observations, which are counted over all parts."""
    found, start = [], 0
    for part in parts:
        own = rows[(rows >= start) & (rows < start + len(part))] - start
        if len(own):
            found.append(part.take(own))
        start += len(part)
    return found


def written(parts: list[Part]) -> dict[str, Tensor]:
    """Return the parts of a task as named tensors: one tensor of inputs is ``x``."""
    if len(parts) == 1 and isinstance(parts[0].inputs, Tensor):
        return {"x": parts[0].inputs, "y": parts[0].target}
    leaves: list[Tensor] = []
    skeleton = [[_skeleton(part.inputs, leaves), _skeleton(part.target, leaves)] for part in parts]
    return {"form": encode(json.dumps(skeleton))} | {str(k): leaf for k, leaf in enumerate(leaves)}


def parts_from(state: dict[str, Tensor]) -> list[Part]:
    """Return the parts that :func:`written` wrote.

    Raises
    ------
    KeyError
        If a tensor is missing.
    """
    if "form" not in state:
        return [Part(state["x"], state["y"])]
    skeleton = json.loads(decode(state["form"]))
    return [Part(_filled(inputs, state), _filled(target, state)) for inputs, target in skeleton]


def _skeleton(tree: Any, leaves: list[Tensor]) -> Any:
    """Return a structure with a number in the place of each tensor, and collect the tensors."""
    if isinstance(tree, dict):
        return {"dict": [[key, _skeleton(entry, leaves)] for key, entry in tree.items()]}
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_skeleton(entry, leaves) for entry in tree]}
    leaves.append(tree)
    return len(leaves) - 1


def _filled(skeleton: Any, state: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, int):
        return state[str(skeleton)]
    ((kind, entries),) = skeleton.items()
    if kind == "dict":
        return {key: _filled(entry, state) for key, entry in entries}
    found = [_filled(entry, state) for entry in entries]
    return tuple(found) if kind == "tuple" else found
