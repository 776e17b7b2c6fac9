"""What readers meet in a browser without a network: light and dark, on a desk and on a phone."""

import asyncio
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from translation import WHOLE

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
ZH = SITE / "zh"
READ = [page for page in PAGES if page not in (FIRST, ZH / FIRST.name)]


MADE = "_modules", "api", "zh"  # folders of pages that are made from modules, or not translated


def kind(page: Path) -> str:
    """Return what a page has in common with those that are made in the same way."""
    if page in chapters():
        return "chapter"
    if name(page).removeprefix("zh/").removesuffix(".html") in WHOLE:
        return ""
    return next((folder for folder in MADE if folder in page.parts), "")


def visits_to(pages: list[Path]) -> Iterator[Visit]:
    """Yield a visit to each page, by all readers to the first one of each kind.

    Later ones are alike if they were made from modules: one reader comes, the next to the next
    page. To a page that somebody wrote, two come that share neither theme nor width.
    """
    seen = Counter[str]()
    for page in pages:
        turn = seen[kind(page)] % len(READERS)
        is_first, seen[kind(page)] = not seen[kind(page)], seen[kind(page)] + 1
        readers = (*READERS[turn:], *READERS[:turn])
        if not is_first:
            readers = readers[:1] if kind(page) in MADE else (READERS[turn], READERS[-1 - turn])
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
    assert first.keys() == {"", "_modules", "api", "chapter", "zh"}
    assert all(readers == set(READERS) for readers in first.values())
    assert all(len(READERS) in map(len, readers) for readers in seen.values())


def test_every_written_page_is_seen_in_both_themes_and_at_both_widths() -> None:
    for visit in (visit for visit in visits_to(READ) if kind(visit.page) not in MADE):
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


def test_all_of_a_table_and_of_a_formula_is_on_the_screen(visit: Visit) -> None:
    assert visit.cut == []


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


FOUND_BY = {
    "Fisher": "book/foundations/fisher.html",
    "elastic weight": "book/foundations/ewc.html",
    "log-likelihood": "book/foundations/likelihood.html",
    "似然": "book/reference/glossary.html",
    "信息矩阵": "book/reference/glossary.html",
    "Fisher 信息": "book/reference/glossary.html",
    "权重巩固 EWC": "book/reference/glossary.html",
}


FOUND_IN_CHINESE = {
    "Fisher": "zh/book/foundations/fisher.html",
    "似然": "zh/book/foundations/likelihood.html",
    "信息矩阵": "zh/book/foundations/fisher.html",
    "弹性权重巩固": "zh/book/foundations/ewc.html",
}


