"""Refusing arguments that cannot be meant, with what may be meant instead."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

WORDS: dict[str, dict[str, str]] = {
    "kind": {
        "exact": "ggn type2 true fisher fisherexact exactfisher truefisher full",
        "sketch": "random signs",
        "sampled": "mc type1 montecarlo fishermc mcfisher fishermontecarlo",
        "empirical": "ef emp fisheremp empfisher observed empiricalfisher",
    },
    "structure": {
        "diagonal": "diag fullyfactorized",
        "module": "layer layerwise blockdiag blockdiagonal",
        "dense": "full whole exact",
        "kronecker": "kron kfac kfacexpand expand",
        "kronecker-reduce": "kfacreduce reduce",
        "eigenkronecker": "ekfac kfe",
        "lowrank": "top eigen",
        "ewc_lib.fisher.MatrixFree": "implicit matrixfree linearoperator operator none",
    },
    "likelihood": {
        "categorical": "classification multiclass multinomial softmax logits classiflogits "
        "crossentropy crossentropyloss ce nll nllloss segmentationlogits",
        "bernoulli": "binary binaryclassification classifbinarylogits multilabel sigmoid logistic "
        "bce bceloss bcewithlogitsloss binarycrossentropy binarycrossentropywithlogits",
        "gaussian": "regression normal mse mseloss squarederror l2",
        "poisson": "count counts poissonnllloss",
    },
}
"""What laplace-torch, curvlinops, nngeometry, asdfghjkl and PyTorch call the same things."""


def check_choice(what: str, value: object, allowed: Collection[str], or_else: str = "") -> None:
    """Raise a ValueError that says what may be meant, unless a value is an allowed word."""
    if isinstance(value, str) and value in allowed:
        return
    message = f"{what} must be one of {', '.join(map(repr, allowed))}{or_else}, got {_shown(value)}"
    if isinstance(value, Tensor):
        raise ValueError(f"{message}; data are one argument: (inputs, targets)")
    meant = _meant(what, value, allowed)
    if meant is None:
        raise ValueError(message)
    raise ValueError(f"{message}; did you mean {repr(meant) if meant in allowed else meant}?")


def check_whole(**numbers: int | None) -> None:
    """Raise a ValueError unless every number is a positive whole one, or None."""
    for name, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ValueError(f"{name} must be a whole number, got {_shown(number)}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_strength(value: Any) -> None:
    """Raise a ValueError unless a value can be the factor of a penalty."""
    if not is_number(value):
        raise ValueError(
            f"strength must be a number, got {_shown(value)}; data go to consolidate(data)"
        )
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"strength must be non-negative and finite, got {value}")


def is_number(value: object) -> bool:
    """Tell whether a value is one real number, also in a tensor."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


def check_damping(damping: float) -> None:
    """Raise a ValueError unless a damping is zero or positive."""
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")


def check_place(dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Raise a ValueError unless sums can be kept in a precision and on a device."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a real torch.dtype, as torch.float64; got {_shown(dtype)}")
    try:
        where = torch.device("cpu" if device is None else device)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no such device here")
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one of PyTorch, got {_shown(device)}: {reason}") from None


def random_source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return the generator that was given, or a fresh one with seed 0.

    Raises
    ------
    ValueError
        If it is something else, or on another device.
    """
    if generator is None:
        return torch.Generator(device).manual_seed(0)
    wanted = f"torch.Generator({str(device)!r})"
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {_shown(generator)}; for a seed, "
            f"{wanted}.manual_seed(seed)"
        )
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, but draws on {device}: {wanted}")
    return generator


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float | torch.dtype):
        return repr(value)
    return f"a {type(value).__name__}"


def _meant(what: str, value: Any, allowed: Collection[str]) -> str | None:
    """Return the word that is nearest to what was given, or None if nothing is near."""
    if isinstance(value, nn.Module):
        value = type(value)
    text = value if isinstance(value, str) else getattr(value, "__name__", "")
    meaning = {_letters(word): word for word in allowed}
    for word, others in WORDS.get(what, {}).items():
        meaning |= {other: word for other in others.split() if other not in meaning}
    given = _letters(text).removeprefix("pmat") or "?"
    near = [given] if given in meaning else difflib.get_close_matches(given, meaning, n=1)
    return meaning[near[0]] if near else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
