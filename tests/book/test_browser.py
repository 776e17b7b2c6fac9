"""What readers meet in a browser without a network: light and dark, on a desk and on a phone."""

import asyncio
import gzip
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.book.site import PAGES, SITE, chapters, name, require_pages

pytest.importorskip("playwright", reason="NO PAGES CHECKED IN A BROWSER: install playwright")
pytest.importorskip("axe_playwright_python", reason="NO PAGES CHECKED: install axe")

from tests.book.visits import (
    READERS,
    Reader,
    Visit,
    find_browser,
    loaded,
    open_browser,
    open_tab,
    visit_all,
)

if not find_browser():
    pytest.skip(
        "NO PAGES CHECKED IN A BROWSER: install Chromium, or name it by $CHROMIUM",
        allow_module_level=True,
    )
require_pages()
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

MEGABYTE = 1_000_000
FIRST = SITE / "index.html"  # leads on to the introduction
READ = [page for page in PAGES if page != FIRST]


def kind(page: Path) -> str:
    """Return what a page has in common with those that are made in the same way."""
    if page in chapters():
        return "chapter"
    return next((folder for folder in ("_modules", "api") if folder in page.parts), "")


def visits_to(pages: list[Path]) -> Iterator[Visit]:
    """Yield a visit to each page, by all readers where it stands for its kind.

    Elsewhere one reader comes, the next to the next page; to a chapter two that share nothing.
    """
    seen = Counter[str]()
    for page in pages:
        turn = seen[kind(page)] % len(READERS)
        is_first, seen[kind(page)] = not seen[kind(page)], seen[kind(page)] + 1
        readers = (*READERS[turn:], *READERS[:turn])
        if kind(page) == "chapter" and not is_first:
            readers = READERS[turn], READERS[-1 - turn]
        elif kind(page) and not is_first:
            readers = readers[:1]
        yield Visit(page, readers)


@pytest.fixture(scope="module")
def all_visits() -> dict[Path, Visit]:
    return {visit.page: visit for visit in visit_all(visits_to(READ))}


@pytest.fixture(params=READ, ids=name)
def visit(request: pytest.FixtureRequest, all_visits: dict[Path, Visit]) -> Visit:
    return all_visits[request.param]


def test_every_kind_of_page_is_loaded_and_seen_by_every_reader() -> None:
    first, seen = defaultdict(set), defaultdict(set)
    for visit in visits_to(READ):
        first[kind(visit.page)].add(visit.readers[0])
        seen[kind(visit.page)].add(visit.readers)
    assert first.keys() == {"", "_modules", "api", "chapter"}
    assert all(readers == set(READERS) for readers in first.values())
    assert all(len(READERS) in map(len, readers) for readers in seen.values())


def test_every_chapter_is_seen_in_both_themes_and_at_both_widths() -> None:
    for visit in visits_to(chapters()):
        for choice in zip(*visit.readers, strict=True):
            assert len(set(choice)) == 2


def test_nothing_is_asked_of_the_network(visit: Visit) -> None:
    assert visit.external == []


def test_the_console_shows_no_error(visit: Visit) -> None:
    assert visit.errors == []


def test_every_formula_is_set(visit: Visit) -> None:
    assert visit.untypeset == []


def test_the_page_does_not_scroll_sideways(visit: Visit) -> None:
    assert visit.too_wide == []


def test_the_page_is_accessible(visit: Visit) -> None:
    assert visit.violations == []


def test_every_slider_obeys_the_keyboard(visit: Visit) -> None:
    assert visit.dead_sliders == []


@pytest.mark.parametrize("chapter", chapters(), ids=name)
def test_a_chapter_weighs_at_most_one_and_a_half_megabytes(
    chapter: Path, all_visits: dict[Path, Visit]
) -> None:
    files = all_visits[chapter].loaded
    sizes = {name(path): len(gzip.compress(path.read_bytes())) for path in files}
    assert sum(sizes.values()) <= 1.5 * MEGABYTE, sorted(sizes.items(), key=lambda s: -s[1])


def test_the_first_page_leads_to_the_introduction() -> None:
    async def open_first() -> str:
        async with open_browser() as browser:
            page = await open_tab(browser)
            await page.goto(FIRST.as_uri())
            await page.wait_for_url("**/intro.html")
            return await page.get_by_role("heading", level=1).inner_text()

    assert "Fisher information" in asyncio.run(open_first())


