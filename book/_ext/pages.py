"""Repairs of the generated pages, each for one defect of the theme or of an extension.

A repair that finds nothing to do has lost its reason and should go: the build fails and names it.
Only a build that began without pages can say so, as that of `make book` does. Any other one may
write a part of the pages and leave the rest, where the repairs have been and find nothing again.

A page is parsed, and written as it was but for its repairs: a browser sees the same elements,
attributes, spaces and texts. Names such as `viewBox` lose their capitals, which HTML gives back.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from bs4.formatter import HTMLFormatter
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


@dataclass
class Page:
    """A page, and where it is."""

    path: Path
    tree: BeautifulSoup


# A repair returns whether a page needed it.
Repair = Callable[[Page], bool]


def name_search_by_its_text(page: Page) -> bool:
    """The accessible name of a control contains the text that it shows (WCAG 2.5.3)."""
    return _drop_label(page, "button.search-button-field[aria-label]")


def name_folds_by_their_text(page: Page) -> bool:
    """As above: a fold shows what it holds."""
    return _drop_label(page, 'summary[aria-label="Toggle hidden content"]')


def name_folds_of_the_contents(page: Page) -> bool:
    """A control needs a name (WCAG 4.1.2), and this one shows an arrow alone."""
    found = _select(page, "summary:not([aria-label]):has(> span.toctree-toggle)")
    for summary in found:
        summary["aria-label"] = "下级页面" if _is_chinese(page) else "Pages below"
    return bool(found)


def name_the_contents_by_what_they_hold(page: Page) -> bool:
    """The templates of the theme name them "Main", "Page" and "sidebar", in English alone."""
    found = False
    for tag in page.tree(["nav", "button"]):
        for attribute in ("aria-label", "title"):
            if names := CONTENTS.get(tag.get(attribute, "")):
                tag[attribute], found = names[_is_chinese(page)], True
    return found


def name_theme_switch_within(page: Page) -> bool:
    """As above: the switch shows its state, so the name stands beside it, unseen."""
    found = _select(page, "button.theme-switch-button[aria-label]")
    for button in found:
        name = page.tree.new_tag("span", attrs={"class": "visually-hidden"})
        name.string = button["aria-label"]
        button.insert(0, name)
        del button["aria-label"]
    return bool(found)


def list_references_as_items(page: Page) -> bool:
    """A list holds list items; the role that docutils gives them is deprecated (WCAG 1.3.1)."""
    found = _select(page, 'div[role="doc-biblioentry"]')
    for entry in found:
        entry["role"] = "listitem"
    return bool(found)


def set_parameters_in_lines(page: Page) -> bool:
    """A definition list needs terms, which that of a long signature lacks (WCAG 1.3.1)."""
    found = [names for names in page.tree("dl", class_=None) if _is_signature(names)]
    for names in found:
        for parameter in names("dd", recursive=False):
            parameter.name, parameter["class"] = "span", "sig-line"
        names.unwrap()
    return bool(found)


def head_no_column_by_nothing(page: Page) -> bool:
    """A header cell has text; above the names of rows there is none to give."""
    found = [cell for cell in _select(page, "th.head") if not cell.get_text(strip=True)]
    for cell in found:
        cell.name = "td"
    return bool(found)


def name_the_region_of_the_sidebar(page: Page) -> bool:
    """Everything on a page belongs to a landmark."""
    found = _select(page, "div#pst-primary-sidebar:not([role])")
    for sidebar in found:
        sidebar["role"] = "region"
        sidebar["aria-label"] = "本书" if _is_chinese(page) else "Book"
    return bool(found)


def drop_path_that_is_no_address(page: Page) -> bool:
    """Where the address of the site is not known, the tag holds a path that leads nowhere."""
    return _drop(page, 'meta[property="og:url"]:not([content^="http"])')


def drop_dead_links_of_viewer(page: Page) -> bool:
    """The source viewer links objects that are documented under another name, or not at all."""
    found = [link for link in _select(page, "a.viewcode-back") if _is_dead(link, page.path)]
    for link in found:
        link.decompose()
    return bool(found)


def drop_module_without_a_page(page: Page) -> bool:
    """The list of the source viewer names the home of types that no module of ours defines."""
    found = _select(page, 'a[href="builtins.html"]')
    for link in found:
        link.parent.decompose()
    return bool(found)


def _is_chinese(page: Page) -> bool:
    return bool(page.tree.html) and page.tree.html.get("lang", "").startswith("zh")


def _select(page: Page, selector: str) -> list[Tag]:
    """Return the tags that a selector names; its first word, a kind of tag, makes it fast."""
    kind = re.match(r"\w+", selector)[0]
    return [tag for tag in page.tree(kind) if tag.css.match(selector)]


def _drop_label(page: Page, selector: str) -> bool:
    found = _select(page, selector)
    for control in found:
        del control["aria-label"]
    return bool(found)


def _drop(page: Page, selector: str) -> bool:
    found = _select(page, selector)
    for tag in found:
        tag.decompose()
    return bool(found)


def _is_signature(names: Tag) -> bool:
    parameters = names.find_all(recursive=False)
    return bool(parameters) and all(
        tag.name == "dd" and tag.find("em", class_="sig-param", recursive=False)
        for tag in parameters
    )


def _is_dead(link: Tag, viewer: Path) -> bool:
    target, _, anchor = link["href"].partition("#")
    return anchor not in _anchors((viewer.parent / target).resolve())


@cache
def _anchors(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r'\sid="([^"]*)"', path.read_text("utf-8")))


CONTENTS = {
    "Main": ("Contents of the book", "全书目录"),
    "Page": ("Contents of the page", "本页目录"),
    "Toggle primary sidebar": ("Show or hide the contents of the book", "显示或隐藏全书目录"),
    "Toggle secondary sidebar": ("Show or hide the contents of the page", "显示或隐藏本页目录"),
}
# Jupyter Book always loads Thebe, which needs a network and a server that nobody runs here.
THEBE = [
    'script:-soup-contains("THEBE_JS_URL")',
    'script[src*="sphinx-thebe.js"]',
    'script[type="text/x-thebe-config"]',
    'script:-soup-contains("kernelName =")',
    'link[href*="sphinx-thebe.css"]',
]
REPAIRS: dict[str, Repair] = {
    repair.__name__: repair
    for repair in (
        name_search_by_its_text,
        name_folds_by_their_text,
        name_folds_of_the_contents,
        name_the_contents_by_what_they_hold,
        name_theme_switch_within,
        list_references_as_items,
        set_parameters_in_lines,
        head_no_column_by_nothing,
        name_the_region_of_the_sidebar,
        drop_path_that_is_no_address,
        drop_dead_links_of_viewer,
        drop_module_without_a_page,
    )
} | {f"drop {selector}": partial(_drop, selector=selector) for selector in THEBE}


def _unused(site: Path, loaded: set[str]) -> dict[str, list[Path]]:
    """Return the files that no page needs, by their kinds."""
    static = site / "_static"
    bundles = (static / "mathjax").glob("*-*.js")
    return {
        "templates, left unrendered by the themes, full of dead links": [
            *static.glob("*webpack-macros.html")
        ],
        "bundles of MathJax that no page loads": [b for b in bundles if b.name not in loaded],
        "maps, which only debuggers of scripts read": [*static.rglob("*.map")],
    }


class _AsWritten(HTMLFormatter):
    """Leaves attributes in their order."""

    def attributes(self, tag: Tag) -> Iterable[tuple[str, str]]:
        return tag.attrs.items()


_AS_WRITTEN = _AsWritten(HTMLFormatter.REGISTRY["minimal"].entity_substitution)


def read(path: Path) -> Page:
    """Read a page with all of its spaces."""
    text, whole = path.read_text("utf-8"), {"html"}
    tree = BeautifulSoup(
        text, "html.parser", multi_valued_attributes=None, preserve_whitespace_tags=whole
    )
    return Page(path, tree)


def write(page: Page) -> None:
    """Write a page back."""
    page.path.write_text(page.tree.decode(formatter=_AS_WRITTEN), "utf-8")


def repair(site: Path) -> dict[str, bool]:
    """Repair all pages of a site, and drop its unused files; return what found something to do."""
    found, loaded = dict.fromkeys(REPAIRS, False), set[str]()
    for path in site.rglob("*.html"):
        if "_static" not in path.relative_to(site).parts:
            page = read(path)
            scripts = [tag.get("src", "") for tag in page.tree("script")]
            loaded |= {script.rpartition("/")[2].partition("?")[0] for script in scripts}
            needed = {name: repaired(page) for name, repaired in REPAIRS.items()}
            if any(needed.values()):
                write(page)
                found |= {name: True for name in needed if needed[name]}
    for kind, files in _unused(site, loaded).items():
        found[kind] = bool(files)
        for file in files:
            file.unlink()
    return found


def _begin(app: Sphinx) -> None:
    """Repair the pages when they are written; note whether there are any before."""
    site = Path(app.outdir)
    if app.builder.format == "html":
        app.connect("build-finished", partial(_finish, whole=not any(site.rglob("*.html"))))


def _finish(app: Sphinx, error: Exception | None, whole: bool) -> None:
    if error:
        return
    found = repair(Path(app.outdir))
    if app.config.ogp_site_url:  # then the tags hold addresses
        del found[drop_path_that_is_no_address.__name__]
    if "sphinx.ext.viewcode" not in app.extensions:
        del found[drop_dead_links_of_viewer.__name__], found[drop_module_without_a_page.__name__]
    needless = [name for name in found if not found[name]]
    if whole and needless:
        raise ExtensionError(f"no page needs these repairs: {', '.join(needless)}")


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("builder-inited", _begin)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