@pytest.mark.parametrize(("edition", "found_by"), [(SITE, FOUND_BY), (ZH, FOUND_IN_CHINESE)])
def test_the_search_finds_pages_by_english_and_by_chinese_words(
    edition: Path, found_by: dict[str, str]
) -> None:
    # Without a server the results come without the lines around the word, and the console says so.
    async def search(*words: str) -> dict[str, list[str]]:
        found = {}
        async with open_browser() as browser:
            tab = await open_tab(browser)
            for word in words:
                async with loaded(tab, Visit(edition / "book" / "intro.html")) as page:
                    await page.keyboard.press("Control+k")
                    await page.keyboard.insert_text(word)
                    await page.keyboard.press("Enter")
                    results = page.locator("#search-results li > a")
                    await page.get_by_text(
                        re.compile("Search finished|did not match|搜索完成|没有|未找到")
                    ).wait_for()
                    links = await results.evaluate_all("links => links.map(link => link.href)")
                found[word] = [address.partition("/_build/html/")[2] for address in links]
        return found

    results = asyncio.run(search(*found_by, "骆驼"))
    pages = {word: {link.partition("?")[0] for link in links} for word, links in results.items()}
    assert {word for word, page in found_by.items() if page not in pages[word]} == set()
    assert pages["骆驼"] == set()


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
TABLE = "<table style='width: 700px'><tr><td>A cell</td></tr></table>"
LONG = "<p style='width: 700px'>A formula</p>"
LIGHT, DARK = READERS[0], READERS[-1]
ADDRESS = "https://example.org/picture.png"
DIM = '<p class="dim">Dim.</p><style>html[data-theme="dark"] .dim { color: #333; }</style>'
LATE = """<script>document.documentElement.dataset.theme = "light"</script>
<script>setTimeout(follow)</script>"""
STUBBORN = """<script>dark.onchange = null;
document.documentElement.dataset.theme = "light"</script>"""
PLANTED: dict[str, tuple[str, tuple[Reader, ...]]] = {
    "good": (SLIDER + MOVES, READERS),
    "bad request": (
        f'<img src="{ADDRESS}" alt=""><script>console.error("planted")</script>',
        READERS,
    ),
    "raw formula": (r'<p>Is $x^2$ <span class="math">\\(y\\)</span>.</p>', READERS),
    "mute picture": ('<img src="data:,">', READERS),
    "dead slider": (SLIDER, READERS),
    "wide": ('<p style="width: 700px">Wide.</p>', READERS),
    "cut table": (f"<article><div style='overflow: auto'>{TABLE}</div></article>", READERS),
    "cut formula": (
        f"<article><div class='math' style='overflow: auto'>{LONG}</div></article>",
        READERS,
    ),
    "dim, loaded light": (DIM, READERS),
    "dim, loaded dark": (DIM, READERS[::-1]),
    "stubborn": (STUBBORN, (LIGHT, DARK)),
    "late": (LATE, (DARK,)),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Visit]:
    """Return the visits to pages with one planted defect each, and to one without."""
    folder = tmp_path_factory.mktemp("planted")
    visits = {}
    for defect, (content, readers) in PLANTED.items():
        visits[defect] = Visit(folder / f"{defect}.html", readers)
        visits[defect].page.write_text(PAGE.format(content))
    visit_all(visits.values())
    return visits


def test_a_good_page_is_found_good(planted: dict[str, Visit]) -> None:
    visit = planted["good"]
    assert visit == Visit(visit.page, sliders=1, loaded={visit.page})


def test_a_request_to_the_network_and_an_error_are_found(planted: dict[str, Visit]) -> None:
    assert planted["bad request"].external == [ADDRESS]
    assert {"planted", f"not loaded: {ADDRESS}"} <= set(planted["bad request"].errors)


def test_formulas_that_are_not_set_are_found(planted: dict[str, Visit]) -> None:
    # Two formulas, one of which is also left in the text.
    assert len(planted["raw formula"].untypeset) == 3


def test_a_picture_without_a_text_is_found_by_every_reader(planted: dict[str, Visit]) -> None:
    found = planted["mute picture"].violations
    assert {reader for reader, text in found if text.startswith("image-alt")} == set(READERS)


def test_a_slider_that_moves_nothing_is_found_by_every_reader(planted: dict[str, Visit]) -> None:
    assert {reader for reader, _ in planted["dead slider"].dead_sliders} == set(READERS)


def test_a_page_too_wide_for_a_phone_is_found_there_alone(planted: dict[str, Visit]) -> None:
    found = {reader for reader, _ in planted["wide"].too_wide}
    assert found == {reader for reader in READERS if reader.width == 375}


@pytest.mark.parametrize("defect", ["cut table", "cut formula"])
def test_what_is_too_wide_for_a_phone_is_found_there_alone(
    planted: dict[str, Visit], defect: str
) -> None:
    assert planted[defect].too_wide == []
    found = {reader for reader, _ in planted[defect].cut}
    assert found == {reader for reader in READERS if reader.width == 375}


@pytest.mark.parametrize("defect", ["dim, loaded light", "dim, loaded dark"])
def test_text_illegible_in_the_dark_is_found_there_alone(
    planted: dict[str, Visit], defect: str
) -> None:
    found = planted[defect].violations
    dim = {reader for reader, text in found if text.startswith("color-contrast")}
    assert dim == {reader for reader in READERS if reader.theme == "dark"}


def test_a_page_that_does_not_follow_the_theme_is_found(planted: dict[str, Visit]) -> None:
    assert planted["stubborn"].errors == ["the page is light, not dark"]


def test_a_page_that_is_dark_too_late_is_found(planted: dict[str, Visit]) -> None:
    assert planted["late"].errors == ["it was light at first"]
