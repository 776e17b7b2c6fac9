"""Repairs of the generated pages, each for one defect of the theme or of an extension."""

import re
from collections.abc import Callable
from pathlib import Path

from sphinx.application import Sphinx


def _lines(signature: re.Match[str]) -> str:
    """Turn the parameters of a long signature, set as a list without terms, into plain lines."""
    lines = signature[0].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return lines.replace("<dl>", "").replace("</dl>", "")


_REPAIRS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    # The accessible name of a control must contain the text that it shows (WCAG 2.5.3).
    (re.compile(r'(<button class="btn search-button-field[^>]*?)\s+aria-label="[^"]*"'), r"\1"),
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    (
        re.compile(
            r'(<button class="btn btn-sm nav-link[^>]*theme-switch-button[^>]*?)'
            r'\s+aria-label="([^"]*)"([^>]*>)'
        ),
        r'\1\3<span class="visually-hidden">\2</span>',
    ),
    # A list holds list items; the role that docutils gives them is deprecated (WCAG 1.3.1).
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
    # A definition list needs terms (WCAG 1.3.1).
    (re.compile(r'<dl>\n(?:<dd><em class="sig-param">.*</dd>\n)+</dl>'), _lines),
    # The empty corner of a table heads nothing.
    (re.compile(r'<th class="head(?: [^"]*)?">\s*(?:<p></p>)?</th>'), "<td></td>"),
    # Everything on a page belongs to a landmark.
    (
        re.compile(r'<div id="pst-primary-sidebar"'),
        '<div id="pst-primary-sidebar" role="region" aria-label="Book"',
    ),
    # Jupyter Book always loads Thebe, which needs a network and a server that nobody runs here.
    (re.compile(r"<script>const THEBE_JS_URL[^<]*</script>"), ""),
    (re.compile(r'<script [^>]*src="[^"]*sphinx-thebe\.js[^"]*"></script>'), ""),
    (re.compile(r'<script type="text/x-thebe-config">[^<]*</script>'), ""),
    (re.compile(r"<script>kernelName = '[^']*'</script>"), ""),
    (re.compile(r'<link [^>]*href="[^"]*sphinx-thebe\.css[^"]*" />'), ""),
    # Where the address of the site is unknown, this tag holds a path that leads nowhere.
    (re.compile(r'<meta property="og:url" content="(?!https?://)[^"]*" />\n?'), ""),
]


# Links that the source viewer writes for objects which are documented under another name.
_VIEWER_LINK = re.compile(
    r'<a class="viewcode-back" href="([^"#]*)#([^"]*)">\[docs\]</a>'
    r'|<li><a href="([^"]*)">builtins</a></li>'
)


def _drop_dead_links(viewer: Path) -> None:
    """Drop the links of one page of the source viewer that lead nowhere."""

    def keep(link: re.Match[str]) -> str:
        page, anchor, module = link.groups()
        if module:
            alive = (viewer.parent / module).exists()
        else:
            alive = f'id="{anchor}"' in (viewer.parent / page).read_text("utf-8")
        return link[0] if alive else ""

    viewer.write_text(_VIEWER_LINK.sub(keep, viewer.read_text("utf-8")), "utf-8")


def _drop_unused(site: Path, loaded: set[str]) -> None:
    """Drop the bundles of MathJax that no page loads, and what only debuggers of scripts read."""
    for bundle in (site / "_static" / "mathjax").glob("*-*.js"):
        if f"mathjax/{bundle.name}" not in loaded:
            bundle.unlink()
    for source_map in (site / "_static").rglob("*.map"):
        source_map.unlink()


def _repair(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    site = Path(app.outdir)
    for template in (site / "_static").glob("*webpack-macros.html"):
        template.unlink()  # left unrendered by the themes, full of dead links
    loaded = set[str]()
    for page in site.rglob("*.html"):
        text = repaired = page.read_text("utf-8")
        loaded |= set(re.findall(r"mathjax/[\w-]+\.js", text))
        for defect, repair in _REPAIRS:
            repaired = defect.sub(repair, repaired)
        if repaired != text:
            page.write_text(repaired, "utf-8")
    _drop_unused(site, loaded)
    for viewer in (site / "_modules").rglob("*.html"):
        _drop_dead_links(viewer)


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("build-finished", _repair)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
