"""The repairs of the pages: each mends its defect and no more, once, and fails if needless."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
from pages import REPAIRS, THEBE
from sphinx.errors import ExtensionError

EXAMPLES = {
    "name_search_by_its_text": (
        '<button class="btn search-button-field" aria-label="Search">Search</button>',
        '<button class="btn search-button-field">Search</button>',
    ),
    "name_folds_by_their_text": (
        '<summary aria-label="Toggle hidden content"><span>Show code</span></summary>',
        "<summary><span>Show code</span></summary>",
    ),
    "name_folds_of_the_contents": (
        '<summary><span class="toctree-toggle"><i></i></span></summary>',
        '<summary aria-label="Pages below"><span class="toctree-toggle"><i></i></span></summary>',
    ),
    "name_the_contents_by_what_they_hold": (
        '<nav aria-label="Main"></nav><button title="Toggle secondary sidebar"></button>',
        '<nav aria-label="Contents of the book"></nav>'
        '<button title="Show or hide the contents of the page"></button>',
    ),
    "name_theme_switch_within": (
        '<button class="theme-switch-button a" aria-label="Color mode"><i></i></button>',
        '<button class="theme-switch-button a"><span class="visually-hidden">Color mode</span>'
        "<i></i></button>",
    ),
    "list_references_as_items": (
        '<div class="citation" role="doc-biblioentry">A</div>',
        '<div class="citation" role="listitem">A</div>',
    ),
    "set_parameters_in_lines": (
        '<dt>f(<dl>\n<dd><em class="sig-param">a</em>,</dd>\n<dd><em class="sig-param">b</em></dd>'
        "\n</dl>)</dt>",
        '<dt>f(\n<span class="sig-line"><em class="sig-param">a</em>,</span>\n'
        '<span class="sig-line"><em class="sig-param">b</em></span>\n)</dt>',
    ),
    "head_no_column_by_nothing": (
        '<th class="head"><p></p></th><th class="head">EWC</th>',
        '<td class="head"><p></p></td><th class="head">EWC</th>',
    ),
    "name_the_region_of_the_sidebar": (
        '<div id="pst-primary-sidebar" class="a"></div>',
        '<div id="pst-primary-sidebar" class="a" role="region" aria-label="Book"></div>',
    ),
    "drop_path_that_is_no_address": ('<meta property="og:url" content="book/a.html"/>', ""),
    "drop_dead_links_of_viewer": (
        '<i id="b"></i><a class="viewcode-back" href="page.html#a">[docs]</a>',
        '<i id="b"></i>',
    ),
    "drop_module_without_a_page": (
        '<ul><li><a href="a.html">a</a></li><li><a href="builtins.html">builtins</a></li></ul>',
        '<ul><li><a href="a.html">a</a></li></ul>',
    ),
    f"drop {THEBE[0]}": ('<script>const THEBE_JS_URL = "https://a.b"; f()</script>', ""),
    f"drop {THEBE[1]}": ('<script async src="_static/sphinx-thebe.js?v=1"></script>', ""),
    f"drop {THEBE[2]}": ('<script type="text/x-thebe-config">{"a": "<b>"}</script>', ""),
    f"drop {THEBE[3]}": ("<script>kernelName = 'python3'</script>", ""),
    f"drop {THEBE[4]}": ('<link rel="stylesheet" href="_static/sphinx-thebe.css"/>', ""),
}
# What looks like a defect and is none.
SOUND = """
<button class="btn other" aria-label="Menu">x</button><summary aria-label="Details">A</summary>
<dl class="simple"><dd>A</dd></dl><dl><dt>T</dt><dd><em class="sig-param">a</em></dd></dl><dl></dl>
<meta property="og:url" content="https://a.b/c.html"/><link rel="stylesheet" href="theme.css"/>
<a class="viewcode-back" href="page.html#b">[docs]</a><i id="b"></i>
<script src="_static/thebe-not.js"></script><script>f("a")</script>
"""
# What a careless writer would change.
DELICATE = r"""<!DOCTYPE html>
<html><head><script>if (a < b && c) { d("</p>" + '\(x\)') }</script><style>a > b { c: "&" }</style>
</head><body>
<pre>a  b
   <span class="w">   </span><span>
</span>	c &lt;d&gt; &amp;amp; </pre>
<p>&nbsp; &#8212; &eacute; &amp;lt; 中文 \(a &lt; b\) \[ x &amp; y \]   two  spaces<br>end</p>
<span class="a  b
c" title='"quoted" &amp; <this>' hidden>  </span> <i> </i>
<svg viewBox="0 0 1 1"><linearGradient id="g"/><path d="M0 0"/><text>a  b</text></svg>
<!-- a comment -- > --><input disabled value=""><textarea>
  a </textarea>
<script type="application/json">{"a": "&lt;\u00e9"}</script>
</body></html>
"""


class Events(HTMLParser):
    """What a parser of HTML meets, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.met: list[object] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.append((tag, {name: value or "" for name, value in attrs}))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in {"br", "input", "link", "meta"}:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self.met.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.met.append(data)

    def handle_comment(self, data: str) -> None:
        self.met.append(("comment", data))


