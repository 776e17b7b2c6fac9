"""The Chinese edition: the same sources, the same outputs, other sentences.

Sphinx replaces each paragraph by its message in `book/locale`. This module adds what it leaves out:
titles of exercises, texts in figures and in tables that cells show, numbers that a translated
paragraph pastes. It notes all messages of each page, from which `messages.py` keeps the catalogues.

A text that a cell computes is a message with its numbers taken out: "{0} of {1} images".
"""

import json
import re
from collections.abc import Callable, Iterator
from html import escape, unescape
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from myst_nb.ext.glue.roles import PasteTextRole
from sphinx.addnodes import toctree
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.locale import init as catalogue
from sphinx.transforms import SphinxTransform
from sphinx.transforms.i18n import Locale
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import extract_messages
from sphinx_exercise.nodes import (
    exercise_subtitle,
    exercise_title,
    is_exercise_node,
    solution_title,
)

from ewc_lib.figures._interactive import in_script

LANGUAGE = "zh_CN"
FOLDER = "book/locale"
NOTE = "messages.json"
WHOLE = frozenset(
    [f"book/foundations/{name}" for name in ("likelihood", "score", "fisher", "ewc")]
    + ["book/intro", "book/reference/glossary", "book/reference/notation"]
)
"""The pages that are translated from start to end; of the others, what leads through them."""

IS_PARTIAL = re.compile(r"book/(?:practice/\w+|reference/(?:\w+|api/index))")
UNTRANSLATED = "本页正文尚未译成中文，以下为英文原文"

_NUMBER = re.compile(r"[−+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?")
_WORD = re.compile(r"[A-Za-z]{2}")
_PLACES = re.compile(r'(?P<before>>|aria-(?:label|valuetext)=")(?P<text>[^<>"]+)(?=[<"])')
_FULL = {" (": "（", ")": "）"}
_SCRIPT = re.compile(r"(?P<before><script\b[^>]*>)(?P<script>.*?)(?=</script>)", re.DOTALL)
_DATA = '<script type="application/json">'

Translate = Callable[[str], str]


