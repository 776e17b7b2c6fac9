import asyncio
import json
import math
import re
from contextlib import asynccontextmanager
from io import BytesIO
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from bs4 import BeautifulSoup

from ewc_lib.figures import _interactive, draggable, use_style

pytest.importorskip("playwright", reason="NOTHING DRAGGED IN A BROWSER: install playwright")
from tests.book.visits import find_browser, open_browser

X, Y = torch.linspace(0, 4, 5), torch.tensor([1.0, 10.0, 100.0])
SQUARE = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 0]])


def make(text=lambda p, q: f"Product <{p * q:.0f}>.", at=None, **options):
    _, (other, axes) = plt.subplots(1, 2, figsize=(6, 3))
    axes.set(xlim=(-1, 5), ylim=(0.5, 200), yscale="log")
    other.set(xlim=(0, 9), ylim=(0, 200))
    (line,) = other.plot([], [], color="C2")
    at = at or (lambda p, q: SQUARE * torch.tensor([p + 1, q]))
    given = {"names": ("a", 'b "&"'), "alt": "A <square>.", "start": (1, 2), **options}
    return draggable(axes, X, Y, text, lines={line: at}, **given)


@pytest.fixture(scope="module")
def made():
    mpl.use("agg")
    with mpl.rc_context():
        use_style()
        return make()


@pytest.fixture(scope="module")
def page(made):
    return BeautifulSoup(made.html, "html.parser")


def data(page):
    return json.loads(page.find("script", type="application/json").string)


def test_the_figure_is_well_formed(made):
    assert ElementTree.fromstring(made.html).get("class") == "ewc-figure"


def test_each_parameter_has_a_control_with_its_name_that_says_value_and_text(page):
    assert [label.text for label in page.select("label")] == ["a", 'b "&"']
    wanted = [(5, "1", "1"), (3, "2", "100")]
    for label, (n, start, value) in zip(page.select("label"), wanted, strict=True):
        control = page.find(id=label["for"])
        assert (control["type"], control["max"], control["value"]) == ("range", str(n - 1), start)
        assert control["aria-valuetext"] == f"{value}. Product <100>."


def test_each_value_stands_beside_its_label_and_the_text_repeats_neither(page):
    assert [label.parent.text for label in page.select("label")] == ["a = 1", 'b "&" = 100']
    assert page.p.text == "Product <100>."


def test_values_and_text_describe_the_picture(page):
    parts = page.select_one("[role=img]")["aria-describedby"].split()
    described = [page.find(id=part).text for part in parts]
    assert described == ["a = 1", 'b "&" = 100', "Product <100>."]


def test_a_negative_value_has_a_minus_sign():
    _, axes = plt.subplots()
    axes.set(xlim=(-3, 0), ylim=(0, 200))
    made = draggable(axes, X - 3, Y, lambda p, q: f"{p:g}.", names=("a", "b"), alt="A point.")
    page = BeautifulSoup(made.html, "html.parser")
    assert (page.b.text, page.p.text) == ("−3", "−3.")


def test_without_scripts_there_is_the_start_and_no_dead_control(page):
    assert [value.text for value in page.select("b")] == ["1", "100"]
    assert all(control.has_attr("hidden") for control in page.select("input"))
    assert all(not value.find_parent(hidden=True) for value in page.select("b"))


def test_every_place_has_the_text_that_the_cell_computed(page):
    wanted = [f"Product <{p * q:.0f}>." for p in X.tolist() for q in Y.tolist()]
    assert data(page)["texts"] == wanted


def test_places_and_lines_stand_where_matplotlib_puts_them(page):
    places = data(page)
    assert torch.tensor(places["x"]).diff().numpy() == pytest.approx(
        [places["x"][1] - places["x"][0]] * 4, abs=0.11
    )
    steps = torch.tensor(places["y"]).diff()  # equal on a logarithmic axis
    assert steps[0] == pytest.approx(float(steps[1]), abs=0.11)
    assert steps[0] < 0
    start = page.find(id=re.compile("-line0$")).path["d"]
    drawn = [float(number) for number in re.findall(r"[\d.]+", start)]
    given = [float(number) for number in re.findall(r"[\d.]+", places["lines"][0][5])]
    assert given == pytest.approx(drawn, abs=0.1)


def test_paper_gets_the_start(made):
    picture = torch.tensor(plt.imread(BytesIO(made.png)))
    red = (picture[..., :3] - torch.tensor(mpl.colors.to_rgb("#d55e00"))).abs().amax(-1) < 0.05
    place = (red & (picture[..., 3] > 0.9)).nonzero().double().mean(0)
    assert 100 < int(red.sum()) < 600
    assert place[1] > 450  # in the right panel


def test_the_same_figure_gives_the_same_page(made):
    assert make().html == made.html


def test_the_figure_is_closed(made):
    make()
    assert not plt.get_fignums()


@pytest.mark.parametrize("start", [(5, 0), (0, 3), (-1, 0)])
def test_a_start_beside_the_grid_is_refused(start):
    with pytest.raises(ValueError, match="not on the grid of 5 × 3 points"):
        make(start=start)


