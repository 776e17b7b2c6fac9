"""Where a chapter first uses a public name of the package, its prose links to the reference.

A use is a name in a cell whose code is shown. The link stands in the same section or before it, as
``{func}``, ``{class}`` or, for a class, ``{meth}``. Names that the reference does not list, and
cells whose code is folded away, call for no link.
"""

import ast
import importlib
import re
from functools import cache
from inspect import isroutine
from pathlib import Path

import pytest
from prose import Part, code_of, page_name, pages, parts
from reference import entries

LINK = re.compile(r"\{(?:func|class|meth)\}`(?:[^`<]*<)?~?(ewc_lib[\w.]*)")


def resolve(dotted: str) -> object:
    """Return the object behind a dotted name of the package."""
    module, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(resolve(module), name)


@cache
def documented() -> dict[int, str]:
    """Return the functions and classes of the reference, by the identity of their objects."""
    found = [(entry.value, entry.name) for entry in entries().values()]
    return {id(value): name for value, name in found if isinstance(value, type) or isroutine(value)}


def imported(cells: list[Part]) -> dict[str, object]:
    """Return what the cells import from the package, by the names that they give it."""
    nodes = [node for cell in cells for node in ast.walk(ast.parse(code_of(cell)))]
    found = [
        n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "")[:7] == "ewc_lib"
    ]
    return {a.asname or a.name: resolve(f"{n.module}.{a.name}") for n in found for a in n.names}


def uses(cell: Part, names: dict[str, object]) -> set[str]:
    """Return the documented names that a cell uses."""
    found = []
    for node in ast.walk(ast.parse(code_of(cell))):
        if isinstance(node, ast.Name) and node.id in names:
            found.append(names[node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(getattr(names.get(node.value.id), node.attr, None))
    return {documented()[id(use)] for use in found if id(use) in documented()}


def is_shown(cell: Part) -> bool:
    return not re.search(r"^:?tags:.*\b(?:hide|remove)-(?:input|cell)\b", cell.text, re.MULTILINE)


def unlinked(page: Path) -> list[str]:
    """Return the names whose first use has no link by the end of its section."""
    whole = parts(page.read_text("utf-8"))
    names = imported([part for part in whole if part.name == "code-cell"])
    linked, waiting, missing = set[int](), dict[str, int](), list[str]()
    for part in [*whole, Part("heading", "", 0)]:
        if part.kind == "text":
            linked |= {id(target) for link in LINK.findall(part.text) for target in owners(link)}
        elif part.name == "code-cell" and is_shown(part):
            waiting |= {name: part.line for name in uses(part, names) if name not in waiting}
        elif part.kind == "heading":
            late = {n: line for n, line in waiting.items() if id(resolve(n)) not in linked}
            missing += [f"line {line}: {name}" for name, line in late.items()]
            linked |= {id(resolve(name)) for name in late}
    return missing


def owners(link: str) -> list[object]:
    """Return what a link leads to, and the class that it is a method of."""
    target = resolve(link)
    owner = resolve(link.rpartition(".")[0])
    return [target, owner] if isinstance(owner, type) else [target]


@pytest.fixture(params=pages(), ids=page_name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_first_use_of_a_public_name_is_linked_to_the_reference(page: Path) -> None:
    assert unlinked(page) == []


def test_every_link_to_the_package_leads_to_an_entry_of_the_reference(page: Path) -> None:
    links = set(LINK.findall(page.read_text("utf-8")))
    assert not [link for link in links if not {id(o) for o in owners(link)} & documented().keys()]


def test_links_are_found_by_the_object_and_not_by_its_spelling() -> None:
    import ewc_lib.likelihood

    assert documented()[id(ewc_lib.likelihood.Gaussian)] == "ewc_lib.Gaussian"
    assert owners("ewc_lib.EWC.penalty")[1] is ewc_lib.EWC
