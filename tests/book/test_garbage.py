"""Searches for garbage: so seldom that they do not take half of a build, but not never."""

import gc
from collections.abc import Iterator

import pytest
import yaml
from chinese import settings
from fingerprints import ROOT
from garbage import NEW_OBJECTS, setup
from sphinx.application import Sphinx


@pytest.fixture
def searches() -> Iterator[list[int]]:
    """Yield what grows by one with each search of this process, which is set as in a build."""
    before, found = gc.get_threshold(), list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    setup(Sphinx.__new__(Sphinx))
    gc.collect()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


def test_a_hundred_thousand_new_objects_are_not_searched(searches: list[int]) -> None:
    kept = [[] for _ in range(100_000)]
    assert len(kept) == 100_000
    assert searches == []


def test_there_is_a_search_when_many_more_have_come(searches: list[int]) -> None:
    kept = [[] for _ in range(2 * NEW_OBJECTS)]
    assert len(kept) == 2 * NEW_OBJECTS
    assert searches


def test_both_editions_are_built_so() -> None:
    english = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    for edition in (english, settings()):
        assert "garbage" in edition["sphinx"]["local_extensions"]
