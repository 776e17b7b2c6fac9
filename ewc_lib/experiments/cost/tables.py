"""The measured cost of the Fisher information as text: for a terminal, and for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ewc_lib.experiments.cost.report import (
    KINDS,
    RESULT,
    Entry,
    Measured,
    load,
    model_sections,
    plain_seconds,
    rows,
    with_later,
)
from ewc_lib.experiments.runs.folders import RESULTS

__all__ = ["AGAIN", "BEFORE", "Stored", "grid", "stored_table", "table"]

AGAIN = RESULTS / "fisher_cost_again.json"
"""What some libraries need for the model like GPT-2, once they are called as they ask for."""

BEFORE = RESULTS / "fisher_cost_h100.json"
"""What was measured on a graphics card before the package was made for one."""


class Stored(NamedTuple):
    """A table that lies in the folder of results.

    Parameters
    ----------
    title
        The device, the version of PyTorch and the date.
    rows
        The cost of each contestant on each model.
    result
        The whole content of the file.
    """

    title: str
    rows: list[Measured]
    result: dict[str, Any]

    def found(self, model: str, library: str, kind: str) -> Measured | None:
        """Return the row of one contestant, or None if it was not measured."""
        wanted = (model, library, kind)
        return next((row for row in self.rows if row[:3] == wanted), None)

    def ours(self) -> dict[tuple[str, str], Measured]:
        """Return the rows of this package that have a time, by model and kind."""
        mine = (row for row in self.rows if row.library == "ewc_lib" and row.reason is None)
        return {(row.model, row.kind): row for row in mine}

    def rivals(self, model: str, kind: str) -> list[Measured]:
        """Return right answers of other libraries, from the fastest on."""
        others = [r for r in self.rows if (r.model, r.kind) == (model, kind) and not r.wrong]
        right = (r for r in others if r.library != "ewc_lib" and r.reason is None)
        return sorted(right, key=lambda row: row.passes)


def stored_table(path: Path = RESULT, later: Path | None = None) -> Stored | None:
    """Read a measured table, or return None if there is no such file.

    Parameters
    ----------
    path
        :data:`.RESULT`, :data:`.CUDA_RESULT` or :data:`BEFORE`.
    later
        A file of what was measured once more, such as :data:`AGAIN`.

    Examples
    --------
    >>> row = stored_table(BEFORE).found("mlp", "ewc_lib", "exact")
    >>> row.n, row.passes
    (8192, 1.14)
    """
    if not path.exists():
        return None
    result = load(path)
    if later is not None:
        result = with_later(result, load(later))
    found = [Measured(**row) for row in result["rows"]] if "rows" in result else rows(result)
    return Stored(_title(result["provenance"]), found, result)


def _title(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    device = hardware["accelerator"]
    if device is None:
        device = f"{hardware['processor']}, {record['threads']['torch']} threads"
    return f"{device}, torch {record['versions']['torch']}, {record['date'][:10]}"


def grid(rows: Sequence[Measured], kind: str, value: str = "passes") -> str:
    """Return one kind as text: a line for each library and a column for each model.

    ``~`` marks times that were scaled from fewer observations, ``!`` wrong answers, and ``–`` that
    there is none. What was not measured is empty.

    Parameters
    ----------
    rows
        The cost of each contestant on each model.
    kind
        Of the Fisher information.
    value
        ``"passes"`` or ``"mebibytes"``.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    widths = {model: max(7, len(model)) + 1 for model in models}
    cells = {(r.library, r.model): _cell(r, value) for r in rows if r.kind == kind}
    lines = [f"{kind:19}" + "".join(f"{model:>{widths[model]}}" for model in models)]
    for library in dict.fromkeys(library for library, _ in cells):
        texts = (f"{cells.get((library, m), ''):>{widths[m]}}" for m in models)
        lines.append(f"{library:19}{''.join(texts)}".rstrip())
    return "\n".join(lines)


def _cell(row: Measured, value: str) -> str:
    if row.reason is not None:
        return "–"
    if value == "mebibytes":
        return "" if math.isnan(row.mebibytes) else f"{row.mebibytes:.0f}"
    number = f"{row.passes:.3g}" if row.passes < 999 else f"{row.passes:.0f}"
    return "~" * row.scaled + "!" * row.wrong + number


def table(result: dict[str, Any], value: str = "passes") -> str:
    """Return the result as text, one block for each model.

    A time is the median of the repetitions with the smallest and the largest, in plain passes.
    ``~`` marks times that were scaled from fewer observations, ``!`` wrong answers, and ``–``
    what is not possible, with the reason below.

    Parameters
    ----------
    result
        As :func:`.fisher_cost` returns it.
    value
        ``"passes"`` for the time, ``"mebibytes"`` for peak memory above that of the plain pass,
        ``"error"`` for the error of the answer; see :class:`.Measured`.

    Raises
    ------
    ValueError
        If the value is another one.
    """
    if value not in ("passes", "mebibytes", "error"):
        raise ValueError(f"value must be 'passes', 'mebibytes' or 'error', got {value!r}")
    blocks = []
    for model, section in model_sections(result).items():
        mine = [row for row in rows(result) if row.model == model]
        blocks.append("\n".join(_block(section, mine, value)))
    return "\n\n".join(blocks)


def _block(section: Entry, mine: list[Measured], value: str) -> Iterator[str]:
    unit = plain_seconds(section)
    yield (
        f"{section['title']}: {section['parameters']:,} parameters, {section['n']:,} observations "
        f"in batches of {section['batch_size']}, {unit:.3g} s for a plain pass"
    )
    yield _line("", KINDS)
    cells = {(row.library, row.kind): _full_cell(row, value) for row in mine}
    for library in section["contestants"]:
        yield _line(library, [cells.get((library, kind), "") for kind in KINDS])
    reasons = dict.fromkeys(row.reason for row in mine if row.reason is not None)
    for reason in reasons:
        who = dict.fromkeys(row.library for row in mine if row.reason == reason)
        yield f"  – {', '.join(who)}: {reason}"


def _line(first: str, others: Iterable[str]) -> str:
    return (f"{first:<20}" + "".join(f"{other:>22}" for other in others)).rstrip()


def _full_cell(row: Measured, value: str) -> str:
    if row.reason is not None:
        return "–"
    if value == "mebibytes":
        return f"{row.mebibytes:.0f}"
    if value == "error":
        return "unknown" if row.error is None else f"{row.error:.1g}"
    marks = "~" * row.scaled + "!" * row.wrong
    return f"{marks}{_digits(row.passes)} ({_digits(row.low)}–{_digits(row.high)})"


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
