"""The reference documents every public name exactly once."""

import re
from collections import Counter

import pytest
import reference
from prose import BOOK
from reference import PACKAGE, Entry, entries, entries_of, public_modules, public_names

API = BOOK / "reference" / "api"
MODULES = {module.__name__: module for module in public_modules()}


def directives() -> list[str]:
    texts = [page.read_text("utf-8") for page in API.glob("*.md")]
    return [name for text in texts for name in re.findall(r"^```\{public\} (.+)$", text, re.M)]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_an_entry_or_another_name_of_one(module: str) -> None:
    listed = public_names(MODULES[module])
    found = entries_of(MODULES[module])
    assert set(listed) == {name for name in MODULES[module].__all__ if name[0] != "_"}
    assert [entry.value for entry in found] == [getattr(MODULES[module], name) for name in listed]
    assert {entry.module for entry in found} <= set(directives())


def test_every_entry_has_a_name_of_its_own_that_leads_to_it() -> None:
    names = Counter(entry.name for entry in entries().values())
    assert set(names.values()) == {1}
    for entry in entries().values():
        module, _, name = entry.name.rpartition(".")
        assert getattr(MODULES[module], name) is entry.value


def test_the_pages_show_each_module_once_and_the_index_lists_each() -> None:
    index = (API / "index.md").read_text("utf-8")
    listed = re.findall(r"^```\{modules\}\n(.*?)^```", index, re.M | re.S)
    shown = Counter(directives())
    assert set(shown.values()) == {1}
    assert shown.keys() - {PACKAGE} == {entry.module for entry in entries().values()}
    assert sorted("".join(listed).split()) == sorted(shown.keys() - {PACKAGE})


def test_a_name_has_its_place_below_the_top_and_is_called_by_its_shortest_name() -> None:
    place = {entry.name: entry.module for entry in entries().values()}
    assert place["ewc_lib.Gaussian"] == "ewc_lib.likelihood"
    assert place["ewc_lib.fisher.Dense"] == "ewc_lib.fisher"


class Vector(tuple):
    """A thing."""

    def documented(self) -> None:
        """Do it."""

    def bare(self) -> None: ...

    def __add__(self, other: object) -> None:
        """Add."""

    def _private(self) -> None:
        """Hide."""


def test_a_class_shows_the_members_that_it_documents_and_those_asked_for() -> None:
    def shown(*options: list[str]) -> str:
        (first, *rest) = reference._autodoc(Entry("a.Vector", "a", Vector), *options)
        assert first == ".. autoclass:: a.Vector"
        return " ".join(" ".join(rest).split())

    assert shown([], []) == ":members: documented, __add__"
    assert shown(["bare"], []) == ":members: bare, documented, __add__"
    assert shown([], ["Vector"]) == ":members: :inherited-members:"
