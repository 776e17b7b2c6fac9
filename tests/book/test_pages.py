"""The pages that `make book` built: nothing raw, no dead link, nothing fetched from elsewhere."""

import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
SOURCES = [*(ROOT / "book").rglob("*.md"), *(ROOT / "ewc_lib").rglob("*.py")]


def modified(path: Path) -> float:
    return path.stat().st_mtime


if not PAGES:
    pytest.skip("NO PAGES TO CHECK: run `make book` first", allow_module_level=True)
if max(map(modified, SOURCES)) > max(map(modified, PAGES)):
    pytest.skip("THE PAGES ARE OLDER THAN THEIR SOURCES: run `make book`", allow_module_level=True)

# What an author writes and a reader must never see.
RAW = re.compile(
    r"\{(?:glue|prf|eq|numref|cite|ref|doc|term|py|math|figure|code-cell|eval-rst)\b[^}]*\}[`\s]"
    r"|^:::|^```|:eq:`|:math:`|^\.\. \w+::|\(\?\?\?\)|\[\?\]",
    re.MULTILINE,
)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# A <link> of another kind names a page, it does not load one.
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}


@dataclass
class Page(HTMLParser):
    """The text, anchors, links and loaded files of one page."""

    path: Path
    text: str = ""
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    images_without_text: list[str] = field(default_factory=list)
    _silent: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]
        address = values.get(LOADED.get(tag, ""))
        if address and (tag != "link" or LOADED_LINKS & set(values.get("rel", "").split())):
            self.loaded.append(address)
        if tag == "img" and not values.get("alt", "").strip():
            self.images_without_text.append(values.get("src", ""))
        self._silent += tag in ("script", "style", "pre", "code")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data


@cache
def read(path: Path) -> Page:
    return Page(path)


@pytest.fixture(params=PAGES, ids=lambda path: path.relative_to(SITE).as_posix())
def page(request: pytest.FixtureRequest) -> Page:
    return read(request.param)


def test_no_markup_is_left_in_the_text(page: Page) -> None:
    assert RAW.findall(page.text) == []


def test_every_internal_link_leads_somewhere(page: Page) -> None:
    assert [link for link in page.links if not leads_somewhere(link, page)] == []


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    elsewhere = [
        address
        for address in page.loaded
        if urlsplit(address).netloc or urlsplit(address).scheme not in ("", "data")
    ]
    assert elsewhere == []


def test_every_image_has_a_text(page: Page) -> None:
    assert page.images_without_text == []


def test_no_style_sheet_loads_from_elsewhere() -> None:
    pattern = re.compile(r"""(?:@import\s+|url\()\s*["']?(?:https?:)?//""")
    sheets = [sheet for sheet in SITE.rglob("*.css") if pattern.search(sheet.read_text("utf-8"))]
    assert sheets == []


def leads_somewhere(link: str, page: Page) -> bool:
    """Whether an internal link names a file, and an anchor in it, that exist."""
    address = urlsplit(link)
    if address.scheme or address.netloc:
        return True
    target = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
    if not target.is_file():
        return False
    if not address.fragment or target.suffix != ".html":
        return True
    return unquote(address.fragment) in read(target).anchors
