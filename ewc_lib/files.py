"""Files with a card: tensors in the format safetensors, and in their header what they are.

:meth:`ewc_lib.Fisher.save` and :meth:`ewc_lib.EWC.save` write them. Any reader of safetensors
reads the tensors; nothing in a file is code. The card is JSON in the metadata ``"ewc_lib"``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewc_lib._identity import described, of_all, values_in
from ewc_lib._names import plain_names
from ewc_lib._sharded import whole

if TYPE_CHECKING:
    from ewc_lib.fisher.structures import Fisher
    from ewc_lib.quadratic import QuadraticPenalty
    from ewc_lib.regularizers import AdapterEWC

__all__ = ["card"]

FORMAT = 1
"""Version of the form of the card; a reader refuses what is newer."""

CARD, TEXTS, COMPLEX, SUMS = "ewc_lib", "ewc_lib.texts", "ewc_lib.complex", "ewc_lib.sums"
"""Keys of the header: the card, the texts of a state, the keys of its complex tensors, and a
checksum of every tensor, which files from before it do not have."""


class _Header(NamedTuple):
    """What the keys of a header hold."""

    card: dict[str, Any]
    texts: dict[str, str]
    pairs: list[str]
    sums: dict[str, int]


def card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says of itself, without reading its tensors.

    Parameters
    ----------
    path
        What :meth:`ewc_lib.Fisher.save` or :meth:`ewc_lib.EWC.save` has written.

    Returns
    -------
    dict
        ``"holds"``, the class of what was saved; ``"structure"``, ``"kind"``, ``"likelihood"``,
        ``"n_samples"``; ``"tolerance"``, what the certificate let pass, as
        :attr:`ewc_lib.Fisher.tolerance`; ``"data"``, in the words of who saved it;
        ``"parameters"``, for each its shape, the path on which it was computed, and where they are
        known its dtype and the hashes of its values in several precisions (those of a penalty are
        of its anchor); ``"hash"``, one for all names, shapes and values; ``"versions"``. A penalty
        adds ``"n_tasks"``, its settings, such as ``"mode"``, and the ``"strength"`` or
        ``"budget"`` that it had, which are no part of its state.

    Raises
    ------
    ImportError
        If safetensors is not installed, the extra ``files``.
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no file of this kind, damaged, or of a newer version.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ewc_lib import fisher_information
    >>> model, x, y = torch.nn.Linear(3, 2), torch.ones(8, 3), torch.arange(8) % 2
    >>> path = f"{tempfile.mkdtemp()}/fisher.safetensors"
    >>> fisher_information(model, (x, y)).save(path, model=model, data="eight rows of ones")
    >>> found = card(path)
    >>> found["kind"], found["n_samples"], found["data"], found["parameters"]["bias"]["shape"]
    ('exact', 8, 'eight rows of ones', [2])
    """
    return _header(path).card