def site(folder: Path, *bodies: str) -> Path:
    """Return a site with one page for each text, and with files that a build drops."""
    for name in ("mathjax/tex-a.js", "mathjax/tex-b.js", "a.js.map", "a-webpack-macros.html"):
        (folder / "_static" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "_static" / name).write_text("<summary aria-label='Toggle hidden content'>")
    for number, body in enumerate(bodies):
        (folder / ("page.html" if not number else f"page{number}.html")).write_text(body)
    return folder


def repaired(folder: Path, body: str) -> str:
    pages.repair(site(folder, body))
    return (folder / "page.html").read_text()


def finish(folder: Path, whole: bool = True, address: str = "", error: object = None) -> None:
    config = SimpleNamespace(ogp_site_url=address)
    app = SimpleNamespace(outdir=folder, config=config, extensions={"sphinx.ext.viewcode"})
    pages._finish(app, error, whole)


ALL = "".join(before for before, _ in EXAMPLES.values())


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_mends_its_defect_and_tells(name: str, tmp_path: Path) -> None:
    before, after = EXAMPLES[name]
    found = pages.repair(site(tmp_path, f"<p>{before}</p>"))
    assert (tmp_path / "page.html").read_text() == f"<p>{after}</p>"
    assert [repair for repair in REPAIRS if found[repair]] == [name]


def test_all_repairs_together_mend_every_defect(tmp_path: Path) -> None:
    assert repaired(tmp_path, ALL) == "".join(after for _, after in EXAMPLES.values())


def test_what_is_sound_is_left_byte_for_byte(tmp_path: Path) -> None:
    assert repaired(tmp_path, SOUND) == SOUND


def test_a_second_repair_finds_nothing_and_writes_nothing(tmp_path: Path) -> None:
    folder = site(tmp_path, ALL, SOUND)
    assert all(pages.repair(folder).values())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not any(pages.repair(folder).values())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_repair_leaves_all_else_on_the_page_as_it_was(tmp_path: Path) -> None:
    before, after = EXAMPLES["name_folds_by_their_text"]
    shown = repaired(tmp_path, DELICATE.replace("</body>", before + "</body>"))
    assert after in shown
    blank, *events = Events(shown.replace(after, "")).met  # the lines above the document
    assert blank.isspace()
    assert events == Events(DELICATE).met[1:]


def test_files_that_no_page_needs_are_dropped_and_others_kept(tmp_path: Path) -> None:
    pages.repair(site(tmp_path, '<script defer src="_static/mathjax/tex-b.js?v=1"></script>'))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"tex-b.js", "page.html"}


def test_a_build_passes_where_every_repair_is_needed_on_some_page(tmp_path: Path) -> None:
    finish(site(tmp_path, *(before for before, _ in EXAMPLES.values())))


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_that_no_page_needs_fails_the_build(name: str, tmp_path: Path) -> None:
    others = (before for other, (before, _) in EXAMPLES.items() if other != name)
    with pytest.raises(ExtensionError) as failure:
        finish(site(tmp_path, *others))
    assert str(failure.value) == f"no page needs these repairs: {name}"


def test_dropping_files_that_are_no_longer_there_fails_the_build(tmp_path: Path) -> None:
    site(tmp_path, ALL)
    (tmp_path / "_static" / "a.js.map").unlink()
    with pytest.raises(ExtensionError, match="repairs: maps, which"):
        finish(tmp_path)


def test_a_path_for_an_address_is_expected_only_where_the_address_is_unknown(
    tmp_path: Path,
) -> None:
    known = ALL.replace('content="book/a.html"', 'content="https://a.b/book/a.html"')
    finish(site(tmp_path / "known", known), address="https://a.b/")
    with pytest.raises(ExtensionError, match="repairs: drop_path_that_is_no_address"):
        finish(site(tmp_path / "unknown", known))


def test_a_build_of_a_part_repairs_and_does_not_complain(tmp_path: Path) -> None:
    before, after = EXAMPLES["name_folds_by_their_text"]
    finish(site(tmp_path, before), whole=False)
    assert (tmp_path / "page.html").read_text() == after


def test_a_build_that_failed_is_left_alone(tmp_path: Path) -> None:
    finish(site(tmp_path, ALL), error=ValueError())
    assert (tmp_path / "page.html").read_text() == ALL


def test_sphinx_fails_for_a_needless_repair_only_where_it_wrote_every_page(tmp_path: Path) -> None:
    (tmp_path / "index.rst").write_text("Title\n=====\n")
    build = [sys.executable, "-m", "sphinx", "-C", "-b", "html", "-D", "html_theme=basic"]
    command = [*build, "-D", "extensions=sphinxext.opengraph,pages", ".", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(pages.__file__).parent)}
    first, second = (
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.returncode != 0
    assert "no page needs these repairs: name_search_by_its_text" in first.stderr
    assert second.returncode == 0, second.stderr
