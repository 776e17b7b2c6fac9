"""Long tables are sorted by the buttons in their headers, by the keyboard alone."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="NO TABLES CHECKED IN A BROWSER: install playwright")

from tests.book.visits import find_browser, open_browser, open_tab

if not find_browser():
    pytest.skip("NO TABLES CHECKED IN A BROWSER: install Chromium", allow_module_level=True)
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

SCRIPT = Path(__file__).parents[2] / "book" / "_static" / "tables.js"
MINUS = "−"
VALUES = [
    "10",
    "9.5 ± 0.1",
    f"{MINUS}3",
    f"2 × 10<sup>{MINUS}3</sup>",
    "1,234",
    "97 %",
    "0",
    "–",
    "b",
]
SORTED = [MINUS + "3", "0", f"2 × 10{MINUS}3", "9.5 ± 0.1", "10", "97 %", "1,234", "–", "b"]


def table(rows: list[str], kind: str = "") -> str:
    body = "".join(f"<tr><td>{number}</td><td>{row}</td></tr>" for number, row in enumerate(rows))
    head = "<thead><tr><th><p>n</p></th><th><p>value</p></th></tr></thead>"
    return f'<article><table class="table {kind}">{head}<tbody>{body}</tbody></table></article>'


async def press(rows: list[str], times: int, kind: str = "") -> tuple[list[str], str | None, int]:
    """Press the second header by the keyboard; return the column, its order and the buttons."""
    async with open_browser() as browser:
        tab = await open_tab(browser)
        await tab.set_content(f'<html lang="en"><body>{table(rows, kind)}</body></html>')
        await tab.add_script_tag(path=SCRIPT)
        buttons = tab.get_by_role("button")
        for _ in range(times):
            await buttons.nth(1).press("Enter")
        shown = await tab.locator("td:nth-child(2)").all_inner_texts()
        order = await tab.locator("th").nth(1).get_attribute("aria-sort")
        return shown, order, await buttons.count()


@pytest.mark.parametrize(
    ("times", "order", "expected"),
    [(0, None, None), (1, "ascending", SORTED), (2, "descending", SORTED[::-1]), (3, None, None)],
)
def test_a_header_sorts_upwards_then_downwards_then_as_written(
    times: int, order: str | None, expected: list[str] | None
) -> None:
    written = [value.replace("<sup>", "").replace("</sup>", "") for value in VALUES]
    assert asyncio.run(press(VALUES, times)) == (expected or written, order, 2)


def test_a_short_table_stays_as_it_is() -> None:
    assert asyncio.run(press(VALUES[:8], 0))[2] == 0


def test_a_table_to_be_read_in_its_order_stays_as_it_is() -> None:
    assert asyncio.run(press(VALUES, 0, "in-order"))[2] == 0
