"""Pairs of inputs and targets in the forms that people have them, and what to do about others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

Pick: TypeAlias = Callable[[Any], Any]
"""Picks inputs and targets from a batch that holds more."""

FORMS = (
    "a DataLoader, another iterable of batches (inputs, targets), or one tuple of tensors "
    "(inputs, targets)"
)
NO_TARGETS = (
    "targets matter to kind='empirical' alone; for the other kinds give any of the right form, "
    "such as torch.zeros(len(inputs), dtype=torch.long) for classes"
)


def is_whole(data: Any) -> bool:
    """Tell whether data are one tuple of all inputs and all targets, not several batches."""
    return isinstance(data, tuple) and any(map(_is_array, data[:1] + data[-1:]))


class Picked:
    """Batches from each of which a function picks what is wanted of it.

    Parameters
    ----------
    data
        Batches.
    pick
        Returns a batch of a form that :func:`pair` takes.
    """

    def __init__(self, data: Any, pick: Pick) -> None:
        self.data, self.pick = data, pick

    def __iter__(self) -> Iterator[Any]:
        return map(self.pick, check_iterable(self.data))


def picked(data: Any, pick: Pick | None) -> Any:
    """Let a function pick from every batch; one tuple of tensors is one batch."""
    if pick is None:
        return data
    if not callable(pick):
        raise ValueError(f"batch must be a function of one batch, got {type(pick).__name__}")
    if not is_whole(data):
        return Picked(data, pick)
    found = pick(data)
    return found if is_whole(found) else [found]


def is_data_set(data: Any) -> bool:
    """Tell whether data give single observations, of PyTorch or of the library of Hugging Face."""
    return isinstance(data, Dataset) or hasattr(data, "__getitems__")


def is_read_once(data: Any) -> bool:
    """Tell whether data can be read only once, as what a generator yields."""
    own = data.data if isinstance(data, Picked) else data
    return isinstance(own, Iterator)


def pair(raw: Any, where: str) -> tuple[Any, Tensor]:
    """Return the inputs and the targets of a batch, NumPy arrays as tensors.

    Raises
    ------
    ValueError
        If it is of another form, with what to do about it.
    """
    if isinstance(raw, Mapping):
        if "labels" not in raw:
            raise ValueError(
                f"{where} is a dict without 'labels'; it has {sorted(map(str, raw))}. Give its "
                "targets that name, or give pairs (inputs, targets)"
            )
        inputs: Any = {key: value for key, value in raw.items() if key != "labels"}
        target = raw["labels"]
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        inputs, target = raw
    else:
        raise ValueError(f"{where} must be a pair (inputs, targets), got {_describe(raw)}")
    if target is None:
        raise ValueError(f"{where} must hold tensors, but its targets are None: {NO_TARGETS}")
    if isinstance(inputs, Mapping):  # also that of another library, which has no leaves
        inputs = dict(inputs)
    target = _tensor(target, f"{where} must hold tensors, but its targets")
    inputs = tree_map(lambda x: _tensor(x, f"{where} must hold tensors, but its inputs"), inputs)
    for leaf in tree_leaves((inputs, target)):
        _check_rows(leaf, where)
    return inputs, target


def check_iterable(data: Any) -> Iterable[Any]:
    """Return data that are batches, or raise a ValueError that says what to give instead."""
    advice = ""
    if is_data_set(data):
        advice = "; make batches of it: torch.utils.data.DataLoader(dataset, batch_size=128)"
    elif isinstance(data, nn.Module):
        advice = "; the model comes first, then the data"
    elif isinstance(data, Mapping):
        advice = "; if it is one batch, give a list with it"
    elif _is_array(data):
        advice = "; inputs and targets go together, (inputs, targets)"
    elif isinstance(data, str | bytes | PurePath):
        advice = "; read the file first"
    elif callable(data):
        advice = "; call it, and give what it returns"
    elif isinstance(data, Iterable):
        return data
    raise ValueError(f"data must be {FORMS}; got {type(data).__name__}{advice}")


def _is_array(value: Any) -> bool:
    """Tell whether something is numbers side by side, as of PyTorch, NumPy or pandas."""
    return isinstance(value, Tensor | np.ndarray) or hasattr(value, "to_numpy")


def _tensor(value: Any, what: str) -> Tensor:
    """Return a tensor, or raise a ValueError that says how to make one."""
    if isinstance(value, Tensor):
        return value
    if _holds_numbers(value):
        try:
            return torch.as_tensor(np.require(value, requirements=["C", "W"]))  # else torch warns
        except (TypeError, ValueError) as error:  # a precision or an order of bytes of its own
            raise ValueError(f"{what} are no tensor: {error}") from None
    raise ValueError(f"{what} are {_form_of(value)}")


def _holds_numbers(value: Any) -> bool:
    masked = isinstance(value, np.ma.MaskedArray)
    return isinstance(value, np.ndarray) and not masked and value.dtype.kind in "biufc"


def _form_of(value: Any) -> str:
    """Say what is not a tensor, and what to do about it."""
    leaves = value.ravel().tolist() if isinstance(value, np.ndarray) else tree_leaves(value)
    kind = type(value).__name__
    if hasattr(value, "to_numpy"):
        return f"a {kind}: give .to_numpy() of it"
    if any(isinstance(leaf, str | bytes) for leaf in leaves):
        return (
            "strings: number the classes, numpy.unique(targets, return_inverse=True)[1], and "
            "tokenise texts"
        )
    if isinstance(value, list | tuple | dict) and any(isinstance(leaf, Tensor) for leaf in leaves):
        return (
            f"a {kind} of several tensors, as boxes and classes of objects: no likelihood reads "
            "them; give one tensor, with one row for each observation"
        )
    if isinstance(value, list | tuple) and leaves and leaves[0] is not None:
        return f"a {kind} of {type(leaves[0]).__name__}: give torch.tensor({kind})"
    return (
        f"{'None' if value is None else kind}, not torch.Tensor; batches have one observation per "
        "row, as a DataLoader makes them"
    )


def _check_rows(tensor: Tensor, where: str) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{where} holds a tensor with the layout {tensor.layout}, which has no rows to take: "
            "give .to_dense() of a sparse one, and pad a nested one"
        )
    if tensor.dim() == 0:
        raise ValueError(
            f"{where} must have one observation per row, but holds a 0-d tensor; a DataLoader "
            "makes batches of single observations"
        )


def _describe(raw: Any) -> str:
    if not isinstance(raw, (tuple, list)):
        if _is_array(raw):
            return (
                f"{type(raw).__name__}; if these are all data, give one tuple (inputs, targets), "
                "not a list"
            )
        return type(raw).__name__
    kinds = list(dict.fromkeys(type(item).__name__ for item in raw))
    advice = "; give tensors, as by torch.tensor(list)"
    if len(raw) == 1:
        advice = f"; {NO_TARGETS}"
    elif any(map(_is_array, raw)):
        advice = (
            "; several inputs are one tuple, ((x, z), y), and what the model does not take is "
            "left out, as by batch=lambda b: (b[0], b[1])"
        )
    return f"{len(raw)} items of {', '.join(kinds)}{advice}"
