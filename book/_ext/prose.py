"""The text of a page in parts: headings, paragraphs, formulas, code and what encloses them.

The register of claims, the notebooks and the tests of the prose read the pages through this module.
What is a block, a formula or a role, the parser of the book decides. The content of a directive is
a text of its own, read like the page around it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import yaml
from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser

BOOK = Path(__file__).parents[1]

# Directives whose content is not prose.
VERBATIM = {"code-cell", "code", "code-block", "eval-rst", "raw", "tableofcontents", "toc"}

_OPENING = re.compile(r"(?:\{[^}]*\})?(?P<mark>`+|\$)")


@dataclass(frozen=True)
class Part:
    """One piece of a page.

    ``kind`` is "heading", "text", "math", "code" or "open", the first line of a directive.
    ``inside`` names the directives around it, the outermost first. ``line`` is where its text
    begins, ``lines`` are all of its lines, with its fences and its options.
    """

    kind: str
    text: str
    line: int
    inside: tuple[str, ...] = ()
    name: str = ""
    label: str = ""
    lines: range = range(0)

    @property
    def end(self) -> int:
        """The number of the last line of its text."""
        return self.line + self.text.count("\n")


def pages() -> list[Path]:
    """Return the pages of the two parts: what a reader reads from the first to the last."""
    return sorted([*BOOK.glob("foundations/*.md"), *BOOK.glob("practice/*.md")])


def page_name(path: Path) -> str:
    """Return the name that ``{doc}`` knows a page by, such as ``foundations/score``."""
    return path.relative_to(BOOK).with_suffix("").as_posix()


@cache
def glossary() -> dict[tuple[str, ...], str]:
    """Return the definition of each entry of the glossary, by its terms."""
    page = (BOOK / "reference" / "glossary.md").read_text("utf-8")
    found = {}
    for entry in re.split(r"\n\s*\n", page.split("```{glossary}\n")[1].split("\n```")[0]):
        lines = entry.splitlines()
        names = tuple(line for line in lines if not line.startswith(" "))
        found[names] = " ".join(line.strip() for line in lines[len(names) :])
    return found


def parts(text: str) -> list[Part]:
    """Split the text of a page, in order.

    Raises
    ------
    ValueError
        If something does not end, or ends what did not begin. The message says on which line.
    """
    found, gates = list[Part](), list[Part]()  # a gate spans from one directive to another one
    for part in blocks(text):
        around = tuple(gate.name.removesuffix("-start") for gate in gates)
        if part.kind not in {"close", "unseen"}:
            found.append(replace(part, inside=around + part.inside))
        if part.kind == "open" and part.name.endswith("-start"):
            gates.append(part)
        elif part.kind == "open" and part.name.endswith("-end"):
            if part.name.removesuffix("-end") not in around[-1:]:
                raise ValueError(f"line {part.line}: {part.name} ends what did not start")
            gates.pop()
    if gates:
        raise ValueError(f"line {gates[-1].line}: {gates[-1].name} has no end")
    return found


@cache
def blocks(text: str) -> tuple[Part, ...]:
    """Split a page or a piece of it, such as a cell, in order.

    There are two kinds that `parts` leaves out: "close", the last line of a directive, and
    "unseen", a comment or the label of a place.
    """
    return tuple(_blocks(re.sub(r"\r\n?", "\n", text), 1, ()))


def maths(part: Part) -> list[str]:
    """Return the formulas of a part: itself, or those within its lines."""
    if part.kind == "math":
        return [part.text]
    text = part.text
    if part.kind == "code":  # the options of a cell hold captions, which are prose
        options = _options(part.text, part.name)[1] if part.name == "code-cell" else 0
        text = "\n".join(text.split("\n")[:options])
    return [token.content for token, _ in inline(text, "math_inline")]


def code_of(cell: Part) -> str:
    """Return the code of a cell without its options, on the lines where it was."""
    options = _options(cell.text, cell.name)[1]
    return "\n" * options + "\n".join(cell.text.split("\n")[options:])


def blank(text: str, *patterns: str) -> str:
    """Overwrite what matches with spaces, so that all places and lines stay as they are."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for pattern in patterns:
        text = re.sub(pattern, spaces, text, flags=re.DOTALL)
    return text


def blank_math(text: str) -> str:
    """Overwrite the formulas within a text."""
    for _, place in inline(text, "math_inline"):
        text = text[: place.start] + blank(text[place], ".") + text[place.stop :]
    return text


def inline(text: str, kind: str) -> list[tuple[Token, slice]]:
    """Return the formulas or the roles within a text, each with its place."""
    state = _Located(text, _parser(), {}, [])
    _parser().inline.tokenize(state)
    found = []
    for token, start in state.located:
        if token.type == kind and (opening := _OPENING.match(text, start)):
            length = len(opening[0]) + len(token.content) + len(opening["mark"])
            found.append((token, slice(start, start + length)))
    return found


