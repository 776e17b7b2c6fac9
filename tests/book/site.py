"""The pages that `make book` built, and what the tests of them share."""

from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sources import STAMP, digest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)

# What an author writes and a reader must never see.
RAW = (
    r"\{(?:glue|prf|eq|numref|cite|ref|doc|term|py|func|meth|class|mod|math|figure|code-cell"
    r"|eval-rst|admonition|exercise|solution|dropdown)\b[^}]*\}[`\s]"
    r"|^:::|:eq:`|:math:`|^\.\. \w+::|\(\?\?\?\)|\[\?\]"
)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# A <link> of another kind names a page, it does not load one.
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}


def name(path: Path) -> str:
    """Return the address of a page within the site."""
    return path.relative_to(SITE).as_posix()


def chapters() -> list[Path]:
    """Return the pages that offer an executed notebook."""
    return [page for page in PAGES if notebook_of(page).is_file()]


def notebook_of(page: Path) -> Path:
    return (SITE / "_sources" / page.relative_to(SITE)).with_suffix(".ipynb")


def require_pages() -> None:
    """Skip the module that asks, loudly, if there are no pages or other sources made them."""
    if not PAGES:
        pytest.skip("NO PAGES TO CHECK: run `make book` first", allow_module_level=True)
    stamp = SITE / STAMP
    if not stamp.is_file() or stamp.read_text("utf-8") != digest(ROOT):
        pytest.skip(
            "THE PAGES ARE NOT THOSE OF THE SOURCES: run `make book`", allow_module_level=True
        )


@dataclass
class Page(HTMLParser):
    """The text, anchors, links, descriptions and loaded files of one page."""

    path: Path
    text: str = ""
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)
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
        if tag == "meta" and (key := values.get("name") or values.get("property")):
            self.meta[key] = values.get("content", "")
        self._silent += tag in ("script", "style", "pre", "code")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data


@cache
def read(path: Path) -> Page:
    return Page(path)
