"""The Chinese edition says what the English one says: no message is missing, stale or left over."""

import re
from pathlib import Path

import messages
import pytest
from babel.messages.catalog import Catalog
from messages import catalogue, faults, updated, write
from prose import glossary
from translation import WHOLE

from tests.book.site import require_pages

require_pages()

PAGE = "book/foundations/score"
FOUND = messages.messages()


@pytest.mark.parametrize("page", FOUND)
def test_every_message_has_a_translation_that_shares_its_parts(page: str) -> None:
    assert faults(page, FOUND[page], catalogue(page)) == []


def test_the_pages_that_are_whole_have_messages_and_so_has_every_chapter() -> None:
    assert set(FOUND) >= WHOLE
    assert len([page for page in FOUND if page.startswith("book/practice/")]) == 8


def test_a_term_has_the_name_that_the_english_glossary_gives_it() -> None:
    names = catalogue("book/reference/glossary")
    for entry, definition in glossary().items():
        given = re.split(r"[,(/]", definition.partition(".")[0].rstrip(")"))
        assert names[entry[0]].string in [name.strip() for name in given]


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[list[str], Catalog]:
    """Return the messages of a page of which one has changed and one is new, and its catalogue."""
    old = FOUND[PAGE]
    changed = [old[0], old[1].replace("the", "that", 1), "Something new.", *old[2:-1]]
    return changed, updated(PAGE, changed)


def test_a_message_that_changed_keeps_its_old_translation_and_is_found(
    stale: tuple[list[str], Catalog],
) -> None:
    current, found = stale
    assert found[current[1]].fuzzy
    assert found[current[1]].string == catalogue(PAGE)[FOUND[PAGE][1]].string
    assert f"{PAGE} has no translation: {current[1]}" in faults(PAGE, current, found)


def test_a_new_message_is_found_and_one_that_is_gone_is_dropped(
    stale: tuple[list[str], Catalog],
) -> None:
    current, found = stale
    assert f"{PAGE} has no translation: Something new." in faults(PAGE, current, found)
    assert FOUND[PAGE][-1] not in found
    assert f"{PAGE} no longer says: {FOUND[PAGE][-1]}" in faults(PAGE, current, catalogue(PAGE))


def test_a_catalogue_without_changes_is_written_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = messages.path_of(PAGE).read_bytes()
    found = updated(PAGE, FOUND[PAGE])
    monkeypatch.setattr(messages, "path_of", lambda page: tmp_path / "page.po")
    write(PAGE, found)
    assert (tmp_path / "page.po").read_bytes() == before
