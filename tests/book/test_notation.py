"""Every symbol and every macro in the formulas of a chapter stands in the page on notation.

A symbol is a letter, Latin or Greek, with its accent or its typeface: `\\hat\\theta` is another one
than `\\theta`. What stands below or above it is read as symbols of its own. Upright words, as in
`\\text{bias}` or `c_{\\mathrm f}`, are names and not symbols, and so is the d of a differential.
"""

import re
from pathlib import Path

import pytest
from prose import BOOK, maths, page_name, pages, parts

NOTATION = BOOK / "reference" / "notation.md"

ACCENTS = "hat|bar|tilde|dot|mathcal|mathbb|mathbf|boldsymbol"
# What the mathematics of school and the layout of a formula need.
COMMON = """
frac tfrac dfrac binom sqrt sum prod int lim max min exp sin cos partial forall exists
pm times cdot div le leq ge geq ne neq approx equiv in notin to infty ll gg mid colon
dots ldots cdots vdots quad qquad displaystyle textstyle limits nolimits
left right big Big bigg Bigg bigl bigr Bigl Bigr Vert vert lVert rVert lvert rvert
leftarrow rightarrow Rightarrow langle rangle lfloor rfloor lceil rceil
"""

_WORDS = re.compile(
    r"\\(?:text|mathrm|operatorname\*?|begin|end)(?![A-Za-z])\s*(?:\{[^{}]*\}|[A-Za-z])"
    r"|%.*|\\[^A-Za-z]"
)
_TOKEN = re.compile(
    rf"\\(?:{ACCENTS})\b\s*(?:\{{?\s*(?:\\[A-Za-z]+|[A-Za-z0-9])\s*\}}?)"
    r"|\\[A-Za-z]+|[A-Za-z]"
)


def symbols(formula: str) -> set[str]:
    """Return the symbols and macros of a formula that call for an explanation."""
    tokens = _TOKEN.findall(_WORDS.sub(" ", formula))
    return {re.sub(r"[\s{}]", "", token) for token in tokens} - {
        "\\" + word for word in COMMON.split()
    }


def used(page: Path) -> dict[str, int]:
    """Return the symbols of a page, each with the line of the first part that uses it."""
    found: dict[str, int] = {}
    for part in parts(page.read_text("utf-8")):
        for formula in maths(part):
            for symbol in symbols(formula):
                found.setdefault(symbol, part.line)
    return found


def listed() -> dict[str, set[str]]:
    """Return the symbols that the page on notation explains, by chapter; "" for all chapters."""
    found: dict[str, set[str]] = {"": set()}
    chapter = ""
    for line in NOTATION.read_text("utf-8").splitlines():
        if line.startswith("#"):
            chapter = ""
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and (match := re.match(r"\{doc\}`(?:\.\./|/book/)([\w/]+)`", cells[0])):
            chapter = match[1]
        named = cells[1:2] if chapter else cells[:1]
        for formula in re.findall(r"\$([^$]+)\$", " ".join(named)):
            found.setdefault(chapter, set()).update(symbols(formula.replace("\\|", "|")))
    return found


@pytest.fixture(params=pages(), ids=page_name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_symbol_is_in_the_notation(page: Path) -> None:
    known = listed()
    known = known[""] | known.get(page_name(page), set())
    missing = [
        f"{symbol} (line {line})" for symbol, line in used(page).items() if symbol not in known
    ]
    assert missing == []


def test_every_symbol_of_the_notation_is_used() -> None:
    everywhere = {symbol for page in pages() for symbol in used(page)}
    by_page = {page_name(page): set(used(page)) for page in pages()}
    unused = {
        chapter: known - (by_page[chapter] if chapter else everywhere)
        for chapter, known in listed().items()
    }
    assert {chapter: symbols for chapter, symbols in unused.items() if symbols} == {}


def test_the_transpose_is_written_by_its_macro() -> None:
    written = {page: page.read_text("utf-8") for page in BOOK.rglob("*.md")}
    found = [page_name(page) for page, text in written.items() if re.search(r"\\top\b", text)]
    assert found == [], r"write \transpose behind a symbol"


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (r"\hat\theta = \argmax_\theta L", {r"\hat\theta", r"\argmax", r"\theta", "L"}),
        (r"c_{\mathrm f} + \text{bias} + \frac{a}{b}", {"c", "a", "b"}),
        (r"\int \mathrm{d}x\, \mathcal{L}", {"x", r"\mathcalL"}),
        (r"\begin{aligned} a &= 1 \\ b \end{aligned}", {"a", "b"}),
    ],
)
def test_a_symbol_is_a_letter_with_its_accent(formula: str, expected: set[str]) -> None:
    assert symbols(formula) == expected
