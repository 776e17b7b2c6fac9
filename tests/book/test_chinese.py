"""Each page is there in Chinese, leads to its original and back, and has the same numbers."""

import re
from collections import Counter
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from chinese import publish, settings
from translation import UNTRANSLATED, WHOLE

from tests.book.site import PAGES, SITE, require_pages

ZH = SITE / "zh"
WRITTEN = [page for page in PAGES if SITE / "book" in page.parents]


def test_the_settings_are_those_of_the_book_but_for_the_language() -> None:
    found = settings()["sphinx"]["config"]
    assert found["language"] == "zh_CN"
    assert found["math_numfig"] is True


def test_a_published_edition_shares_what_is_the_same(tmp_path: Path) -> None:
    site, pages = tmp_path / "site", tmp_path / "pages"
    for root, word in ((site, "one"), (pages, "other")):
        (root / "_static").mkdir(parents=True)
        (root / "_static" / "same.js").write_text("same")
        (root / "_static" / "words.js").write_text(word)
    (pages / "book").mkdir()
    text = '<script src="../_static/same.js?v=1"></script><script src="../_static/words.js">'
    (pages / "book" / "page.html").write_text(text)
    publish(pages, site)
    shown = text.replace("../_static/same.js", "../../_static/same.js")
    assert (site / "zh" / "book" / "page.html").read_text() == shown
    assert [path.name for path in (site / "zh" / "_static").iterdir()] == ["words.js"]


def test_there_are_pages() -> None:
    require_pages()
    assert len(WRITTEN) > 30


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_a_page_and_its_translation_lead_to_each_other(page: Path) -> None:
    translation = ZH / page.relative_to(SITE)
    for here, there, language in ((page, translation, "zh-CN"), (translation, page, "en")):
        tree = read(here)
        (switch,) = tree.select("a.edition")
        assert (here.parent / switch["href"]).resolve() == there
        assert switch["hreflang"] == switch["lang"] == language
    assert read(translation).html["lang"] == "zh-CN"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_a_page_says_if_it_is_not_translated(page: Path) -> None:
    translation = ZH / page.relative_to(SITE)
    name = page.relative_to(SITE).with_suffix("").as_posix()
    assert (UNTRANSLATED in translation.read_text("utf-8")) == (name not in WHOLE)


@pytest.mark.parametrize("page", sorted(WHOLE))
def test_both_editions_have_the_same_numbers_and_formulas(page: str) -> None:
    one, other = (read(root / f"{page}.html") for root in (SITE, ZH))
    for selector in ("span.pasted-text", "span.math", "div.math", "figure[id]", "pre"):
        assert texts(one, selector) == texts(other, selector)


@pytest.mark.parametrize("page", sorted(WHOLE - {"book/reference/glossary"}))
def test_a_translated_page_has_no_english_but_names_in_brackets(page: str) -> None:
    tree = read(ZH / f"{page}.html")
    for tag in tree.select("pre, code, script, style, .math, .bibliography"):
        tag.decompose()
    text = re.sub("（[^）]*）", "", tree.select_one("article").get_text(" "))
    assert re.findall(r"[A-Za-z]{3,} [a-z]{2,} [a-z]{2,}", text) == []


@pytest.mark.parametrize("page", sorted(p for p in WHOLE if "/foundations/" in p))
def test_exercises_and_solutions_have_chinese_headings(page: str) -> None:
    tree = read(ZH / f"{page}.html")
    headings = [tag.get_text() for tag in tree.select(".exercise > .admonition-title")]
    assert all(re.fullmatch(r"练习 \d+\.\d+ （.+）", heading) for heading in headings)
    solutions = [tag.get_text() for tag in tree.select(".solution > .admonition-title")]
    assert len(headings) == len(solutions) > 0
    assert set(solutions) == {"解答"}


def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text("utf-8"), "html.parser")


def texts(tree: BeautifulSoup, selector: str) -> Counter[str]:
    return Counter(
        tag.get("id") or " ".join(tag.get_text().split()) for tag in tree.select(selector)
    )
