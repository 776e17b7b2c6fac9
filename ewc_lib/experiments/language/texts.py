"""Two texts that every Python has: English documentation, and the source of its library.

Nothing is downloaded. Both texts differ a little from one version of Python to the next.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["VOCABULARY", "Text", "documentation", "sequences", "source_code"]

VOCABULARY = 256
"""A token is a byte."""


class Text(NamedTuple):
    """Sequences of bytes with, for each byte, the one that comes next.

    Parameters
    ----------
    train, test
        Inputs and targets, each ``[N, T]``. One sequence in ten is held out.
    """

    train: tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]]
    test: tuple[Int64[Tensor, "N T"], Int64[Tensor, "N T"]]


def documentation() -> str:
    """Return the language reference of Python, which its ``help`` shows: English, with examples.

    The same paragraph stands in several of its topics. Only the first is kept, so that no
    sentence of a held-out sequence is trained on elsewhere.
    """
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def source_code() -> str:
    """Return the modules at the top of the standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


def sequences(text: str, length: int, n: int | None = None) -> Text:
    """Cut a text into sequences of bytes.

    Parameters
    ----------
    text
        Any text.
    length
        Bytes of a sequence, and one more for the last target.
    n
        How many sequences to take, evenly from the whole text; by default all.

    Raises
    ------
    ValueError
        If there are not so many, or fewer than two.

    Examples
    --------
    >>> text = sequences("abcdefgh" * 5, length=3)
    >>> text.train[0].shape, text.test[0].shape
    (torch.Size([9, 3]), torch.Size([1, 3]))
    >>> bytes(text.test[0][0].tolist()), bytes(text.test[1][0].tolist())
    (b'abc', b'bcd')
    """
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    found = len(data) // (length + 1)
    wanted = found if n is None else n
    if not 2 <= wanted <= found:
        raise ValueError(f"the text has {found} sequences of {length} bytes, not {wanted}")
    cut = data[: found * (length + 1)].view(found, length + 1)
    cut = cut[torch.arange(wanted) * found // wanted]
    held_out = torch.arange(wanted) % 10 == 0
    train, test = ((part[:, :-1], part[:, 1:]) for part in (cut[~held_out], cut[held_out]))
    return Text(train, test)
