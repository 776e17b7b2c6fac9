"""Chapters in plain Markdown, for notebooks: what only MyST knows is said in words.

Theorems, exercises and boxes get a bold heading, proofs an end mark, solutions and answers a fold;
numbered formulas a tag; links become the words they show. Numbers that cells compute are filled in
where they are known, and stand as ⟨name⟩ where they are not.
"""

import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from textwrap import indent

from prose import BOOK, Part, blocks, inline, page_name, parts
from pybtex.database import BibliographyData, parse_file

_BEFORE = re.compile(r".*?(?=`{3}|:{3}|~{3}|\$\$)")
_ANSWER = re.compile(r"^(\S.*)\n: +(.*(?:\n.+)*)", re.MULTILINE)
_FOLD = r"* \1\n\n  <details><summary>Right?</summary>\n\n  \2\n\n  </details>"
_END = {"prf:proof": "∎", "solution": "\n</details>", "solution-end": "\n</details>"}


def readable(text: str, values: Mapping[str, float] | None = None) -> str:
    """Return Markdown that every reader of notebooks shows.

    Parameters
    ----------
    text
        One cell of a chapter.
    values
        What the cells have computed, by the names that the text uses.
    """
    lines = text.splitlines()
    for part in reversed(blocks(text)):
        place = slice(part.lines.start - 1, part.lines.stop - 1)
        lines[place] = _plain(part, "\n".join(lines[place]), values or {})
    return "\n".join(lines)


def _plain(part: Part, source: str, values: Mapping[str, float]) -> list[str]:
    """Return what stands for the lines of a part."""
    if part.inside[-1:] == ("quiz",):
        source = _ANSWER.sub(_FOLD, source)
    if part.kind in {"heading", "text"}:
        source = re.sub(r"^\{[.#][^}\n]*\}\n", "", source)  # the class of a paragraph
        return [_without_roles(source, values)]
    if part.kind == "unseen":
        return []
    if part.kind == "open":
        return [_instead(source, _without_roles(_heading(part.name, part.text), values))]
    if part.kind == "close":
        return [_instead(source, _END.get(part.name, ""))]
    if part.kind == "math" and (part.label or part.name):
        tag = f"\\tag{{{part.label}}}\n" if part.label else ""
        return [_instead(source, f"$$\n{part.text}\n{tag}$$")]
    return [source]


def _instead(source: str, shown: str) -> str:
    """Put a text where a source stands: in a list, for example, or in a quotation."""
    before = _BEFORE.match(source)[0]
    margin = re.sub("[^>]", " ", before)
    return before + indent(shown, margin).removeprefix(margin)


def _without_roles(text: str, values: Mapping[str, float]) -> str:
    for token, place in reversed(inline(text, "myst_role")):
        content = text[place].partition("`")[2].strip("`")
        shown = _words(token.meta["name"], content, values)
        text = text[: place.start] + shown + text[place.stop :]
    return text


def _heading(name: str, title: str) -> str:
    kind = name.removeprefix("prf:")
    if name in ("solution", "solution-start"):
        return "<details><summary>Solution</summary>\n"
    if not name:  # a box with a class and no more
        return ""
    if name == "quiz":
        return "**Question.**\n"
    if name in ("admonition", "solution-end"):
        return f"**{title}.**\n" if title else ""
    if kind == "proof":
        return "*Proof.*"
    return f"**{kind.capitalize()}{f' ({title})' if title else ''}.**"


def _words(role: str, content: str, values: Mapping[str, float]) -> str:
    """Return what a link shows."""
    shown, target = _split(content)
    if role == "glue:text":
        name, _, form = content.rpartition("::")[2].partition(":")
        return format(values[name], form) if name in values else f"⟨{name}⟩"
    if role == "eq":
        return f"({content})"
    if role in ("cite:t", "cite:p"):
        names = [_cited(key.strip(), role) for key in content.split(",")]
        return f"({'; '.join(names)})" if role == "cite:p" else " and ".join(names)
    if role == "numref":
        return "the figure"
    if role in ("func", "class", "meth"):
        return f"`{shown}`"
    if shown != target:
        return shown
    return _titles().get(target, shown) if role in ("prf:ref", "doc", "ref") else shown


def _split(content: str) -> tuple[str, str]:
    """Split ``words <target>`` and drop the sign of a short link."""
    if found := re.match(r"(.*?)\s*<([^>]*)>$", content, re.DOTALL):
        return found[1], found[2]
    return content.removeprefix("~"), content


@cache
def _titles() -> dict[str, str]:
    """Return what stands for a label or a page: its title, with the kind of a result."""
    found = dict[str, str]()
    for page in sorted(BOOK.rglob("*.md")):
        whole = parts(page.read_text(encoding="utf-8"))
        title = next((part.text for part in whole if part.kind == "heading"), page.stem)
        found |= dict.fromkeys((page.stem, f"/book/{page_name(page)}"), f"“{title}”")
        for place, part in pairwise(blocks(page.read_text(encoding="utf-8"))):
            if place.kind == "unseen" and part.kind == "heading":
                found[place.text] = f"“{part.text}”"
        found |= {part.label: _result(part) for part in whole if part.kind == "open" and part.label}
    return found


def _result(part: Part) -> str:
    kind = part.name.removeprefix("prf:").removesuffix("-start")
    return f"the {kind} “{part.text}”" if part.text else f"the {kind}"


@cache
def _bibliography() -> BibliographyData:
    return parse_file(str(BOOK / "references.bib"))


def _cited(key: str, role: str) -> str:
    entry = _bibliography().entries[key]
    last = [
        " ".join(person.prelast_names + person.last_names) for person in entry.persons["author"]
    ]
    last = [re.sub(r"[{}]|\\.", "", name) for name in last]
    names = last[0] if len(last) == 1 else f"{last[0]} and {last[1]}"
    names = f"{last[0]} et al." if len(last) > 2 else names
    year = entry.fields.get("year", "")
    return f"{names} {year}" if role == "cite:p" else f"{names} ({year})"
