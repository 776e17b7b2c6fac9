import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup

from ewc_lib.figures import _interactive, slider


def draw(k, size=(4, 3), color="C0"):
    figure, axes = plt.subplots(figsize=size)
    axes.plot([0, 1], [0, k], lw=4, color=color)
    axes.set(xlim=(0, 1), ylim=(0, 3))
    return figure


def make(n=3, **options):
    frames = {f"<{k}>": draw(k) for k in range(n)}
    texts = [f'Slope "{k}" & no more.' for k in range(n)]
    return slider(frames, texts, **{"name": "slope s", "alt": "A <line>.", **options})


def parse(figure):
    return BeautifulSoup(figure.html, "html.parser")


class Balanced(HTMLParser):
    """Raises if an element is closed that is not open, or closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_figure_is_well_formed_as_html_and_as_xml():
    markup = make(background=draw(2)).html
    parser = Balanced()
    parser.feed(markup)
    parser.close()
    assert parser.open == []
    assert parser.seen.count("svg") == 4
    assert ElementTree.fromstring(markup).get("class") == "ewc-figure"


def test_frames_and_background_are_cut_into_the_same_panels():
    def pair(label):
        figure, axes = plt.subplots(
            1, 2, figsize=(6, 3), layout="none", gridspec_kw={"wspace": 0.8}
        )
        axes[1].set_ylabel(label)
        return figure

    frames = {label: pair(label) for label in ("a", "a\nb\nc")}
    page = parse(slider(frames, ["One.", "Two."], name="n", alt="A.", background=pair("")))
    views = [[svg["viewbox"] for svg in row.select("svg")] for row in page.select("[style*=wrap]")]
    assert views[0] == views[1] == views[2]
    assert len(views[0]) == 2


def test_one_frame_is_shown_and_the_background_always():
    page = parse(make(background=draw(2), start=1))
    assert [frame.has_attr("hidden") for frame in page.select(".frame")] == [True, False, True]
    layers = page.select_one("[role=img]").find_all("div", recursive=False)
    assert len(layers) == 4
    assert not layers[0].has_attr("hidden")


def test_the_control_is_the_range_input_of_the_browser():
    control = parse(make(start=2)).input
    wanted = {"type": "range", "min": "0", "max": "2", "step": "1", "value": "2"}
    assert {name: control[name] for name in wanted} == wanted
    assert not control.has_attr("tabindex")
    assert not control.has_attr("disabled")


def test_the_control_has_a_name_and_says_what_the_frame_shows():
    page = parse(make(start=1))
    assert page.find("label", attrs={"for": page.input["id"]}).text == "slope s"
    assert page.input["aria-valuetext"] == '<1>. Slope "1" & no more.'


def test_the_value_stands_beside_the_label_and_the_text_repeats_neither():
    page = parse(make(start=1))
    assert page.find("label").parent.text == "slope s = <1>"
    assert page.p.text == 'Slope "1" & no more.'
    assert page.text.count("slope s") == 1


def test_value_and_text_of_the_frame_describe_the_picture():
    page = parse(make(start=1))
    picture = page.select_one("[role=img]")
    assert picture["aria-label"] == "A <line>."
    described = [page.find(id=part).text for part in picture["aria-describedby"].split()]
    assert described == ["slope s = <1>", 'Slope "1" & no more.']


def test_every_frame_has_its_text():
    readings = json.loads(parse(make(4)).find("script", type="application/json").string)
    assert [reading["value"] for reading in readings] == ["<0>", "<1>", "<2>", "<3>"]
    assert readings[3]["text"] == 'Slope "3" & no more.'


def test_a_negative_number_has_a_minus_sign_and_a_hyphen_stays():
    page = parse(slider({"-1": draw(1)}, ["log-likelihood -2.5 at 3-4."], name="n", alt="A line."))
    assert page.b.text == "−1"
    assert page.p.text == "log-likelihood −2.5 at 3-4."


def test_a_sign_of_per_cent_stays_beside_its_number():
    page = parse(slider({"20%": draw(1)}, ["9% is as % says."], name="n", alt="A line."))
    assert page.b.text == "20\N{NO-BREAK SPACE}%"
    assert page.p.text == "9\N{NO-BREAK SPACE}% is as % says."


def test_a_text_cannot_end_the_script():
    frames, texts = {"</script>": draw(1)}, ["<!-- </script> <script>"]
    markup = slider(frames, texts, name="n", alt="A line.").html
    parser = Balanced()
    parser.feed(markup)
    assert parser.open == []
    assert parser.seen.count("script") == 2


def test_without_scripts_there_is_a_frame_and_no_dead_control():
    page = parse(make())
    assert page.input.has_attr("hidden")
    assert page.b.find_parent(hidden=True) is None
    assert page.select_one(".frame:not([hidden])") is not None


def test_nothing_is_loaded_from_elsewhere():
    markup = make(background=draw(2)).html
    assert not re.findall(r"""(?:src|action|data|@import|import\()\s*=?\s*["']?https?:""", markup)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', markup))
    assert set(re.findall(r"https?://[^\s\"<]+", markup)) == {"http://www.w3.org/2000/svg"}


def test_the_same_figures_give_the_same_page():
    assert make().html == make().html
    assert make().png == make().png


def test_other_figures_on_the_same_page_share_no_identity():
    pages = parse(make()), parse(make(start=1)), parse(make(alt="Another line."))
    identities = [element["id"] for page in pages for element in page.select("[id]")]
    assert len(identities) == len(set(identities)) > 9


def test_every_reference_leads_to_something_inside():
    page = parse(make(background=draw(2)))
    identities = {element["id"] for element in page.select("[id]")}
    references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', str(page)))
    assert references
    assert references <= identities


def test_paper_gets_the_first_frame_over_the_background():
    plain = plt.imread(BytesIO(make(start=1).png))
    both = plt.imread(BytesIO(make(start=1, background=draw(2, color="C2")).png))
    assert plain.shape == both.shape == (3 * 150, 4 * 150, 4)

    def pixels(picture, color):
        close = np.abs(picture[..., :3] - mpl.colors.to_rgb(color)).max(-1) < 0.05
        return int((close & (picture[..., 3] > 0.9)).sum())

    assert pixels(plain, "C0") > 1000
    assert pixels(both, "C0") == pytest.approx(pixels(plain, "C0"), rel=0.01)
    assert pixels(both, "C2") > 1000
    assert pixels(plain, "C2") == 0


def test_notebooks_get_page_picture_and_text():
    figure = make()
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["text/html"] == figure.html
    assert base64.b64decode(bundle["image/png"]) == figure.png
    assert figure.png.startswith(b"\x89PNG")
    assert bundle["text/plain"] == "Interactive()"


def test_all_figures_are_closed():
    make(background=draw(2))
    assert not plt.get_fignums()


@pytest.mark.parametrize(("n", "start"), [(0, 0), (2, 2), (2, -1)])
def test_a_start_that_is_no_frame_is_refused(n, start):
    with pytest.raises(ValueError, match=f"start={start} is not one of the {n} frames"):
        make(n, start=start)


@pytest.mark.parametrize("texts", [["one"], ["one", " "], ["one", "two", "three"]])
def test_a_frame_without_its_text_is_refused(texts):
    with pytest.raises(ValueError, match="2 frames need as many texts"):
        slider({"a": draw(1), "b": draw(2)}, texts, name="n", alt="A line.")


def test_figures_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="one size"):
        make(background=draw(1, size=(5, 3)))


def test_a_figure_that_is_too_heavy_is_refused(monkeypatch):
    weight = len(make().html.encode())
    monkeypatch.setattr(_interactive, "MAX_BYTES", weight)
    make()
    monkeypatch.setattr(_interactive, "MAX_BYTES", weight - 1)
    with pytest.raises(ValueError, match=f"weighs {weight} bytes"):
        make()