def write(path: str | os.PathLike[str], state: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write a state, whose texts are bytes, and its card: all or nothing.

    Of a state that is sharded every process has to call this, and the first one writes.
    """
    safetensors = _library("safetensors.torch")
    _check_words(card.get("data"))
    sharded = any(hasattr(value, "full_tensor") for value in state.values())
    state = {key: whole(value) for key, value in state.items()}
    texts = {k: bytes(v.tolist()).decode() for k, v in state.items() if v.dtype == torch.uint8}
    pairs = [key for key, value in state.items() if value.is_complex()]
    tensors = _apart({key: value for key, value in state.items() if key not in texts})
    versions = {"ewc_lib": import_module("ewc_lib").__version__, "torch": torch.__version__}
    header = {
        "format": "pt",  # so that other libraries know whose tensors these are
        CARD: json.dumps({"format": FORMAT, **card, "versions": versions}, allow_nan=False),
        TEXTS: json.dumps(texts),
        COMPLEX: json.dumps(pairs),
        SUMS: json.dumps({key: _sum(value) for key, value in tensors.items()}),
    }
    if sharded and dist.get_rank() > 0:
        return
    draft = Path(f"{os.fsdecode(path)}.{os.getpid()}.draft")
    try:
        draft.touch()  # says in Python's words if nothing can be written there
        safetensors.save_file(tensors, draft, header)
        draft.replace(os.fsdecode(path))
    finally:
        draft.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state and the card that :func:`write` was given.

    Raise a ValueError if it is a Fisher information where a penalty is wanted, or the reverse.
    """
    path = os.fsdecode(path)
    card, texts, pairs, sums = _header(path)
    holds = card["holds"]
    if "Fisher" in (holds, what) and holds != what:
        way = "remember(Fisher.load(path))" if holds == "Fisher" else f"{holds}(...).load(path)"
        raise ValueError(f"{path} holds a {holds}, but a {what} was asked for: use {way}")
    state: dict[str, Tensor] = _library("safetensors.torch").load_file(path)
    if missing := sorted({*pairs, *sums} - state.keys()):
        raise ValueError(f"{path} is damaged: it has no {missing}")
    if other := [key for key, said in sums.items() if _sum(state[key]) != said]:
        raise ValueError(f"{path} is damaged: the values of {other} are not those that were saved")
    for key in pairs:
        state[key] = torch.view_as_complex(state[key])
    codes = {key: list(text.encode()) for key, text in texts.items()}
    return state | {k: torch.tensor(v, dtype=torch.uint8) for k, v in codes.items()}, card


def card_of_fisher(F: Fisher, data: Any, model: nn.Module | None) -> dict[str, Any]:
    """Return the card of a Fisher information, with the values of the model if it is given."""
    shapes, keeps = F.shapes, F.keeps
    parameters: dict[str, dict[str, Any]] = {
        plain: {"shape": list(shapes[name]), "path": F.paths[name], "keeps": keeps[name]}
        for name, plain in plain_names(shapes).items()
    }
    if model is not None:
        for name, values in described(values_in(model, parameters)).items():
            parameters[name] |= values
    return {
        "holds": "Fisher",
        "structure": type(F).__name__,
        "data": data,
        "hash": None if model is None else of_all(parameters),
        "parameters": parameters,
        **_estimate(F),
    }


def card_of_penalty(
    penalty: QuadraticPenalty | AdapterEWC, settings: Mapping[str, str], data: Any
) -> dict[str, Any]:
    """Return the card of a penalty, with the values of its anchor."""
    precision, anchor = penalty.precision, penalty.anchor
    budget = getattr(penalty, "budget", None)
    paths = {} if precision is None else precision.paths
    values = described({plain: anchor[name] for name, plain in plain_names(anchor).items()})
    parameters = {
        plain: values[plain] | {"path": paths[name]} for name, plain in plain_names(paths).items()
    }
    return {
        "holds": type(penalty).__name__,
        "n_tasks": penalty.n_tasks,
        "strength": None if budget else penalty.strength,
        "budget": budget,
        "data": data,
        "hash": of_all(parameters),
        "parameters": parameters,
        **settings,
        **({} if precision is None else _estimate(precision)),
    }


def _estimate(F: Fisher) -> dict[str, Any]:
    names = "kind", "likelihood", "n_samples", "tolerance"
    return {name: getattr(F, name) for name in names}


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return real, contiguous tensors, of which no two share their memory."""
    found, taken = {}, set[int]()
    for key, value in state.items():
        value = value.detach().resolve_conj()
        value = torch.view_as_real(value) if value.is_complex() else value
        value = value.contiguous()
        memory = value.untyped_storage().data_ptr()
        part = value.untyped_storage().nbytes() > value.nbytes
        found[key] = value.clone() if part or memory in taken else value
        taken.add(memory)
    return found


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError("files need safetensors: pip install 'ewc_lib[files]'") from error


def _check_words(data: Any) -> None:
    """Raise a TypeError or ValueError unless JSON holds what the user says of the data."""
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"data has to be text, or anything else that JSON holds: {error}") from None


def _sum(value: Tensor) -> int:
    """Return a checksum, which one wrong bit changes, in less time than a hash."""
    return zlib.crc32(value.cpu().reshape(-1).view(torch.uint8).numpy().data)


def _header(path: str | os.PathLike[str]) -> _Header:
    """Read the header alone."""
    safetensors, path = _library("safetensors"), os.fsdecode(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory, and no file of safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no file of safetensors: {error}") from error
    if not header.keys() >= {CARD, TEXTS, COMPLEX}:
        raise ValueError(f"{path} has no card: neither Fisher.save nor EWC.save wrote it")
    try:
        keys = CARD, TEXTS, COMPLEX, SUMS
        found = _Header(*(json.loads(header.get(key, "{}")) for key in keys))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error})") from None
    version = found.card.get("format") if isinstance(found.card, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(f"{path} has a card of version {version}; this ewc_lib reads {FORMAT}")
    if not (isinstance(version, int) and _is_whole(found)):
        raise ValueError(f"{path} is damaged: its card is none that Fisher.save or EWC.save writes")
    return found


def _is_whole(header: _Header) -> bool:
    """Tell whether there is all that is read, of the types that are read."""
    card, texts, pairs, sums = header
    parameters = card.get("parameters")
    return (
        isinstance(card.get("holds"), str)
        and isinstance(parameters, dict)
        and all(map(_is_described, parameters.values()))
        and isinstance(texts, dict)
        and all(isinstance(text, str) for text in texts.values())
        and isinstance(pairs, list)
        and all(isinstance(key, str) for key in pairs)
        and isinstance(sums, dict)
    )


def _is_described(parameter: Any) -> bool:
    """Tell whether a parameter has a shape, and the hash of its values if it has hashes."""
    if not (isinstance(parameter, dict) and isinstance(parameter.get("shape"), list)):
        return False
    values, dtype = parameter.get("values", {}), parameter.get("dtype")
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    return isinstance(values, dict) and (not values or (known and dtype in values))
