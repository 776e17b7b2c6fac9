import re
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from ewc_lib.figures import GREY, use_style
from ewc_lib.figures._svg import inline


@pytest.fixture(autouse=True)
def style():
    mpl.use("agg")
    with mpl.rc_context():
        use_style()
        yield
    plt.close("all")


def draw(n=40):
    figure, axes = plt.subplots()
    axes.scatter(range(n), range(n), s=5, alpha=0.5)
    axes.plot([0, n], [0, 100], "--", color="#d55e00")
    axes.set(xlim=(0, n - 7), xlabel="<x> & θ₁", ylabel="two words")
    return figure


def elements(markup, tag):
    return ElementTree.fromstring(markup).iter("{http://www.w3.org/2000/svg}" + tag)


def test_the_drawing_is_well_formed_and_takes_the_width_of_the_page():
    root = ElementTree.fromstring(inline(draw(), "a"))
    assert root.get("viewBox") == "0 0 403.2 244.8"
    assert root.get("width") is root.get("height") is None
    assert "width:100%" in root.get("style")


def test_every_identity_is_used_and_every_reference_leads_to_one():
    markup = inline(draw(), "a")
    identities = re.findall(r' id="([^"]*)"', markup)
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


def test_grey_becomes_the_colour_of_the_page_and_other_colours_stay():
    markup = inline(draw(), "a")
    assert GREY not in markup
    assert "stroke:#d55e00" in markup


def test_markers_stay_where_they_were():
    figure = draw()
    figure.set_layout_engine("none")
    drawn = {(float(e.get("x")), float(e.get("y"))) for e in elements(inline(figure, "a"), "use")}
    points = figure.axes[0].transData.transform([(k, k) for k in range(34)]) * 72 / figure.dpi
    for x, y in points:
        assert min(abs(x - u) + abs(244.8 - y - v) for u, v in drawn) < 0.11


def test_a_scattered_point_costs_less_than_fifty_bytes():
    few, many = (len(inline(draw(n), "s1234567ff0-")) for n in (100, 600))
    assert (many - few) / 500 < 50


def test_the_same_figure_gives_the_same_drawing():
    assert inline(draw(), "a") == inline(draw(), "a")
