"""Previews of what links lead to: by pointer and keyboard, never by touch, light and accessible."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="NO PREVIEWS CHECKED IN A BROWSER: install playwright")

from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Locator, Page
from previews import FILE

from tests.book.site import SITE, name, require_pages
from tests.book.visits import Reader, Visit, find_browser, loaded, open_browser, open_tab

if not find_browser():
    pytest.skip("NO PREVIEWS CHECKED IN A BROWSER: install Chromium", allow_module_level=True)
require_pages()
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

TEXTS = SITE / "_static" / FILE
CHAPTER = SITE / "book" / "foundations" / "fisher.html"
CHINESE = SITE / "zh" / "book" / "foundations" / "fisher.html"
WITHOUT_FORMULAS = SITE / "book" / "reference" / "api" / "ewc_lib.errors.html"
# A link of each kind, and what its preview holds.
LINKS = {
    'a.internal[href*="#equation-"]': "mjx-container",
    'a.internal[href*="#thm-"]': ".admonition-title",
    'a.internal[href*="bibliography.html#"]': ".citation",
    'a.internal[href*="glossary.html#"]': "p",
    'a.internal[href*="#ewc_lib."]': ".sig",
}


@asynccontextmanager
async def opened(visit: Visit) -> AsyncIterator[Page]:
    async with open_browser() as browser, loaded(await open_tab(browser), visit) as page:
        yield page


async def look_at(page: Page, link: Locator) -> Locator:
    """Rest the pointer on a link until its preview can be seen."""
    await link.hover()
    preview = page.get_by_role("tooltip")
    await preview.wait_for()
    return preview


@pytest.mark.parametrize("chapter", [CHAPTER, CHINESE], ids=name)
def test_each_kind_of_link_has_a_preview_that_is_loaded_when_asked_for(chapter: Path) -> None:
    texts = (SITE / "zh" if chapter == CHINESE else SITE) / "_static" / FILE

    async def visit_links(visit: Visit) -> None:
        async with opened(visit) as page:
            assert texts not in visit.loaded
            for link, content in LINKS.items():
                preview = await look_at(page, page.locator(f"article {link}:visible").first)
                assert await preview.locator(content).count(), link
                assert await preview.locator("a, [id], [tabindex]").count() == 0, link
                await page.mouse.move(0, 0)
                await preview.wait_for(state="detached")
            assert texts in visit.loaded

    visit = Visit(chapter)
    asyncio.run(visit_links(visit))
    assert (visit.external, visit.errors) == ([], [])


def test_the_keyboard_opens_a_preview_and_escape_closes_it() -> None:
    async def by_keyboard() -> None:
        async with opened(Visit(CHAPTER)) as page:
            link = page.locator('article a.internal[href*="#equation-"]:visible').first
            await link.focus()
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Tab")
            preview = page.get_by_role("tooltip")
            await preview.wait_for()
            assert await link.get_attribute("aria-describedby") == await preview.get_attribute("id")
            await page.keyboard.press("Escape")
            await preview.wait_for(state="detached")
            assert await link.get_attribute("aria-describedby") is None

    asyncio.run(by_keyboard())


def test_a_pointer_may_rest_on_the_preview_itself() -> None:
    async def move_over() -> None:
        async with opened(Visit(CHAPTER)) as page:
            link = page.locator('article a[href*="#equation-"]:visible').first
            preview = await look_at(page, link)
            await preview.hover()
            await page.wait_for_timeout(600)
            assert await preview.is_visible()

    asyncio.run(move_over())


def test_touch_opens_no_preview() -> None:
    async def touch() -> int:
        async with open_browser() as browser:
            context = await browser.new_context(offline=True, has_touch=True, is_mobile=True)
            page = await context.new_page()
            await page.goto(CHAPTER.as_uri())
            await page.locator('article a.internal[href*="#equation-"]').first.tap()
            await page.wait_for_timeout(600)
            return await page.locator("#preview").count()

    assert asyncio.run(touch()) == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_with_a_preview_is_accessible(theme: str) -> None:
    async def violations() -> list[str]:
        async with opened(Visit(CHAPTER, (Reader(theme, 1300),))) as page:
            await look_at(page, page.locator('article a.internal[href*="#thm-"]:visible').first)
            await page.evaluate(AXE_SCRIPT)
            await page.evaluate("checks.thin()")
            found: list[str] = await page.evaluate("checks.violations()")
            return found

    assert asyncio.run(violations()) == []


def test_a_formula_is_set_where_the_page_has_none() -> None:
    async def formulas() -> int:
        async with opened(Visit(WITHOUT_FORMULAS)) as page:
            assert await page.evaluate("window.MathJax") is None
            anchor = next(name for name, text in texts().items() if "math" in text)
            link = f'<p><a class="internal" href="{SITE.as_uri()}/{anchor}">A link</a></p>'
            await page.evaluate("link => document.querySelector('article').innerHTML = link", link)
            preview = await look_at(page, page.get_by_role("link", name="A link"))
            return await preview.locator("mjx-container").count()

    assert asyncio.run(formulas())


def test_the_texts_weigh_little_and_hold_no_plumbing() -> None:
    assert len(gzip.compress(TEXTS.read_bytes())) < 100_000
    assert len(texts()) > 200
    assert not [name for name, text in texts().items() if "[source]" in text]


def texts() -> dict[str, str]:
    written = Path(TEXTS).read_text("utf-8").removeprefix("previews = ")
    found: dict[str, str] = json.loads(written)["texts"]
    return found
