"""The names of parameters, without what wrappers put around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

WRAPPERS = frozenset(
    {"module", "_orig_mod", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Attributes in which DataParallel, compiled modules, adapters, sharded and recomputed modules
keep the module that they wrap."""

PEFT = "base_model.model."
"""How the names of a model of the library peft begin."""


COPIES = "modules_to_save"
"""Where peft keeps the copies of a module that it trains in its place, one for each adapter."""


def plain_name(name: str) -> str:
    """Return the name that a parameter has in a model without wrappers."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if COPIES in parts:
        at = parts.index(COPIES)
        del parts[at : at + 2]
    return ".".join(parts).removeprefix(PEFT)  # which may be in a wrapper itself


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the plain name of each, or its own where two would be the same."""
    plain = {name: plain_name(name) for name in names}
    times = Counter(plain.values())
    return {name: short if times[short] == 1 else name for name, short in plain.items()}


def listed(names: Collection[str]) -> str:
    """Name some of many."""
    shown = ", ".join(map(repr, list(names)[:6]))
    return f"{shown} and {len(names) - 6} others" if len(names) > 6 else shown or "nothing"
