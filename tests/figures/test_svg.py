import re
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from ewc_lib.figures import GREY
from ewc_lib.figures._svg import ID, identify
from ewc_lib.figures._svg import inline as inline_windows

WHOLE = [(0.0, 338.4)]


def inline(figure, prefix, windows=WHOLE):
    return inline_windows(figure, prefix, windows)


def draw(n=40):
    figure, axes = plt.subplots()
    axes.scatter(range(n), range(n), s=5, alpha=0.5)
    axes.plot([0, n], [0, 100], "--", color="#d55e00")
    axes.set(xlim=(0, n - 7), xlabel="<x> & θ₁", ylabel="two words")
    return figure


def elements(markup, tag):
    return ElementTree.fromstring(markup).iter("{http://www.w3.org/2000/svg}" + tag)


def test_the_drawing_is_well_formed_and_takes_what_width_the_page_has():
    root = ElementTree.fromstring(inline(draw(), "a"))
    assert root.get("viewBox") == "0 0 338.4 230.4"
    assert root.get("width") is root.get("height") is None
    assert "flex:338.4 1 338.4px;min-width:0;max-width:474px" in root.get("style")


def test_each_window_shows_its_part_of_one_drawing():
    markup = inline(draw(), "a", [(0.0, 200.0), (200.0, 138.4)])
    first, second = ElementTree.fromstring(f"<div>{markup}</div>")
    assert [svg.get("viewBox") for svg in (first, second)] == [
        "0 0 200 230.4",
        "200 0 138.4 230.4",
    ]
    assert len(first[0]) > 1
    assert second[0].get("href") == "#" + first[0].get("id")
    assert len(second) == 1


def test_every_identity_is_used_and_every_reference_leads_to_one():
    markup = inline(draw(), "a")
    whole, *identities = re.findall(r' id="([^"]*)"', markup)
    assert whole == "a-all"
    assert len(identities) == len(set(identities))
    assert set(identities) == set(re.findall(r'(?:url\(|")#(a\d+)', markup))
    assert len(identities) >= 3  # the marker, a tick and the frame that cuts off what is outside


def test_two_drawings_on_one_page_share_no_identity():
    one, other = (set(re.findall(r' id="([^"]*)"', inline(draw(), prefix))) for prefix in "ab")
    assert one
    assert not one & other


def test_no_style_reaches_beyond_the_drawing():
    assert not list(elements(inline(draw(), "a"), "style"))


def test_the_text_is_text_in_the_font_and_the_colour_of_the_page():
    texts = {e.text: e.get("style") for e in elements(inline(draw(), "a"), "text")}
    assert {"<x> & θ₁", "two words"} <= set(texts)
    for style in texts.values():
        assert "fill:currentColor" in style
        assert "font-family:inherit" in style


def test_lines_take_the_colours_that_the_page_gives_them():
    markup = inline(draw(), "a")
    lines = re.findall(r"stroke:([^;\"]*)", markup)
    assert {f"var(--ewc-grey,{GREY})", "var(--ewc-3,#d55e00)"} <= set(lines)
    assert set(re.findall(r"fill:([^;\"]*)", markup)) >= {"currentColor", "var(--ewc-0,#0173b2)"}


def test_a_white_line_is_a_gap_and_white_text_stays_white():
    figure, axes = plt.subplots()
    axes.bar([0, 1], [1, 1], edgecolor="white")
    axes.text(0, 0.5, "on a bar", color="white")
    markup = inline(figure, "a")
    assert "stroke:var(--ewc-ground,#ffffff)" in markup
    (style,) = [e.get("style") for e in elements(markup, "text") if e.text == "on a bar"]
    assert "fill:#ffffff" in style


def test_the_name_of_a_line_takes_the_colour_that_the_page_gives_the_line():
    figure, axes = plt.subplots()
    axes.text(0, 0.5, "a name", color="C0")
    (style,) = [e.get("style") for e in elements(inline(figure, "a"), "text") if e.text == "a name"]
    assert "fill:var(--ewc-0," in style


@pytest.mark.parametrize("black", ["black", "k"])
def test_black_takes_the_text_colour_of_the_page(black):
    figure, axes = plt.subplots()
    axes.plot([0, 1], color=black, marker="o")
    markup = inline(figure, "a")
    assert mpl.colors.to_hex(black) not in markup
    root = ElementTree.fromstring(markup)
    assert "fill:currentColor" in root.get("style")  # where matplotlib leaves black out
    assert "stroke:currentColor" in markup


def test_a_colour_that_is_not_of_the_style_stays():
    figure, axes = plt.subplots()
    axes.plot([0, 1], color="#123456")
    assert "stroke:#123456" in inline(figure, "a")


@pytest.mark.parametrize(
    ("formula", "runs"),
    [
        (r"$\lambda$ strength", ["λ", " strength"]),
        (r"$\log\ L(\theta) = 3$", ["log", "L", "(", "θ", ")", "=", "3"]),
    ],
)
def test_formulas_are_words_in_the_order_of_reading(formula, runs):
    figure, axes = plt.subplots()
    axes.set(xlabel=formula, xticks=[], yticks=[])
    letters = sorted(elements(inline(figure, "a"), "tspan"), key=lambda e: float(e.get("x")))
    assert [letter.text.replace("\xa0", " ") for letter in letters] == runs


def test_pixels_stay_sharp_and_are_stored_once():
    figure, axes = plt.subplots()
    axes.imshow([[0, 1], [2, 3]])
    (image,) = elements(inline(figure, "a"), "image")
    assert image.get("style") == "image-rendering:pixelated"
    assert len(image.get("href")) < 300


def test_what_already_has_the_prefix_keeps_its_identity():
    figure, axes = plt.subplots()
    axes.plot([0, 1])[0].set_gid("a-line")
    assert 'id="a-line"' in inline(figure, "a")


def test_an_identity_depends_on_the_content_alone():
    one, again, other = (identify(f"{ID} {text} {ID}-b") for text in ("x", "x", "y"))
    assert one == again
    name, _, second = one.split()
    assert second == f"{name}-b"
    assert name not in other


def test_markers_stay_where_they_were():
    figure = draw()
    figure.set_layout_engine("none")
    drawn = {(float(e.get("x")), float(e.get("y"))) for e in elements(inline(figure, "a"), "use")}
    points = figure.axes[0].transData.transform([(k, k) for k in range(34)]) * 72 / figure.dpi
    for x, y in points:
        assert min(abs(x - u) + abs(230.4 - y - v) for u, v in drawn) < 0.11


def test_a_scattered_point_costs_less_than_fifty_bytes():
    few, many = (len(inline(draw(n), "s1234567ff0-")) for n in (100, 600))
    assert (many - few) / 500 < 50


def test_the_same_figure_gives_the_same_drawing():
    assert inline(draw(), "a") == inline(draw(), "a")
