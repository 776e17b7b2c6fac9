"""The pages that `make book` built: nothing raw, no dead link, nothing fetched from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.book.site import (
    PAGES,
    RAW,
    ROOT,
    SITE,
    Page,
    chapters,
    name,
    notebook_of,
    read,
    require_pages,
)

require_pages()

MEGABYTE = 1_000_000


@pytest.fixture(params=PAGES, ids=name)
def page(request: pytest.FixtureRequest) -> Page:
    return read(request.param)


def test_no_markup_is_left_in_the_text(page: Page) -> None:
    assert re.findall(RAW + "|^```", page.text, re.MULTILINE) == []


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


def test_every_page_of_the_book_has_a_description_of_its_own() -> None:
    written = [read(path).meta for path in PAGES if SITE / "book" in path.parents]
    descriptions = [meta["description"] for meta in written]
    assert len(set(descriptions)) == len(descriptions) > 15
    assert all(meta["og:description"] == meta["description"] for meta in written)
    assert min(map(len, descriptions)) > 50


def test_no_style_sheet_loads_from_elsewhere() -> None:
    pattern = re.compile(r"""(?:@import\s+|url\()\s*["']?(?:https?:)?//""")
    sheets = [sheet for sheet in SITE.rglob("*.css") if pattern.search(sheet.read_text("utf-8"))]
    assert sheets == []


def test_the_notebook_that_a_chapter_offers_runs(tmp_path: Path) -> None:
    chapter, *_ = chapters()
    downloaded = shutil.copy(notebook_of(chapter), tmp_path)  # nbmake passes over _build
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", downloaded]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_both_editions_of_the_book_are_at_most_50_megabytes() -> None:
    files = {path: path.stat().st_size for path in SITE.rglob("*") if path.is_file()}
    largest = sorted(files, key=files.__getitem__, reverse=True)[:10]
    assert sum(files.values()) <= 50 * MEGABYTE, f"the largest files: {largest}"


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
