"""States as plain tensors, which every file format can hold."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(text: str) -> Tensor:
    """Write text as a tensor."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(codes: Tensor) -> str:
    """Read what :func:`encode` wrote."""
    return bytes(codes.tolist()).decode()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