class _Located(StateInline):
    """Remembers where each token begins, which the token itself does not."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.located: list[tuple[Token, int]] = []

    def push(self, *arguments: Any) -> Token:
        token = super().push(*arguments)
        self.located.append((token, self.pos))
        return token


@cache
def _parser() -> MarkdownIt:
    settings = yaml.safe_load((BOOK.parent / "_config.yml").read_text("utf-8"))
    extensions = set(settings["parse"]["myst_enable_extensions"])
    return create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML)


def _blocks(text: str, first: int, inside: tuple[str, ...]) -> Iterator[Part]:
    """Split a text whose first line is number ``first`` of its page."""
    lines, at = text.split("\n"), 0
    for token in _tokens(text):
        start, stop = token.map
        yield from _texts(lines[at:start], first + at, inside)
        yield from _BLOCKS[token.type](token, range(first + start, first + stop), inside)
        at = stop
    yield from _texts(lines[at:], first + at, inside)


def _tokens(text: str) -> Iterator[Token]:
    """Yield the blocks that are not running text; none of them lies in another one."""
    tokens = list[Token]()
    _parser().block.parse(text + "\n", _parser(), {}, tokens)
    for token, following in pairwise([*tokens, Token("", "", 0)]):
        if token.type == "heading_open":
            token.content = following.content
        if token.type == "amsmath":  # its place lacks the last line
            token.map[1] = token.map[0] + token.content.count("\n") + 1
        if token.type in _BLOCKS:
            yield token


def _texts(lines: list[str], first: int, inside: tuple[str, ...]) -> Iterator[Part]:
    """Yield the runs of lines that are not blank."""
    for filled, run in groupby(enumerate(lines, first), lambda pair: bool(pair[1].strip())):
        if filled:
            numbers, words = zip(*run, strict=True)
            for number, line in zip(numbers, words, strict=True):
                if line.lstrip().startswith("$$") and line.count("$$") == 1:
                    raise ValueError(
                        f"line {number}: a formula lacks an end, or a blank line above"
                    )
            place = range(numbers[0], numbers[-1] + 1)
            yield Part("text", "\n".join(words), place.start, inside, lines=place)


def _heading(token: Token, lines: range, inside: tuple[str, ...]) -> Iterator[Part]:
    yield Part("heading", token.content, lines.start, inside, lines=lines)


def _formula(token: Token, lines: range, inside: tuple[str, ...]) -> Iterator[Part]:
    formula = _math(token.content, lines.start, inside, label=token.info, lines=lines)
    if re.search(r"\n\s*\n", formula.text):  # the first of two formulas, up to the second one
        raise ValueError(f"line {lines.start}: a formula with a blank line")
    yield formula


def _math(content: str, line: int, *context: Any, **more: Any) -> Part:
    text = content.strip("\n")
    line += content.index(text)
    return Part("math", text.rstrip(), line, *context, **more)


def _unseen(token: Token, lines: range, inside: tuple[str, ...]) -> Iterator[Part]:
    yield Part("unseen", token.content, lines.start, inside, lines=lines)


def _indented(token: Token, lines: range, inside: tuple[str, ...]) -> Iterator[Part]:
    yield Part("code", token.content.removesuffix("\n"), lines.start, inside, lines=lines)


def _fence(token: Token, lines: range, inside: tuple[str, ...]) -> Iterator[Part]:
    if token.content.count("\n") > len(lines) - 2:
        raise ValueError(f"line {lines.start}: a fence has no end")
    text, info = token.content.removesuffix("\n"), token.info.strip()
    directive = re.match(r"\{(\S+)\}(?:\s+(.*))?$", info)
    name, title = (directive[1], directive[2] or "") if directive else ("", info)
    if name in VERBATIM or (token.type == "fence" and not directive):
        yield Part("code", text, lines.start + 1, inside, name or info, lines=lines)
        return
    options, above = _options(text, name, lines.start) if directive else ({}, 0)
    label, body = str(options.get("label", "")), "\n".join(text.split("\n")[above:])
    start = lines.start + 1 + above
    if name == "math":
        yield _math(body, start, inside, name, label, lines)
        return
    yield Part("open", title, lines.start, inside, name, label, range(lines.start, start))
    yield from _blocks(body, start, (*inside, name))
    yield Part("close", "", lines[-1], inside, name, lines=lines[-1:])


def _options(text: str, name: str, line: int = 0) -> tuple[dict[str, Any], int]:
    """Return the options that the content of a directive begins with, and how many lines."""
    if text.startswith(":::"):  # another directive
        return {}, 0
    read = parse_directive_text(TestDirective, "", text, validate_options=name != "code-cell")
    if read.warnings:
        raise ValueError(f"line {line}: {name}: {read.warnings[0].msg}")
    lines = text.split("\n")[: read.body_offset]
    while lines and not lines[-1].strip():
        lines.pop()
    return read.options, len(lines)


_BLOCKS = {
    "amsmath": _formula,
    "code_block": _indented,
    "colon_fence": _fence,
    "fence": _fence,
    "front_matter": lambda *_: (),
    "heading_open": _heading,
    "math_block": _formula,
    "math_block_label": _formula,
    "myst_block_break": _unseen,
    "myst_line_comment": _unseen,
    "myst_target": _unseen,
}
