"""What readers meet in a browser without a network: light and dark, on a desk and on a phone."""

import asyncio
import gzip
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.book.site import PAGES, SITE, chapters, name, require_pages

pytest.importorskip("playwright", reason="NO PAGES CHECKED IN A BROWSER: install playwright")
pytest.importorskip("axe_playwright_python", reason="NO PAGES CHECKED: install axe")

from tests.book.visits import (
    THEMES,
    WIDTHS,
    Visit,
    find_browser,
    open_browser,
    open_page,
    visit_all,
)

if not find_browser():
    pytest.skip(
        "NO PAGES CHECKED IN A BROWSER: install Chromium, or name it by $CHROMIUM",
        allow_module_level=True,
    )
require_pages()
pytestmark = pytest.mark.browser

MEGABYTE = 1_000_000
FIRST = SITE / "index.html"  # leads on to the introduction
READ = [page for page in PAGES if page != FIRST]


def readers_of(page: Path) -> Iterator[Visit]:
    """Yield a visit for each theme and width; each theme once for the source of a module."""
    if "_modules" in page.parts:
        pairs = zip(THEMES, WIDTHS, strict=True)
    else:
        pairs = product(THEMES, WIDTHS)
    return (Visit(page, theme, width) for theme, width in pairs)


@pytest.fixture(scope="module")
def all_visits() -> dict[Path, list[Visit]]:
    found = defaultdict(list)
    for visit in visit_all(visit for page in READ for visit in readers_of(page)):
        found[visit.page].append(visit)
    return found


@pytest.fixture(params=READ, ids=name)
def visits(request: pytest.FixtureRequest, all_visits: dict[Path, list[Visit]]) -> list[Visit]:
    return all_visits[request.param]


def found(visits: list[Visit], what: str) -> dict[tuple[str, int], list[str]]:
    """Return what was found by which readers, those who found nothing left out."""
    return {(v.theme, v.width): getattr(v, what) for v in visits if getattr(v, what)}


def test_nothing_is_asked_of_the_network(visits: list[Visit]) -> None:
    assert found(visits, "external") == {}


def test_the_console_shows_no_error(visits: list[Visit]) -> None:
    assert found(visits, "errors") == {}


def test_every_formula_is_set(visits: list[Visit]) -> None:
    assert found(visits, "untypeset") == {}


def test_the_page_does_not_scroll_sideways(visits: list[Visit]) -> None:
    assert found(visits, "too_wide") == {}


def test_the_page_is_accessible(visits: list[Visit]) -> None:
    assert found(visits, "violations") == {}


def test_every_slider_obeys_the_keyboard(visits: list[Visit]) -> None:
    assert found(visits, "dead_sliders") == {}


@pytest.mark.parametrize("chapter", chapters(), ids=name)
def test_a_chapter_weighs_at_most_one_and_a_half_megabytes(
    chapter: Path, all_visits: dict[Path, list[Visit]]
) -> None:
    loaded = set.union(*(visit.loaded for visit in all_visits[chapter]))
    sizes = {name(path): len(gzip.compress(path.read_bytes())) for path in loaded}
    assert sum(sizes.values()) <= 1.5 * MEGABYTE, sorted(sizes.items(), key=lambda s: -s[1])


def test_the_first_page_leads_to_the_introduction() -> None:
    async def open_first() -> str:
        async with open_browser() as browser, open_page(browser, Visit(READ[0])) as page:
            await page.goto(FIRST.as_uri())
            await page.wait_for_url("**/intro.html")
            return await page.get_by_role("heading", level=1).inner_text()

    assert "Fisher information" in asyncio.run(open_first())


def test_the_search_finds_the_chapter_on_the_fisher_information() -> None:
    # Without a server the results come without the lines around the word, and the console says so.
    async def search(word: str) -> list[str]:
        opened = Visit(SITE / "book" / "intro.html")
        async with open_browser() as browser, open_page(browser, opened) as page:
            await page.keyboard.press("Control+k")
            await page.keyboard.type(word)
            await page.keyboard.press("Enter")
            results = page.locator("#search-results li > a")
            await results.first.wait_for()
            await page.get_by_text("Search finished").wait_for()
            addresses = await results.evaluate_all("links => links.map(link => link.href)")
        return [address.partition("/_build/html/")[2].partition("?")[0] for address in addresses]

    assert "book/foundations/fisher.html" in asyncio.run(search("Fisher"))


BAD = """<!doctype html><html data-theme="light"><head><title>A page</title></head><body>
<img src="https://example.org/picture.png"><script>console.error("planted")</script>
<p>The value of $x^2$ is <span class="math">\\(y\\)</span>.</p><p style="width: 2000px">Wide.</p>
<div><svg role="img" aria-label="A dot" width="9" height="9"></svg>
<label>a <input type="range"></label></div>
</body></html>"""


def test_a_bad_page_is_found_bad_in_every_respect(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(BAD)
    (visit,) = visit_all([Visit(page, "dark", 375)])
    assert visit.external == ["https://example.org/picture.png"]
    assert "planted" in visit.errors
    assert "the page is light, not dark" in visit.errors
    assert len(visit.untypeset) == 3  # the two formulas, one of which is also left in the text
    assert visit.too_wide
    assert any(violation.startswith("image-alt") for violation in visit.violations)
    assert len(visit.dead_sliders) == visit.sliders == 1


GOOD = """<!doctype html><html lang="en" data-theme="light"><head><title>A page</title></head>
<body><main><h1>A slider</h1><div><svg role="img" aria-label="A bar" width="90" height="9">
<rect width="9" height="9"/></svg>
<label for="r">Width</label><input id="r" type="range" min="0" max="5"></div></main><script>
const range = document.querySelector("input"), bar = document.querySelector("rect");
range.addEventListener("input", () => bar.setAttribute("width", 9 + 9 * range.value));
</script></body></html>"""


def test_a_good_page_is_found_good(tmp_path: Path) -> None:
    page = tmp_path / "good.html"
    page.write_text(GOOD)
    (visit,) = visit_all([Visit(page)])
    assert visit == Visit(page, sliders=1, loaded={page})
