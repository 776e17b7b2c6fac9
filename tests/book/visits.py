"""Visits to built pages in a real browser, with the network off."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, Error, Locator, Page, async_playwright

LIMIT = 300  # seconds for one visit, on a machine that is busy with other things
CHECKS = Path(__file__).with_name("checks.js")
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")


class Reader(NamedTuple):
    """The theme that the system of a reader asks for, and the width of the window."""

    theme: str
    width: int


# Each differs in theme and width from the one as far from the other end.
READERS = tuple(Reader(*pair) for pair in product(("light", "dark"), (1300, 375)))


@dataclass
class Visit:
    """What readers meet on a page. The first one loads it, the others follow in turn."""

    page: Path
    readers: tuple[Reader, ...] = READERS
    loaded: set[Path] = field(default_factory=set)
    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    untypeset: list[str] = field(default_factory=list)
    too_wide: list[tuple[Reader, str]] = field(default_factory=list)
    cut: list[tuple[Reader, str]] = field(default_factory=list)
    violations: list[tuple[Reader, str]] = field(default_factory=list)
    dead_sliders: list[tuple[Reader, str]] = field(default_factory=list)
    sliders: int = 0


@cache
def find_browser() -> str | None:
    """Return the browser of the system, if it has one that starts. ``$CHROMIUM`` names another."""
    for candidate in (os.environ.get("CHROMIUM"), *BROWSERS):
        program = shutil.which(candidate) if candidate else None
        if program and _starts(program):
            return program
    return None


def _starts(program: str) -> bool:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_browser())
        try:
            yield browser
        finally:
            await browser.close()


async def open_tab(browser: Browser) -> Page:
    """Open an empty tab. A page that it loads forgets what earlier ones stored."""
    context = await browser.new_context(offline=True)
    context.set_default_timeout(LIMIT * 1000)
    await context.add_init_script(path=CHECKS)
    return await context.new_page()


@asynccontextmanager
async def loaded(tab: Page, visit: Visit) -> AsyncIterator[Page]:
    """Load a page as its first reader, and note what it asks for and what goes wrong."""
    listeners = {
        "request": lambda request: _note(request.url, visit),
        "requestfailed": lambda request: visit.errors.append(f"not loaded: {request.url}"),
        "pageerror": lambda error: visit.errors.append(str(error)),
        "console": lambda m: visit.errors.append(m.text) if m.type == "error" else None,
    }
    await _become(tab, visit.readers[0])
    for event, listener in listeners.items():
        tab.on(event, listener)  # type: ignore[call-overload]
    try:
        await tab.goto(visit.page.as_uri())
        await tab.evaluate("window.MathJax?.startup?.promise")
        yield tab
        await tab.goto("about:blank")
    finally:
        for event, listener in listeners.items():
            tab.remove_listener(event, listener)


def _note(url: str, visit: Visit) -> None:
    address = urlsplit(url)
    if address.scheme == "file":
        visit.loaded.add(Path(unquote(address.path)))
    elif address.scheme not in ("data", "blob", "about"):
        visit.external.append(url)


async def _become(tab: Page, reader: Reader) -> None:
    await tab.set_viewport_size({"width": reader.width, "height": 900})
    await tab.emulate_media(color_scheme=reader.theme)  # type: ignore[arg-type]


def visit_all(visits: Iterable[Visit]) -> list[Visit]:
    """Make all visits, in two tabs of one browser."""
    visits = list(visits)
    asyncio.run(_visit_all(iter(visits)))
    return visits


async def _visit_all(waiting: Iterator[Visit]) -> None:
    async with open_browser() as browser:
        await asyncio.gather(*(_visit_in_turn(browser, waiting) for _ in range(2)))


async def _visit_in_turn(browser: Browser, waiting: Iterator[Visit]) -> None:
    tab = await open_tab(browser)
    for visit in waiting:
        try:
            await asyncio.wait_for(_look_at(tab, visit), LIMIT)
        except (Error, TimeoutError) as error:
            visit.errors.append(f"the visit failed: {error!r}")
            await tab.context.close()
            tab = await open_tab(browser)


async def _look_at(tab: Page, visit: Visit) -> None:
    async with loaded(tab, visit):
        visit.errors += await tab.evaluate("theme => checks.flashes(theme)", visit.readers[0].theme)
        visit.untypeset = await tab.evaluate("checks.untypeset()")
        for reader in visit.readers:
            await _become(tab, reader)
            await _look_at_layout(tab, reader, visit)
        await tab.evaluate(AXE_SCRIPT)
        await tab.evaluate("checks.thin()")
        for reader in reversed(visit.readers):
            await _become(tab, reader)
            await tab.evaluate("checks.settle()")
            found = await tab.evaluate("checks.violations()")
            visit.violations += [(reader, violation) for violation in found]


async def _look_at_layout(tab: Page, reader: Reader, visit: Visit) -> None:
    shown = await tab.evaluate("checks.settle()")
    if shown != reader.theme:
        visit.errors.append(f"the page is {shown}, not {reader.theme}")
    visit.too_wide += [(reader, found) for found in await tab.evaluate("checks.tooWide()")]
    visit.cut += [(reader, cut) for cut in await tab.evaluate("checks.cut()")]
    sliders = await tab.locator("input[type=range]").all()
    visit.sliders = len(sliders)
    for slider in sliders:
        if not await _obeys_the_keyboard(slider):
            text = await slider.evaluate("slider => slider.outerHTML")
            visit.dead_sliders.append((reader, text))


async def _obeys_the_keyboard(slider: Locator) -> bool:
    """Whether the picture beside a slider changes at each end and at each step between."""
    picture = slider.locator("xpath=ancestor::*[descendant::*[@role='img']][1]").get_by_role("img")
    pictures: list[str] = []
    await slider.focus()
    for key in ("Home", "ArrowRight", "End", "Home"):
        await slider.press(key)
        pictures.append(await picture.first.evaluate("picture => picture.outerHTML"))
    there, back = pictures[0], pictures[-1]
    return there == back and pictures[1] != there and pictures[2] != there