def test_a_place_without_a_text_is_refused():
    with pytest.raises(ValueError, match=r"no text at \(2.0, 10.0\)"):
        make(text=lambda p, q: " " if (p, q) == (2, 10) else "Some.")


def test_a_line_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="leaves the finite numbers"):
        make(at=lambda p, q: SQUARE * (math.inf if p == 3 else 1.0))


def test_a_figure_that_is_too_heavy_is_refused(monkeypatch):
    monkeypatch.setattr(_interactive, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000: draw less"):
        make()


@asynccontextmanager
async def opened(made, width=390):
    """Open the figure on a phone, above and below which there is more to read."""
    async with open_browser() as browser:
        context = await browser.new_context(
            viewport={"width": width, "height": 700}, has_touch=True
        )
        tab = await context.new_page()
        rest = '<p style="height:1500px"></p>'
        await tab.set_content(f"<!doctype html><body>{rest[:-4]}</p>{made.html}{rest}</body>")
        await tab.locator("[role=img]").scroll_into_view_if_needed()
        yield tab


async def text(tab):
    """Return what stands below the figure: the values beside their labels, and the text."""
    values = await tab.locator("[id$=-value]").all_inner_texts()
    return f"{', '.join(values)}. {await tab.locator('p[id]').inner_text()}"


async def where(tab, column, row):
    """Return where on the screen a place of the grid is."""
    find = """([column, row]) => {
      const data = JSON.parse(document.querySelector("script").textContent);
      const svg = [...document.querySelectorAll("svg")].pop();
      const at = new DOMPoint(data.x[column], data.y[row]).matrixTransform(svg.getScreenCTM());
      return [at.x, at.y];
    }"""
    return await tab.evaluate(find, [column, row])


def in_browser(scenario, made, **options):
    async def run():
        async with opened(made, **options) as tab:
            return await scenario(tab)

    return asyncio.run(run())


browser = pytest.mark.skipif(not find_browser(), reason="NOTHING DRAGGED: install Chromium")


@browser
@pytest.mark.parametrize("width", [390, 1300])
def test_a_mouse_drags_the_point_and_the_lines_follow(made, width):
    async def scenario(tab):
        await tab.mouse.move(*await where(tab, 1, 2))
        await tab.mouse.down()
        await tab.mouse.move(*await where(tab, 3, 1), steps=3)
        during = await text(tab)
        await tab.mouse.up()
        await tab.mouse.move(*await where(tab, 0, 0))
        drawn = await tab.locator("[id$=-line0] path").get_attribute("d")
        place = dict(zip("xy", await where(tab, 3, 1), strict=True))
        seen = await tab.screenshot(clip={**place, "width": 1, "height": 1})
        return during, await text(tab), drawn, plt.imread(BytesIO(seen))[0, 0, :3]

    during, after, drawn, color = in_browser(scenario, made, width=width)
    assert during == after == 'a = 3, b "&" = 10. Product <30>.'
    assert drawn == data(BeautifulSoup(made.html, "html.parser"))["lines"][0][3 * 3 + 1]
    assert color == pytest.approx(mpl.colors.to_rgb("#d55e00"), abs=0.02)


@browser
def test_arrow_keys_move_the_point_and_the_controls_say_where_it_is(made):
    async def scenario(tab):
        x, y = await tab.locator("input").all()
        await x.press("ArrowRight")
        await y.press("Home")
        return await text(tab), await x.get_attribute("aria-valuetext")

    shown, said = in_browser(scenario, made)
    assert shown == 'a = 2, b "&" = 1. Product <2>.'
    assert said == "2. Product <2>."


@browser
def test_a_tap_moves_the_point_and_one_beside_the_grid_does_not(made):
    async def scenario(tab):
        await tab.touchscreen.tap(*await where(tab, 4, 0))
        tapped = await text(tab)
        box = await tab.locator("svg").first.bounding_box()
        await tab.touchscreen.tap(box["x"] + 60, box["y"] + 60)
        return tapped, await text(tab)

    assert in_browser(scenario, made) == ('a = 4, b "&" = 1. Product <4>.',) * 2


async def swipe(tab, start, end):
    session = await tab.context.new_cdp_session(tab)
    points = [[a + (b - a) * k / 8 for a, b in zip(start, end, strict=True)] for k in range(9)]
    for kind, point in [("Start", points[0]), *(("Move", p) for p in points[1:]), ("End", None)]:
        touches = [] if point is None else [{"x": point[0], "y": point[1]}]
        event = {"type": f"touch{kind}", "touchPoints": touches}
        await session.send("Input.dispatchTouchEvent", event)
    await tab.wait_for_timeout(200)
    return await tab.evaluate("scrollY")


@browser
def test_a_finger_on_the_point_drags_it_and_one_beside_it_scrolls_the_page(made):
    async def scenario(tab):
        before = await tab.evaluate("scrollY")
        dragged = await swipe(tab, await where(tab, 1, 2), await where(tab, 1, 0))
        shown = await text(tab)
        scrolled = await swipe(tab, await where(tab, 3, 1), [200, 150])
        return dragged - before, shown, scrolled - before, await text(tab)

    dragged, shown, scrolled, after = in_browser(scenario, made)
    assert dragged == 0
    assert shown == after == 'a = 1, b "&" = 1. Product <1>.'
    assert scrolled != 0
