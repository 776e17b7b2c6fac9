"""The catalogues of the Chinese edition, `book/locale/zh_CN/LC_MESSAGES/*.po`.

Run as a program, after `make book`, it brings them up to date with the messages of the pages: new
ones have no translation yet, one that has changed keeps the old translation and is marked as fuzzy,
and what is on no page any more goes.
"""

import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from fingerprints import ROOT
from prose import glossary
from translation import FOLDER, LANGUAGE, NOTE
from wording import problems

SITE = ROOT / "_build" / "html"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""A date that the format asks for; the history of the file knows better."""


def messages() -> dict[str, list[str]]:
    """Return the messages of each page that has some, as the last build found them."""
    found: dict[str, list[str]] = json.loads((SITE / NOTE).read_text("utf-8"))
    return found


def path_of(page: str) -> Path:
    """Return the place of the catalogue of a page."""
    return ROOT / FOLDER / LANGUAGE / "LC_MESSAGES" / f"{page}.po"


def catalogue(page: str) -> Catalog:
    """Return the catalogue of a page; it is empty if there is none yet."""
    path = path_of(page)
    if not path.is_file():
        return Catalog(LANGUAGE)
    with path.open("rb") as file:
        return read_po(file, LANGUAGE)


def faults(page: str, current: list[str], found: Catalog) -> list[str]:
    """Return what is wrong with a catalogue, one line for each message."""
    strings = {m.id: m.string for m in found if m.id and m.string and not m.fuzzy}
    known = terms()
    return [
        *(f"{page} has no translation: {text}" for text in current if text not in strings),
        *(f"{page} no longer says: {m.id}" for m in found if m.id and m.id not in current),
        *(
            f"{page}: the translation {fault}: {strings[text]}"
            for text in current
            if text in strings
            for fault in problems(text, strings[text], known)
        ),
    ]


@cache
def terms() -> dict[str, str]:
    """Return the entry of the glossary of each term, by its English or Chinese name."""
    translated = catalogue("book/reference/glossary")
    return {
        name.lower(): names[0]
        for names in glossary()
        for term in names
        for name in (term, str(translated[term].string))
    }


def updated(page: str, current: list[str]) -> Catalog:
    """Return the catalogue of a page with the messages that it has now, in their order."""
    template = Catalog()
    for message in current:
        template.add(message)
    found = catalogue(page)
    found.update(template, update_creation_date=False)
    found.obsolete.clear()
    return found


def write(page: str, found: Catalog) -> None:
    """Write a catalogue so that its bytes follow from the messages alone."""
    found.header_comment = f"# {page} in Chinese; CONTRIBUTING.md says how to change a message."
    found.project, found.version, found.fuzzy = "ewc_lib", "", False
    found.creation_date = found.revision_date = EPOCH
    for message in found:
        message.flags -= {"python-brace-format", "python-format"}  # these are roles and numbers
    path = path_of(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_po(file, found, width=100, include_previous=True)


def main() -> None:
    """Write all catalogues."""
    for page, current in messages().items():
        found = updated(page, current)
        write(page, found)
        waiting = sum(not message.string or message.fuzzy for message in found if message.id)
        print(f"{page}: {len(current)} messages, {waiting} to translate")


if __name__ == "__main__":
    main()
