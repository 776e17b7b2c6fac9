"""The register of claims: where each labelled equation and result of the book is checked.

A cell of a chapter names what it checks in a comment above the assertion,
`# checks: thm-kl, eq-kl`. A test names it by its mark, `@pytest.mark.claim("eq-kl")`. This module
collects both from the texts, without running anything, and writes the tables of the page on the
claims. `problems` lists what is not checked, and what only says so.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prose import BOOK, Part, code_of, page_name, parts
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

TESTS = BOOK.parent / "tests"
PAGE = "book/reference/claims"

CHECKS = re.compile(r"^\s*# checks: *(?P<labels>.+)$")


@dataclass(frozen=True)
class Claim:
    """A labelled equation, or a numbered result: theorem, definition, example and their like."""

    label: str
    kind: str
    page: str
    title: str = ""


@dataclass(frozen=True)
class Check:
    """What a cell or a test says that it checks; ``sound`` if an assertion stands behind it."""

    label: str
    where: str
    name: str
    sound: bool

    @property
    def is_test(self) -> bool:
        """Whether it is a test, and not a cell."""
        return self.where.endswith(".py")


def claims(page: Path) -> list[Claim]:
    """Return the claims of a page, in order."""
    found = []
    for part in parts(page.read_text("utf-8")):
        kind = part.name.removeprefix("prf:")
        if part.kind == "math" and part.label:
            found.append(Claim(part.label, "equation", page_name(page)))
        elif part.kind == "open" and kind != part.name and kind != "proof":
            found.append(Claim(part.label, kind, page_name(page), part.text))
    return found


def checks_in_cells(page: Path) -> Iterator[Check]:
    """Yield the checks of a page, each with the heading that it stands under."""
    heading = ""
    for part in parts(page.read_text("utf-8")):
        heading = part.text if part.kind == "heading" else heading
        if part.name == "code-cell":
            for number, labels in _comments(part):
                sound = _has_assertion(code_of(part), after=number)
                yield from (Check(label, page_name(page), heading, sound) for label in labels)


def checks_in_tests(path: Path) -> Iterator[Check]:
    """Yield the checks of a file of tests."""
    where = path.relative_to(TESTS.parent).as_posix()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            marks = [mark for mark in node.decorator_list if _mark(mark)]
            runs = node.name.startswith("test_") and not {"skip", "xfail"} & set(map(_mark, marks))
            labels = [a for m in marks if _mark(m) == "claim" for a in getattr(m, "args", [])]
            for label in labels:
                sound = runs and any(map(_asserts, ast.walk(node)))
                yield Check(ast.literal_eval(label), where, node.name, sound)


def register(book: Path = BOOK, tests: Path = TESTS) -> tuple[list[Claim], list[Check]]:
    """Return all claims of the book, and all that is said to check one."""
    pages = sorted(book.rglob("*.md"))
    found = [claim for page in pages for claim in claims(page)]
    checks = [check for page in pages for check in checks_in_cells(page)]
    for path in sorted(tests.rglob("test_*.py")):
        checks += checks_in_tests(path)
    return found, checks


def problems(found: list[Claim], checks: list[Check]) -> list[str]:
    """Return what is wrong with the register, one sentence for each defect."""
    labels, checked = [claim.label for claim in found], {check.label for check in checks}
    return [
        *(f"{c.page}: a {c.kind} without a label: {c.title}" for c in found if not c.label),
        *(
            f"{label}: two claims with one label"
            for label in set(labels)
            if labels.count(label) > 1
        ),
        *(f"{c.label} ({c.page}) is not checked" for c in found if c.label not in checked),
        *(
            f"{c.where}, {c.name}: no such claim: {c.label}"
            for c in checks
            if c.label not in labels
        ),
        *(f"{c.where}, {c.name}: nothing is asserted of {c.label}" for c in checks if not c.sound),
    ]


def _comments(cell: Part) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(cell.text.splitlines(), 1):
        if match := CHECKS.match(line):
            yield number, [label.strip() for label in match["labels"].split(",")]


def _has_assertion(code: str, after: int) -> bool:
    nodes = ast.walk(ast.parse(code))
    return any(_asserts(node) and getattr(node, "end_lineno", 0) > after for node in nodes)


def _asserts(node: ast.AST) -> bool:
    """Whether a node is an assertion about something that has a name."""
    if isinstance(node, ast.Assert):
        return any(isinstance(part, ast.Name) for part in ast.walk(node.test))
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name.startswith("assert_") or name in {"raises", "warns"}
    return False


def _mark(decorator: ast.expr) -> str:
    """Return the name of a mark of pytest, or nothing."""
    text = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
    return text.removeprefix("pytest.mark.") if text.startswith("pytest.mark.") else ""


def tables(found: list[Claim], checks: list[Check], order: list[str]) -> str:
    """Return the text of the page: a table for each chapter that claims something."""
    pages = sorted({claim.page for claim in found}, key=lambda page: order.index(page))
    return "\n".join(_table(page, found, checks) for page in pages)


def _table(page: str, found: list[Claim], checks: list[Check]) -> str:
    text = (BOOK / page).with_suffix(".md").read_text("utf-8")
    title = next(part.text for part in parts(text) if part.kind == "heading")
    rows = [_row(claim, checks) for claim in found if claim.page == page]
    head = ["| claim | kind | name | checked in |", "|---|---|---|---|"]
    return "\n".join(
        [f"\n## {title}\n", f"Sections are those of {{doc}}`/book/{page}`.\n", *head, *rows, ""]
    )


def _row(claim: Claim, checks: list[Check]) -> str:
    role = "eq" if claim.kind == "equation" else "prf:ref"
    places = dict.fromkeys(_place(check, claim) for check in checks if check.label == claim.label)
    cells = [f"{{{role}}}`{claim.label}`", claim.kind, claim.title, "; ".join(places)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _place(check: Check, claim: Claim) -> str:
    if check.is_test:
        return f"`{check.where}::{check.name}`"
    elsewhere = "" if check.where == claim.page else f"{{doc}}`/book/{check.where}`, "
    return elsewhere + check.name


def _write(app: Sphinx, page: str, source: list[str]) -> None:
    if page == PAGE:
        order = re.findall(r"file: book/(\S+?)(?:\.md)?$", _toc(app), re.MULTILINE)
        source[0] += tables(*register(), order=order)


def _toc(app: Sphinx) -> str:
    return (Path(app.srcdir) / "_toc.yml").read_text("utf-8")


def _always(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
    """Read the page again in every build: what it shows may have changed anywhere."""
    return [PAGE] if PAGE in env.found_docs else []


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("source-read", _write)
    app.connect("env-get-outdated", _always)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
