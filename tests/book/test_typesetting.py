"""Computed numbers are set as a book sets them, on pages and on paper."""

import re

import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document
from typesetting import KeepMarks, join, typeset

from tests.book.site import chapters, require_pages

RAW = re.compile(r"\d(?:\.\d+)?e[+-]?\d|(?<![\w.,-])-\d")


def shown(text: str, latex: bool = False) -> str:
    kinds = {nodes.superscript: "^{}", nodes.math: "${}$"}
    found = [kinds.get(type(node), "{}").format(node.astext()) for node in typeset(text, latex)]
    return "".join(found).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("text", "page", "paper"),
    [
        ("4e-17", "4 × 10^−17", r"$4 \times 10^{-17}$"),
        ("1e+04", "10^4", "$10^{4}$"),
        ("-2.5e-03", "−2.5 × 10^−3", r"$-2.5 \times 10^{-3}$"),
        ("3.1e+00", "3.1", "3.1"),
        ("-0.12", "−0.12", "−0.12"),
        ("(-3, 5) to -1,234.5 %", "(−3, 5) to −1,234.5 %", "(−3, 5) to −1,234.5 %"),
        ("97.2 ± 0.3", "97.2 ± 0.3", "97.2 ± 0.3"),
        ("97.2%", "97.2 %", "97.2 %"),
    ],
)
def test_powers_of_ten_and_minus_signs_are_set(text: str, page: str, paper: str) -> None:
    assert shown(text) == page
    assert shown(text, latex=True) == paper


@pytest.mark.parametrize("text", ["2012-2013", "EWC-2", "a1e-3", "step-0.1", "v2.6e", "", "x"])
def test_what_is_no_number_stays(text: str) -> None:
    assert shown(text) == text


@pytest.mark.parametrize(
    ("prose", "joined"),
    [
        ("a 95 % interval", "a 95~% interval"),
        ("a line\nends, 95\n% of it", "a line\nends, 95~% of it"),
        ("of # % or # ±\n# points", "of #~% or #~±~# points"),
        ("fill # GB of it", "fill #~GB of it"),
        ("p = # here, at n = 5", "p =~# here, at n =~5"),
        ("in # Greek letters, ± # or %", "in # Greek letters, ±~# or %"),
    ],
)
def test_no_line_ends_between_a_number_and_what_belongs_to_it(prose: str, joined: str) -> None:
    paragraph = nodes.paragraph()
    for k, text in enumerate(prose.split("#")):  # a # is a glued number
        paragraph += [nodes.inline("", "1", classes=["pasted-text"])] if k else []
        paragraph += nodes.Text(text)
    found = [join(text) for text in paragraph.findall(nodes.Text)]
    assert "".join(found) == joined.replace("#", "1").replace("~", "\N{NO-BREAK SPACE}")


def test_no_page_shows_a_computed_number_raw() -> None:
    require_pages()
    found = []
    for page in chapters():
        tree = BeautifulSoup(page.read_text("utf-8"), "html.parser")
        computed = tree.select(".pasted-text, .cell_output td, .cell_output th")
        found += [(page.stem, c.get_text()) for c in computed if RAW.search(c.get_text())]
    assert found == []


@pytest.mark.parametrize(
    ("before", "behind", "joined"),
    [
        ("设 ", "，则", "x，"),
        ("（", "）。", "（x）。"),
        ("by (", ", and", "(x,"),
        ("by", " and", ""),
        ("(or) ", "之", ""),
    ],
)
def test_a_formula_keeps_its_marks_of_punctuation(before: str, behind: str, joined: str) -> None:
    document = new_document("page")
    parts = nodes.Text(before), nodes.math("x", "x"), nodes.Text(behind)
    document += nodes.paragraph("", "", *parts)
    KeepMarks(document).run()
    assert document.astext() == f"{before}x{behind}"
    found = [node.astext() for node in document.findall(nodes.inline)]
    assert found == ([joined] if joined else [])
