import re
import runpy
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest
import torch

from ewc_lib.figures import GREY, style
from ewc_lib.figures._colors import on_page


@pytest.fixture(autouse=True)
def restore_style():
    mpl.use("agg")
    with mpl.rc_context():
        yield
    plt.close("all")


def test_importing_changes_no_setting():
    mpl.rcdefaults()
    before = dict(mpl.rcParams)
    runpy.run_path(style.__file__)
    assert dict(mpl.rcParams) == before


def test_style_makes_figures_transparent_and_text_grey():
    style.use_style()
    assert mpl.rcParams["savefig.facecolor"] == mpl.rcParams["axes.facecolor"] == "none"
    assert mpl.rcParams["text.color"] == mpl.rcParams["xtick.color"] == GREY


def contrast(one, other):
    def luminance(color):
        rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]

    dark, light = sorted(luminance(mpl.colors.to_rgb(c)) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


SHEET = (style.REPOSITORY / "book" / "_static" / "figures.css").read_text("utf-8")
PAGES = {"light": "#ffffff", "dark": "#121212"}


@pytest.mark.parametrize("page", PAGES.values())
def test_grey_can_be_read_on_light_and_dark_pages(page):
    assert contrast(GREY, page) > 4.0


@pytest.mark.parametrize("theme", PAGES)
def test_every_colour_of_the_style_can_be_seen_on_the_pages_of_the_book(theme):
    rule = SHEET.partition(f'[data-theme="{theme}"] .ewc-figure {{')[2].partition("}")[0]
    chosen = dict(re.findall(r"(--ewc-\w+): (#\w+);", rule))
    assert chosen
    style.use_style()
    for color in [*mpl.rcParams["axes.prop_cycle"].by_key()["color"], GREY]:
        css = on_page(mpl.colors.to_hex(color), is_text=False)
        name, default = re.fullmatch(r"var\((.*),(.*)\)", css).groups()
        assert contrast(chosen.get(name, default), PAGES[theme]) >= 3


def test_a_figure_is_a_picture_with_a_name_and_one_window_for_each_panel():
    style.use_style()
    figure, _ = plt.subplots(1, 3)
    root = ElementTree.fromstring(style.drawing(figure))
    assert (root.get("role"), root.get("aria-label")) == ("img", "Figure")
    assert [child.get("aria-hidden") for child in root] == ["true"] * 3


def test_the_same_figure_gives_the_same_part_of_a_page_and_another_one_shares_no_identity():
    def draw(y):
        figure, axes = plt.subplots()
        axes.plot([0, y], "o")
        return style.drawing(figure)

    assert draw(1) == draw(1)
    one, other = (set(re.findall(r' id="([^"]*)"', draw(y))) for y in (1, 2))
    assert one
    assert not one & other


def test_a_notebook_shows_a_figure_on_its_page_and_as_a_picture_elsewhere():
    code = """
import matplotlib.pyplot as plt
from ewc_lib.figures import use_style
use_style()
figure, axes = plt.subplots()
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert {"text/html", "image/png", "text/plain"} == set(output.data)
    assert output.data["text/html"].startswith('<div class="ewc-figure" role="img"')


@pytest.mark.parametrize("probability", [0.5, 0.95])
def test_the_ellipse_holds_the_given_share_of_a_gaussian(probability):
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    centre = torch.tensor([1.0, -2.0], dtype=torch.float64)
    _, axes = plt.subplots()
    style.ellipse(axes, centre, covariance, probability)
    outline = mpl.path.Path(torch.tensor(axes.lines[0].get_xydata()))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    points = centre + noise @ torch.linalg.cholesky(covariance).mT
    assert outline.contains_points(points).mean() == pytest.approx(probability, abs=0.01)


SHOWN = {"a": (0.5, 0.01), "b": (0.9, 0.02)}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "REPOSITORY", tmp_path)
    monkeypatch.delenv("EWC_FIGURES", raising=False)
    return tmp_path


@pytest.fixture
def written(repository, monkeypatch):
    figure, _ = plt.subplots()
    with monkeypatch.context() as asked:
        asked.setenv("EWC_FIGURES", "book/figures")
        style.save(figure, "result", SHOWN)
    return figure


def test_save_writes_only_where_the_build_asks_for_it(repository, monkeypatch):
    figure, _ = plt.subplots()
    style.save(figure, "result", SHOWN)
    assert not list(repository.iterdir())
    monkeypatch.setenv("EWC_FIGURES", str(repository / "elsewhere"))
    style.save(figure, "result", SHOWN)
    assert (repository / "elsewhere" / "result.png").read_bytes().startswith(b"\x89PNG")
    page = (repository / "elsewhere" / "result.html").read_text("utf-8")
    assert page == style.drawing(figure) + "\n"


def test_a_figure_with_the_same_numbers_is_current_and_not_written_again(repository, written):
    before = (repository / "book" / "figures" / "result.png").read_bytes()
    written.gca().plot([0, 1])
    style.save(written, "result", {"a": (0.515, 0.02), "b": (0.87, 0.02)})
    assert (repository / "book" / "figures" / "result.png").read_bytes() == before


@pytest.mark.parametrize(
    ("numbers", "stale"),
    [
        ({**SHOWN, "a": (0.53, 0.5)}, "['a']"),
        ({**SHOWN, "b": (float("nan"), 0.02)}, "['b']"),
        ({"a": (0.5, 0.01)}, "['b']"),
        ({**SHOWN, "c": (0.5, 0.01)}, "['c']"),
    ],
)
def test_a_figure_that_shows_other_numbers_is_stale(written, numbers, stale):
    with pytest.raises(ValueError, match="run `make figures`") as problem:
        style.save(written, "result", numbers)
    assert stale in str(problem.value)