def test_the_search_finds_the_chapter_on_the_fisher_information() -> None:
    # Without a server the results come without the lines around the word, and the console says so.
    async def search(word: str) -> list[str]:
        opened = Visit(SITE / "book" / "intro.html")
        async with open_browser() as browser, loaded(await open_tab(browser), opened) as page:
            await page.keyboard.press("Control+k")
            await page.keyboard.type(word)
            await page.keyboard.press("Enter")
            results = page.locator("#search-results li > a")
            await results.first.wait_for()
            await page.get_by_text("Search finished").wait_for()
            addresses = await results.evaluate_all("links => links.map(link => link.href)")
        return [address.partition("/_build/html/")[2].partition("?")[0] for address in addresses]

    assert "book/foundations/fisher.html" in asyncio.run(search("Fisher"))


# What each page below shares: it follows the theme of the system, as a page of the book does.
PAGE = """<!doctype html><html lang="en"><head><title>A page</title><script>
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
dark.onchange = follow;
follow();
</script><style>html[data-theme="dark"] {{ background: black; color: white; }}</style></head>
<body><main><h1>A heading</h1>{}</main></body></html>"""
SLIDER = """<div><svg role="img" aria-label="A bar" width="90" height="9">
<rect width="9" height="9"/></svg>
<label for="r">Width</label><input id="r" type="range" min="0" max="5"></div>"""
MOVES = """<script>
const range = document.querySelector("input"), bar = document.querySelector("rect");
range.addEventListener("input", () => bar.setAttribute("width", 9 + 9 * range.value));
</script>"""
LIGHT, DARK = READERS[0], READERS[-1]


def visit_to(folder: Path, content: str, readers: tuple[Reader, ...] = READERS) -> Visit:
    page = folder / "page.html"
    page.write_text(PAGE.format(content))
    (visit,) = visit_all([Visit(page, readers)])
    return visit


def test_a_good_page_is_found_good(tmp_path: Path) -> None:
    visit = visit_to(tmp_path, SLIDER + MOVES)
    assert visit == Visit(visit.page, sliders=1, loaded={visit.page})


def test_a_request_to_the_network_and_an_error_are_found(tmp_path: Path) -> None:
    address = "https://example.org/picture.png"
    visit = visit_to(
        tmp_path, f'<img src="{address}" alt=""><script>console.error("planted")</script>'
    )
    assert visit.external == [address]
    assert {"planted", f"not loaded: {address}"} <= set(visit.errors)


def test_formulas_that_are_not_set_are_found(tmp_path: Path) -> None:
    visit = visit_to(tmp_path, r'<p>Is $x^2$ <span class="math">\(y\)</span>.</p>')
    assert len(visit.untypeset) == 3  # the two formulas, one of which is also left in the text


def test_a_page_that_cannot_be_read_aloud_is_found_by_every_reader(tmp_path: Path) -> None:
    visit = visit_to(tmp_path, '<img src="data:,">')
    found = {reader for reader, text in visit.violations if text.startswith("image-alt")}
    assert found == set(READERS)


def test_a_slider_that_moves_nothing_is_found_by_every_reader(tmp_path: Path) -> None:
    assert {reader for reader, _ in visit_to(tmp_path, SLIDER).dead_sliders} == set(READERS)


def test_a_page_that_is_too_wide_on_a_phone_alone_is_found_there_alone(tmp_path: Path) -> None:
    visit = visit_to(tmp_path, '<p style="width: 700px">Wide.</p>')
    assert {reader.width for reader, _ in visit.too_wide} == {375}


@pytest.mark.parametrize("first", READERS)
def test_text_that_is_illegible_in_the_dark_alone_is_found_there_alone(
    tmp_path: Path, first: Reader
) -> None:
    readers = (first, *(reader for reader in READERS if reader != first))
    visit = visit_to(
        tmp_path,
        '<p class="dim">Dim.</p><style>html[data-theme="dark"] .dim { color: #333; }</style>',
        readers,
    )
    found = {reader for reader, text in visit.violations if text.startswith("color-contrast")}
    assert found == {reader for reader in READERS if reader.theme == "dark"}


def test_a_page_that_does_not_follow_the_theme_is_found(tmp_path: Path) -> None:
    stubborn = (
        '<script>dark.onchange = null; document.documentElement.dataset.theme = "light"</script>'
    )
    assert visit_to(tmp_path, stubborn, (LIGHT, DARK)).errors == ["the page is light, not dark"]


def test_a_page_that_is_dark_too_late_is_found(tmp_path: Path) -> None:
    late = """<script>document.documentElement.dataset.theme = "light"</script>
    <script>setTimeout(follow)</script>"""
    assert "it was light at first" in visit_to(tmp_path, late, (DARK,)).errors
