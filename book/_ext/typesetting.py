"""Numbers that cells compute, set as a book sets them: 4 × 10⁻¹⁷ for 4e-17, − for a hyphen.

This concerns numbers glued into the text and those in tables that cells show. A formula, code and
what a cell prints stay as they are. Anywhere in the prose, no line ends between a number and what
belongs to it: a sign of per cent, the unit of a memory, a ± or a =.
"""

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

# A hyphen within a word or between two numbers is no minus.
_NUMBER = re.compile(r"(?<![\w.,-])(-?)(\d[\d,]*(?:\.\d+)?)(?:e([+-]\d+))?(?![\w])")
_UNITS = r"[±%]|[kMGT]i?B\b"
_JOINT = re.compile(rf"(?<=\d)[ \n](?={_UNITS})|(?<=[±=<])[ \n](?=\d)|(?<=\d)(?=%)")
# The same where the number is glued: behind it, and before it.
_BEHIND, _BEFORE = re.compile(rf"^[ \n](?={_UNITS})"), re.compile(r"(?<=[±=<])[ \n]$")
_SPACE = "\N{NO-BREAK SPACE}"
_MINUS, _TIMES = "−", f"{_SPACE}×{_SPACE}"


def typeset(text: str, latex: bool = False) -> list[nodes.Node]:
    """Return a text with its numbers set."""
    found, end = list[nodes.Node](), 0
    text = _JOINT.sub(_SPACE, text)
    for match in _NUMBER.finditer(text):
        sign, digits, exponent = match.groups()
        found += [nodes.Text(text[end : match.start()])] if match.start() > end else []
        found += _power(sign, digits, int(exponent or 0), latex)
        end = match.end()
    return [*found, nodes.Text(text[end:])] if end < len(text) else found


def _power(sign: str, digits: str, exponent: int, latex: bool) -> list[nodes.Node]:
    sign = sign and _MINUS
    if not exponent:
        return [nodes.Text(sign + digits)]
    factor = "" if digits == "1" else digits
    if latex:
        formula = "-" * bool(sign) + factor + r" \times " * bool(factor) + f"10^{{{exponent}}}"
        return [nodes.math(formula, formula)]
    above = str(exponent).replace("-", _MINUS)
    base = f"{sign}{factor}{_TIMES if factor else ''}10"
    return [nodes.Text(base), nodes.superscript(above, above)]


class _SetNumbers(SphinxPostTransform):
    """Sets the numbers of a page, when those of other chapters are there too."""

    default_priority = 900
    formats = ("html", "latex")

    def run(self) -> None:
        for text in list(self.document.findall(nodes.Text)):
            if _is_prose(text) and (joined := join(text)) != text.astext():
                text.parent.replace(text, nodes.Text(joined))
        for text in list(self._computed()):
            text.parent.replace(text, typeset(text.astext(), self.app.builder.format == "latex"))

    def _computed(self) -> Iterator[nodes.Text]:
        for node in self.document.findall(nodes.Element):
            if "pasted-text" in node.get("classes", ()):
                yield from node.findall(nodes.Text)
            elif node.get("nb_element") == "cell_code_output":
                for table in node.findall(nodes.table):
                    yield from filter(_is_prose, table.findall(nodes.Text))


def join(text: nodes.Text) -> str:
    """Keep the numbers of the prose, typed or glued beside it, on the line of their units."""
    joined = _JOINT.sub(_SPACE, text.astext())
    place = text.parent.index(text)
    before, after = (
        text.parent[max(place - 1, 0)],
        text.parent[min(place + 1, len(text.parent) - 1)],
    )
    if _is_number(before):
        joined = _BEHIND.sub(_SPACE, joined)
    return _BEFORE.sub(_SPACE, joined) if _is_number(after) else joined


def _is_number(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Element) and "pasted-text" in node.get("classes", ())


def _is_prose(text: nodes.Text) -> bool:
    kinds = nodes.literal | nodes.math | nodes.raw | nodes.FixedTextElement
    return not isinstance(text.parent, kinds)


_OPENING, _MARK = re.compile(r"[(（“「]+$"), re.compile(r"^[，。；：？！、）」”.,;:?!)]+")


class KeepMarks(SphinxPostTransform):
    """Keeps a mark of punctuation on the line of the formula before it, a bracket on that after."""

    default_priority = _SetNumbers.default_priority + 10
    formats = ("html",)

    def run(self) -> None:
        for formula in list(self.document.findall(nodes.math)):
            before, behind = _taken(formula, -1, _OPENING), _taken(formula, 1, _MARK)
            if before or behind:
                joined = nodes.inline("", "", classes=["joined"])
                formula.parent.replace(formula, joined)
                joined += [nodes.Text(before), formula, nodes.Text(behind)]


def _taken(node: nodes.Node, step: int, marks: re.Pattern[str]) -> str:
    """Take marks from the text beside a node."""
    place = node.parent.index(node) + step
    text = node.parent[place] if 0 <= place < len(node.parent) else None
    match = marks.search(text) if isinstance(text, nodes.Text) else None
    if not match:
        return ""
    node.parent[place] = nodes.Text(marks.sub("", text))
    return match[0]


def setup(app: Sphinx) -> dict[str, object]:
    app.add_post_transform(_SetNumbers)
    app.add_post_transform(KeepMarks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
