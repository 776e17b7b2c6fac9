"""States as plain tensors, which every file format can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

OF_ONE = {"path", "diagonal", "shape"}
"""How the keys of a Fisher information begin that end in the name of a parameter."""


def encode(text: str) -> Tensor:
    """Write text as a tensor."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(codes: Tensor) -> str:
    """Read what :func:`encode` wrote."""
    return bytes(codes.tolist()).decode()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def renamed(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Give the parameters other names in the state of a Fisher information.

    What is in no dict of names keeps its own.
    """
    found = {}
    for key, value in state.items():
        block, part, name = _parts(key)
        if part == "parameters":
            value = encode("\n".join(names.get(n, n) for n in decode(value).split("\n")))
        if part in OF_ONE:
            key = f"{block}{part}.{names.get(name, name)}"
        found[key] = value
    return found


def _parts(key: str) -> tuple[str, str, str]:
    """Cut a key into the blocks around it, what it is, and whose it is."""
    block = re.match(r"(?:block\.\d+\.)*", key)
    assert block
    part, _, name = key[block.end() :].partition(".")
    return block.group(), part, name
