"""Alternative texts on figures that a page holds as SVG."""

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document
from drawings import NameDrawings, ShowDrawings

from ewc_lib.figures import drawing


def output(html, **picture):
    """Return a document with the bundle that MyST-NB makes of the output of a cell."""
    document = new_document("page")
    image = nodes.container("", nodes.image(uri="picture.png", **picture))
    page = nodes.container("", nodes.raw("", html, format="html", classes=["text_html"]))
    document += nodes.container("", page, image)
    return document


@pytest.fixture(scope="module")
def html():
    mpl.use("agg")
    figure, _ = plt.subplots()
    yield drawing(figure)
    plt.close(figure)


def test_a_drawing_gets_the_alternative_text_of_its_picture(html):
    document = output(html, alt='A "line" & <more>.')
    NameDrawings(document).run()
    (named,) = document.findall(nodes.raw)
    page = BeautifulSoup(named.astext(), "html.parser")
    assert page.select_one("[role=img]")["aria-label"] == 'A "line" & <more>.'
    assert page.svg == BeautifulSoup(html, "html.parser").svg


def test_a_drawing_without_an_alternative_text_is_a_warning(html, caplog):
    document = output(html)
    NameDrawings(document).run()
    assert "no alternative text" in caplog.text


def test_other_parts_of_a_page_stay(html):
    document = output("<p>Other.</p>", alt="A line.")
    before = document.pformat()
    NameDrawings(document).run()
    assert document.pformat() == before


@pytest.mark.parametrize("name", ["result", "other"])
def test_a_picture_gives_way_to_the_drawing_beside_it_and_leaves_it_its_text(html, name, tmp_path):
    (tmp_path / "result.html").write_text(html)
    document = new_document("page")
    config = SimpleNamespace(locale_dirs=[], language="en")
    document.settings.env = SimpleNamespace(srcdir=tmp_path, config=config)
    document += nodes.figure("", nodes.image(uri=f"{name}.png", alt='A "line".'))
    ShowDrawings(document).run()
    shown = [BeautifulSoup(raw.astext(), "html.parser") for raw in document.findall(nodes.raw)]
    assert [page.div["aria-label"] for page in shown] == ['A "line".'] * (name == "result")
    assert len(list(document.findall(nodes.image))) == (name == "other")
