"""Visits to built pages in a real browser, with the network off."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, Error, Locator, Page, async_playwright

THEMES = ("light", "dark")
WIDTHS = (1300, 375)
LIMIT = 300  # seconds for one visit, on a machine that is busy with other things
CHECKS = Path(__file__).with_name("checks.js")
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")


@dataclass
class Visit:
    """What a reader with one theme and one width of the window meets on a page."""

    page: Path
    theme: str = "light"
    width: int = 1300
    loaded: set[Path] = field(default_factory=set)
    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    untypeset: list[str] = field(default_factory=list)
    too_wide: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    dead_sliders: list[str] = field(default_factory=list)
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


@asynccontextmanager
async def open_page(browser: Browser, visit: Visit) -> AsyncIterator[Page]:
    """Open the page of a visit as its reader does, and note what it loads and what goes wrong."""
    context = await browser.new_context(
        offline=True,
        color_scheme=visit.theme,  # type: ignore[arg-type]
        viewport={"width": visit.width, "height": 900},
    )
    context.set_default_timeout(LIMIT * 1000)
    await context.add_init_script(path=CHECKS)
    page = await context.new_page()
    page.on("request", lambda request: _note(request.url, visit))
    page.on("requestfailed", lambda request: visit.errors.append(f"not loaded: {request.url}"))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("console", lambda m: visit.errors.append(m.text) if m.type == "error" else None)
    try:
        await page.goto(visit.page.as_uri())
        await page.evaluate("window.MathJax?.startup?.promise")
        yield page
    finally:
        await context.close()


def _note(url: str, visit: Visit) -> None:
    address = urlsplit(url)
    if address.scheme == "file":
        visit.loaded.add(Path(unquote(address.path)))
    elif address.scheme not in ("data", "blob"):
        visit.external.append(url)


def visit_all(visits: Iterable[Visit]) -> list[Visit]:
    """Make all visits, a few at a time, in one browser."""
    return asyncio.run(_visit_all(list(visits)))


async def _visit_all(visits: list[Visit]) -> list[Visit]:
    tabs = asyncio.Semaphore(1 + (os.cpu_count() or 1))

    async def in_turn(visit: Visit) -> None:
        async with tabs:
            try:
                await asyncio.wait_for(_look_at(browser, visit), LIMIT)
            except (Error, TimeoutError) as error:
                visit.errors.append(f"the visit failed: {error!r}")

    async with open_browser() as browser:
        await asyncio.gather(*map(in_turn, visits))
    return visits


async def _look_at(browser: Browser, visit: Visit) -> None:
    async with open_page(browser, visit) as page:
        shown = await page.evaluate("document.documentElement.dataset.theme")
        if shown != visit.theme:
            visit.errors.append(f"the page is {shown}, not {visit.theme}")
        visit.untypeset = await page.evaluate("checks.untypeset()")
        visit.too_wide = await page.evaluate("checks.tooWide()")
        for slider in await page.locator("input[type=range]").all():
            visit.sliders += 1
            if not await _obeys_the_keyboard(slider):
                visit.dead_sliders.append(await slider.evaluate("slider => slider.outerHTML"))
        await page.evaluate(AXE_SCRIPT)
        await page.evaluate("checks.thin()")
        visit.violations = await page.evaluate("checks.violations()")


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
