"""The text of a page in parts: headings, paragraphs, formulas, code and what encloses them.

The register of claims and the tests of the prose read the pages through this module. It knows as
much of MyST as the pages use, and no more.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOOK = Path(__file__).parents[1]

# Directives whose content is not prose.
VERBATIM = {"code-cell", "code", "code-block", "eval-rst", "math", "raw", "tableofcontents", "toc"}

_FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,})(?:\{(?P<name>[\w:+-]+)\})?\s*(?P<title>.*)$")
_LABEL = re.compile(r"^\$\$(?:\s*\((?P<label>[\w-]+)\))?\s*$")
_INLINE_MATH = re.compile(r"(?<!\\)\$(?!\s)((?:[^$\\]|\\.)+?)(?<!\s)\$(?!\d)")


@dataclass(frozen=True)
class Part:
    """One piece of a page.

    ``kind`` is "heading", "text", "math", "code" or "open", the first line of a directive.
    ``inside`` names the directives around it, the outermost first.
    """

    kind: str
    text: str
    line: int
    inside: tuple[str, ...] = ()
    name: str = ""
    label: str = ""

    @property
    def end(self) -> int:
        """The number of the last line."""
        return self.line + self.text.count("\n")


def pages() -> list[Path]:
    """Return the pages of the two parts: what a reader reads from the first to the last."""
    return sorted([*BOOK.glob("foundations/*.md"), *BOOK.glob("practice/*.md")])


def page_name(path: Path) -> str:
    """Return the name that ``{doc}`` knows a page by, such as ``foundations/score``."""
    return path.relative_to(BOOK).with_suffix("").as_posix()


def parts(text: str) -> list[Part]:
    """Split the text of a page, in order."""
    return list(_Reader(text.splitlines()).read())


def maths(part: Part) -> list[str]:
    """Return the formulas of a part: itself, or those within its lines."""
    if part.kind == "math":
        return [part.text]
    if part.kind == "code":  # captions are prose in a header of YAML
        header = re.match(r"---\n(.*?)\n---", part.text, re.DOTALL)
        return _INLINE_MATH.findall(header[1]) if header and part.name == "code-cell" else []
    return _INLINE_MATH.findall(blank(part.text, r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)"))


def blank(text: str, *patterns: str) -> str:
    """Overwrite what matches with spaces, so that all places and lines stay as they are."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for pattern in patterns:
        text = re.sub(pattern, spaces, text, flags=re.DOTALL)
    return text


def blank_math(text: str) -> str:
    """Overwrite the formulas within a text."""
    return blank(text, _INLINE_MATH.pattern)


class _Reader:
    """Walk through the lines of a page once."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.at = lines, 0
        self.open: list[tuple[str, str]] = []  # fence and name of each open directive
        self.gates: list[str] = []

    @property
    def inside(self) -> tuple[str, ...]:
        return (*self.gates, *(name for _, name in self.open))

    def read(self) -> Iterator[Part]:
        if self.lines and self.lines[0] == "---":
            self.at = self.lines.index("---", 1) + 1
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if match := _FENCE.match(line):
                yield from self.fence(match)
            elif _LABEL.match(line):
                yield self.formula()
            elif re.match(r"#{1,6} ", line):
                yield Part("heading", line.lstrip("# "), self.at + 1, self.inside)
                self.at += 1
            elif line.strip():
                yield self.paragraph()
            else:
                self.at += 1

    def fence(self, match: re.Match[str]) -> Iterator[Part]:
        fence, name = match["fence"], match["name"] or ""
        if self.open and not name and not match["title"] and fence == self.open[-1][0]:
            self.open.pop()
            self.at += 1
        elif fence[0] == "`" and (not name or name in VERBATIM):
            yield self.verbatim(fence, name or match["title"])
        else:
            start, inside = self.at, self.inside
            self.at += 1
            options = self.options()
            yield Part("open", match["title"], start + 1, inside, name, options.get("label", ""))
            self.open.append((fence, name))
            self.gate(name)

    def gate(self, name: str) -> None:
        """Follow a directive that is open from one line to another one, such as a solution."""
        if name.endswith("-start"):
            self.gates.append(name.removesuffix("-start"))
        elif name.endswith("-end"):
            self.gates.pop()

    def options(self) -> dict[str, str]:
        """Skip the options of a directive, and return them."""
        found: dict[str, str] = {}
        while match := re.match(r":([\w-]+):\s*(.*)$", self.lines[self.at]):
            found[match[1]] = match[2].strip()
            self.at += 1
        return found

    def verbatim(self, fence: str, name: str) -> Part:
        end = self.lines.index(fence, self.at + 1)
        text, start = "\n".join(self.lines[self.at + 1 : end]), self.at + 2
        self.at = end + 1
        return Part("code", text, start, self.inside, name)

    def formula(self) -> Part:
        start = self.at + 1
        end = next(n for n in range(start, len(self.lines)) if _LABEL.match(self.lines[n]))
        label = _LABEL.match(self.lines[end])
        self.at = end + 1
        text = "\n".join(self.lines[start:end])
        return Part("math", text, start + 1, self.inside, label=(label and label["label"]) or "")

    def paragraph(self) -> Part:
        start = self.at
        while self.at < len(self.lines) and self.continues(self.lines[self.at]):
            self.at += 1
        text = "\n".join(self.lines[start : self.at])
        return Part("text", text, start + 1, self.inside)

    @staticmethod
    def continues(line: str) -> bool:
        return bool(line.strip()) and not (
            _FENCE.match(line) or _LABEL.match(line) or re.match(r"#{1,6} ", line)
        )