class _PasteText(PasteTextRole):
    """Pastes a number of this page into a translated paragraph, too, which Sphinx reads alone."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if "nb_renderer" not in self.document and "::" not in self.text:
            name, _, form = self.text.rpartition(":")
            page = PurePosixPath(self.document.settings.env.docname).name
            self.text = f"{page}.md::{name or form}:{form if name else 's'}"
        return super().run()


def masked(text: str) -> tuple[str, list[str]]:
    """Return a text with its numbers taken out, and these."""
    numbers = _NUMBER.findall(text)
    places = iter(range(len(numbers)))
    return _NUMBER.sub(lambda _: f"{{{next(places)}}}", text), numbers


def translated(text: str, translate: Translate) -> str:
    """Translate a text that a cell computed; what is no sentence or word stays."""
    message, numbers = masked(text.strip())
    if not _WORD.search(text) or text == "Figure":  # which gets its name later
        return text
    found = translate(message)
    if found != message:
        for number, shown in enumerate(numbers):
            found = found.replace(f"{{{number}}}", shown)
        return text.replace(text.strip(), found)
    return text


def translated_part(html: str, translate: Translate) -> str:
    """Translate the texts of a figure: labels, names of controls, and what they say."""
    scripts = list[str]()

    def keep(match: re.Match[str]) -> str:
        script = match["script"]
        scripts.append(_in_data(script, translate) if match["before"] == _DATA else script)
        return f"{match['before']}\0{len(scripts) - 1}\0"

    def put(match: re.Match[str]) -> str:
        return match["before"] + escape(translated(unescape(match["text"]), translate))

    html = _PLACES.sub(put, _SCRIPT.sub(keep, html))
    return re.sub("\0(\\d+)\0", lambda match: scripts[int(match[1])], html)


def _in_data(script: str, translate: Translate) -> str:
    def walk(data: object) -> object:
        if isinstance(data, dict):
            return {key: walk(value) for key, value in data.items()}
        if isinstance(data, list):
            return [walk(value) for value in data]
        return translated(data, translate) if isinstance(data, str) else data

    return in_script(walk(json.loads(script)))


class _Messages(SphinxTransform):
    """Makes messages of what Sphinx leaves out, and notes all that a page has."""

    default_priority = Locale.default_priority - 5

    def apply(self, **kwargs: object) -> None:
        page = self.env.docname
        computed = list(_computed(self.document))
        _prepare(self.document, computed)
        noted = [text for node, text in extract_messages(self.document) if _counts(node, page)]
        if page in WHOLE:
            for node in computed:
                _replace(node, lambda message: noted.append(message) or message)
        self.env.metadata[page][NOTE] = list(dict.fromkeys(noted))
        if page in WHOLE and self.config.language == LANGUAGE:
            for title in self.document.findall(solution_title):  # made again from its parent
                title.parent["title"] = "解答"
            for node in _computed(self.document):
                _replace(node, translator(self.env, page))


class _Brackets(SphinxPostTransform):
    """Sets the brackets around the title of an exercise in full width."""

    default_priority = 23  # when sphinx-exercise has put them there
    formats = ("html", "latex")

    def run(self, **kwargs: object) -> None:
        if self.config.language == LANGUAGE and self.env.docname in WHOLE:
            for exercise in self.document.findall(is_exercise_node):
                title = exercise[0]
                for text in [part for part in title if isinstance(part, nodes.Text)]:
                    title.replace(text, nodes.Text(_FULL.get(text.astext(), text.astext())))


def translator(env: BuildEnvironment, page: str) -> Translate:
    """Return what translates the messages of a page into the language of the edition."""
    folders = [f"{env.srcdir}/{folder}" for folder in env.config.locale_dirs]
    found, _ = catalogue(folders, env.config.language, page)
    return found.gettext


def _prepare(document: nodes.document, computed: list[nodes.Element]) -> None:
    """Say what Sphinx is to translate: own titles of exercises, but nothing that is computed."""
    for title in document.findall(exercise_subtitle):
        title.source, title.line = document["source"], title.parent.parent.line or 1
        title.rawsource = "".join(map(_markup, title.children))
    kinds = exercise_title | solution_title | nodes.math_block
    whole = [node for node in document.findall(nodes.Element) if isinstance(node, kinds)]
    for node in [*whole, *computed]:
        node["translatable"] = False


def _markup(node: nodes.Node) -> str:
    """Return the source of a piece of a title."""
    around = {"math": "$", "literal": "`", "emphasis": "*"}.get(node.tagname, "")
    return f"{around}{node.astext()}{around}"


def _counts(node: nodes.Element, page: str) -> bool:
    """Whether a message is translated: all of a page, or opening, headings and summary."""
    above = list(_ancestors(node))
    if any(isinstance(part, nodes.field_list | nodes.docinfo) for part in [node, *above]):
        return False  # of what programs read
    if page in WHOLE or not IS_PARTIAL.fullmatch(page):
        return page in WHOLE
    sections = [part for part in above if isinstance(part, nodes.section)]
    if isinstance(node, nodes.title) and node.parent is sections[0]:
        return True
    if len(sections) < 2:
        return page != "book/reference/api/index"  # which is made from docstrings
    return sections[-2].next_node(nodes.title).rawsource == "Summary"


def _ancestors(node: nodes.Node) -> Iterator[nodes.Element]:
    while node.parent is not None:
        node = node.parent
        yield node


def _computed(document: nodes.document) -> Iterator[nodes.Element]:
    """Yield what cells show with texts in it: parts of a page, and paragraphs of tables."""
    for output in document.findall(nodes.container):
        if output.get("nb_element") == "cell_code_output":
            yield from (part for part in output.findall(nodes.raw) if part["format"] == "html")
            for table in output.findall(nodes.table):
                yield from table.findall(nodes.paragraph)


def _replace(node: nodes.Element, translate: Translate) -> None:
    if isinstance(node, nodes.raw):
        node[:] = [nodes.Text(translated_part(node.astext(), translate))]
        return
    for text in list(node.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.literal | nodes.math):
            text.parent.replace(text, nodes.Text(translated(text.astext(), translate)))


def _write(app: Sphinx, error: Exception | None) -> None:
    """Write down the messages of all pages, for those who keep the catalogues."""
    if not error and app.builder.format == "html" and app.config.language != LANGUAGE:
        pages = app.env.metadata
        found = {page: pages[page][NOTE] for page in sorted(pages) if pages[page].get(NOTE)}
        text = json.dumps(found, ensure_ascii=False, indent=1)
        (Path(app.outdir) / NOTE).write_text(text + "\n", "utf-8")


def _name_parts(app: Sphinx, document: nodes.document) -> None:
    """Make messages of the names of the parts, which the first page has since a moment ago."""
    page = app.env.docname
    for tree in document.findall(toctree):
        if caption := tree.get("caption"):
            app.env.metadata[page][NOTE].append(caption)
            tree["caption"] = translator(app.env, page)(caption)


def _say_what_is_not(app: Sphinx, document: nodes.document) -> None:
    """Say on a page of the Chinese edition that its text is not translated."""
    if app.config.language == LANGUAGE and app.env.docname not in WHOLE:
        title = document.next_node(nodes.title)
        if title:
            rest = "；标题与提要已译。" if app.env.metadata[app.env.docname][NOTE] else "。"
            note = nodes.paragraph("", UNTRANSLATED + rest, classes=["untranslated"])
            title.parent.insert(1, note)


def _link_editions(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Give each page the address of the same page in the other language."""
    is_chinese = app.config.language == LANGUAGE
    is_code = page.startswith("_modules/")  # which is in the English edition alone
    up = "../" * page.count("/")
    here, there = (f"{name}.html" for name in (page, app.config.root_doc if is_code else page))
    context["is_chinese"] = is_chinese
    context["other_edition"] = f"{up}../{there}" if is_chinese else f"{up}zh/{there}"
    site = app.config.ogp_site_url.removesuffix("zh/")
    if is_code or not site:  # search engines want whole addresses
        return
    english, chinese = f"{site}{here}", f"{site}zh/{here}"
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<link rel="alternate" hreflang="{language}" href="{place}" />'
        for language, place in (("en", english), ("zh-CN", chinese))
    )


def setup(app: Sphinx) -> dict[str, object]:
    app.setup_extension("myst_nb")
    app.add_role_to_domain("glue", "text", _PasteText(), override=True)
    app.add_transform(_Messages)
    app.add_post_transform(_Brackets)
    app.connect("doctree-read", _name_parts, priority=900)  # after sphinx-external-toc
    app.connect("doctree-read", _say_what_is_not)
    app.connect("html-page-context", _link_editions)
    app.connect("build-finished", _write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
