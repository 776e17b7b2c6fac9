"""Chapters in plain Markdown, for notebooks: what only MyST knows is said in words.

Theorems, exercises and boxes get a bold heading, proofs an end mark, solutions a fold; numbered
formulas a tag; links become the words they show. Numbers that cells compute are filled in where
they are known, and stand as ⟨name⟩ where they are not.
"""

import re
from collections.abc import Mapping
from functools import cache

from prose import BOOK
from pybtex.database import BibliographyData, parse_file

_OPEN = re.compile(r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[\w:-]+)\}\s*(?P<title>.*)$")
_OPTION = re.compile(r"^:[\w-]+:")
_ROLE = re.compile(r"\{(?P<role>[a-z:]+)\}`(?P<content>[^`]+)`")
_TITLED = re.compile(r"^[`:]{3,}\{(?:prf:)?(\w+)\}[ ]*(.*)\n:label:[ ]*([\w-]+)[ ]*$", re.MULTILINE)
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
    text = re.sub(r"^\([\w-]+\)=\n", "", _without_directives(text), flags=re.MULTILINE)
    text = re.sub(r"\$\$[ ]*\(([\w-]+)\)[ ]*$", r"\\tag{\1}\n$$", text, flags=re.MULTILINE)
    return _ROLE.sub(lambda match: _words(match["role"], match["content"], values or {}), text)


def _without_directives(text: str) -> str:
    lines: list[str] = []
    opened: list[tuple[str, str]] = []
    options = False
    for line in text.splitlines():
        if found := _OPEN.match(line):
            opened.append((found["fence"], found["name"]))
            lines.append(_heading(found["name"], found["title"]))
            options = True
        elif opened and line.rstrip() == opened[-1][0]:
            lines.append(_END.get(opened.pop()[1], ""))
            options = False
        elif not (options and _OPTION.match(line)):
            lines.append(line)
            options = False
    return "\n".join(lines)


def _heading(name: str, title: str) -> str:
    kind = name.removeprefix("prf:")
    if name in ("solution", "solution-start"):
        return "<details><summary>Solution</summary>\n"
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
    return _titles().get(target, shown) if role in ("prf:ref", "doc") else shown


def _split(content: str) -> tuple[str, str]:
    """Split ``words <target>`` and drop the sign of a short link."""
    if found := re.match(r"(.*?)\s*<([^>]*)>$", content, re.DOTALL):
        return found[1], found[2]
    return content.removeprefix("~"), content


@cache
def _titles() -> dict[str, str]:
    """Return what stands for a label or a page: its kind and title."""
    found = {}
    for page in sorted(BOOK.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        heading = re.search(r"^# (.*)$", text, re.MULTILINE)
        for name in (page.stem, f"/book/{page.relative_to(BOOK).with_suffix('')}"):
            found[name] = f"“{heading[1]}”" if heading else name
        for kind, title, label in _TITLED.findall(text):
            found[label] = f"the {kind} “{title}”" if title else f"the {kind}"
    return found


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
