"""Readers see no plumbing, and lose no other line; what is executed keeps it."""

import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from notebook_pairs import chapters as sources
from plumbing import folded, visible
from prose import page_name

from tests.book.site import SITE, chapters, require_pages

WHAT = ("preparation", "computation", "check")
PLUMBING = re.compile(r"\bglue\(|# checks:")


def one(cell: str) -> str:
    return visible([cell])[0]


def test_what_glues_leaves_no_line_and_no_second_blank_line() -> None:
    cell = 'from myst_nb import glue\n\nx = 1\n\nglue(\n    "x",\n    x)\n\n\ny = 2\nglue("y", y)\n'
    assert one(cell) == "x = 1\n\ny = 2"


def test_the_comment_for_the_register_goes_and_its_assertion_stays() -> None:
    assert one("x = f()\n# checks: thm-a, eq-b\nassert x == 1  # so") == (
        "x = f()\nassert x == 1  # so"
    )


@pytest.mark.parametrize(
    "cell",
    [
        "glue('x', x)",
        "for a in b:\n    for c in a:\n        glue(c, 1)",
        "if x:\n    glue('x', x)\nelse:\n    glue('x', 0)",
        "for a in b:\n    key = a + 1\n    glue(key, 1)",
        "def show(name):\n    key = name + 's'\n    glue(key, 1)\n\nshow('x')",
        "# checks: thm-a\n# Numbers of the text.\nglue('x', x)",
    ],
)
def test_of_plumbing_alone_nothing_is_left(cell: str) -> None:
    assert one(cell) == ""


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("for a in b:\n    print(a)\n    glue(a, 1)", "for a in b:\n    print(a)"),
        ("for a in b:\n    last = a\n    glue(a, 1)\nlast", "for a in b:\n    last = a\nlast"),
        ("for a in b:\n    x[a] = 1\n    glue(a, x[a])\nx", "for a in b:\n    x[a] = 1\nx"),
        ("glued(1)\nx.glue(2)", "glued(1)\nx.glue(2)"),
    ],
)
def test_what_does_more_is_shown(cell: str, shown: str) -> None:
    assert one(cell) == shown


def test_a_name_that_a_later_cell_uses_is_shown_where_it_is_set() -> None:
    loop, later = "for a in b:\n    key = a\n    glue(key, 1)", "print(key)"
    assert visible([loop, later]) == ["for a in b:\n    key = a", later]


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("x = 1\nfor y in x:\n    assert y", "check"),
        ("x = asserted()  # assert", "computation"),
        ("import math\n\nassert math", "preparation"),
    ],
)
def test_a_folded_cell_that_shows_nothing_says_what_it_does(cell: str, what: str) -> None:
    assert folded(cell) == what


def test_no_bar_promises_more_than_it_folds() -> None:
    require_pages()
    for page in chapters():
        for cell in BeautifulSoup(page.read_text("utf-8"), "html.parser").select("div.cell"):
            if cell.select_one("details.hide") and not cell.select_one(".cell_output"):
                bar = cell.select_one("summary p.collapsed")
                assert bar.get_text() in {f"Show the {what}" for what in WHAT}


def test_no_page_shows_plumbing_and_every_notebook_keeps_it() -> None:
    require_pages()
    shown = {page: re.sub("<[^>]*>", "", page.read_text("utf-8")) for page in chapters()}
    assert [page for page, text in shown.items() if PLUMBING.search(text)] == []
    for chapter in sources():
        written = chapter.with_suffix(".ipynb")
        offered = (SITE / "_sources" / "book" / page_name(chapter)).with_suffix(".ipynb")
        glued = [code.count("glue(") for code in map(code_of, (written, offered))]
        assert glued[0] == glued[1] > 0 or "glue(" not in chapter.read_text("utf-8")
        assert "# checks:" not in chapter.read_text("utf-8") or "# checks:" in code_of(offered)


def code_of(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
