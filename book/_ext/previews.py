"""The texts of previews: what the links of the book lead to, in one file for the whole site.

A script shows them beside a link, and loads the file for the first one. A formula, a result, a term
of the glossary, a publication and the first paragraph on a function have a text; the rest has none.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from copy import copy
from pathlib import Path

from bs4 import Tag
from pages import read
from sphinx.application import Sphinx

FILE = "texts-of-previews.js"
_LINK = re.compile(r'<a class="[^"]*\binternal\b[^"]*" href="([^"#]*)#([^"]+)"')
_KINDS = "div.math, div.proof, div.citation, dt.sig, dl.glossary > dt"
_NOT_SHOWN = "a.headerlink, .viewcode-link, .backrefs, .fn-backref, script, .visually-hidden"


def linked(site: Path) -> dict[Path, set[str]]:
    """Return the anchors that links of the book lead to, by page."""
    found = defaultdict[Path, set[str]](set)
    for page in (site / "book").rglob("*.html"):
        for target, anchor in _LINK.findall(page.read_text("utf-8")):
            found[(page.parent / target).resolve() if target else page].add(anchor)
    return {page: found[page] for page in sorted(found) if site / "book" in page.parents}


def texts(site: Path) -> dict[str, str]:
    """Return the texts, by their addresses within the site."""
    return {
        f"{page.relative_to(site).as_posix()}#{anchor}": text
        for page, anchors in linked(site).items()
        for anchor, text in _texts(page, anchors)
    }


def _texts(page: Path, anchors: set[str]) -> Iterator[tuple[str, str]]:
    for tag in read(page).tree(id=anchors):
        target = tag
        if tag.name == "span" and not tag.contents:  # a second name of what follows
            target = tag.find_next_sibling()
        if target and target.css.match(_KINDS):
            yield tag["id"], "".join(map(_plain, _pieces(target)))


def _pieces(target: Tag) -> Iterator[Tag]:
    yield target
    if target.name == "dt":
        said = target.find_next_sibling("dd")
        yield from said.find_all("p", limit=1) if "sig" in target.get("class", "") else [said]


def _plain(piece: Tag) -> str:
    """Return a copy that holds no link, and no name that the page has already."""
    copied = copy(piece)
    for tag in copied.css.select(_NOT_SHOWN):
        tag.decompose()
    for tag in copied("a"):
        tag.unwrap()
    for tag in [copied, *copied(id=True)]:
        del tag["id"]
    if "sig" in copied.get("class", ""):  # a signature is read here, and not searched
        copied.string, copied["class"] = _in_a_line(copied.get_text()), "sig"
    if copied.name in ("dt", "dd"):  # these need a list around them
        copied.name = "div"
    return str(copied)


def _in_a_line(signature: str) -> str:
    """Return a signature as it would be called."""
    return re.sub(r"(?<=\()\s+|,?\s+(?=\))", "", " ".join(signature.split()))


def _write(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    site = Path(app.outdir)
    mathjax = {"path": app.config.mathjax_path, "config": app.config.mathjax3_config}
    found = {"mathjax": mathjax, "texts": texts(site)}
    written = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    (site / "_static" / FILE).write_text(f"previews = {written}", "utf-8")


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("build-finished", _write, priority=600)  # when the pages are repaired
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
