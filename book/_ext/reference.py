"""The reference of the package: every public name once, on the page of one module.

A name is public if a public module lists it in ``__all__``. It has its place with the module that
lists it nearest to the top of the package; what the top itself lists, belongs one step below, and
is called by its shortest name all the same.
"""

import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from types import ModuleType
from typing import ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective

PACKAGE = "ewc_lib"
OPERATORS = {"__add__", "__matmul__", "__mul__", "__sub__", "__truediv__"}
DESCRIPTORS = (property, cached_property, classmethod, staticmethod)


class Entry(NamedTuple):
    """A public object, the shortest name that leads to it, and the module of its page."""

    name: str
    module: str
    value: object


def public_modules() -> Iterator[ModuleType]:
    """Yield the modules that list public names."""
    package = importlib.import_module(PACKAGE)
    below = [found.name for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")]
    for name in [PACKAGE, *below]:
        if "._" not in name and hasattr(module := importlib.import_module(name), "__all__"):
            yield module


def public_names(module: ModuleType) -> list[str]:
    """Return the names that a module lists, in the order in which it defines or lists them."""
    order = dict.fromkeys([*vars(module), *module.__all__])
    return [name for name in order if name in module.__all__ and name[0] != "_"]


@cache
def entries() -> dict[tuple[str, int], Entry]:
    """Return the entries of the reference, each by its last name and the identity of its object."""
    lists = defaultdict(list)
    values = {}
    for module in public_modules():
        for name in public_names(module):
            value = getattr(module, name)
            values[name, id(value)] = value
            lists[name, id(value)].append(module.__name__)
    return {key: _entry(key[0], values[key], lists[key]) for key in lists}


def _entry(name: str, value: object, modules: list[str]) -> Entry:
    defined = getattr(value, "__module__", None) or ""
    below = [module for module in modules if module != PACKAGE]
    place = min(below, key=lambda module: (module.count("."), not defined.startswith(module)))
    return Entry(f"{PACKAGE if PACKAGE in modules else place}.{name}", place, value)


def entries_of(module: ModuleType) -> list[Entry]:
    """Return the entries of all names that a module lists, wherever they have their place."""
    return [entries()[name, id(getattr(module, name))] for name in public_names(module)]


def _documented_members(owner: type) -> list[str]:
    """Return the public methods and properties to which a class itself gives a docstring."""
    return [
        name
        for name, member in vars(owner).items()
        if (name[0] != "_" or name in OPERATORS)
        and (inspect.isfunction(member) or isinstance(member, DESCRIPTORS))
        and member.__doc__
    ]


def _autodoc(entry: Entry, more: list[str], inheriting: list[str]) -> Iterator[str]:
    """Yield the directive of an entry; ``more`` names members that only a base class documents."""
    if not isinstance(entry.value, type):
        is_function = inspect.isroutine(entry.value)
        yield f".. autofunction:: {entry.name}" if is_function else f".. autodata:: {entry.name}"
        yield "" if is_function else "   :no-value:"
        return
    yield f".. autoclass:: {entry.name}"
    members = [name for name in vars(entry.value) if name in more]
    members += [name for name in _documented_members(entry.value) if name not in members]
    if entry.name.rpartition(".")[2] in inheriting:
        yield from ("   :members:", "   :inherited-members:")
    elif members:
        yield f"   :members: {', '.join(members)}"


class PublicNames(SphinxDirective):
    """``{public} MODULE``: what a module is for, and the public names of its page."""

    required_arguments = 1
    option_spec: ClassVar = {"members": directives.unchanged, "inherit": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        text = StringList(["```{eval-rst}", *self._lines(), "```"], source=self.arguments[0])
        container = nodes.container()
        self.state.nested_parse(text, self.content_offset, container)
        return container.children

    def _lines(self) -> Iterator[str]:
        module = importlib.import_module(self.arguments[0])
        yield from (f".. automodule:: {module.__name__}", "   :no-members:", "")
        found = entries_of(module)
        if elsewhere := [entry.name for entry in found if entry.module != module.__name__]:
            links = ", ".join(f":py:obj:`~{name}`" for name in elsewhere)
            yield from (f"Also here, and described elsewhere: {links}.", "")
        more, inheriting = (self.options.get(key, "").split() for key in self.option_spec)
        for entry in found:
            if entry.module == module.__name__:
                yield from _autodoc(entry, more, inheriting)
        yield ""


class Modules(SphinxDirective):
    """``{modules}``: a list of modules, each with a link to its page and what it is for."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        modules = map(importlib.import_module, self.content)
        lines = [
            f"- {{py:mod}}`{m.__name__}`: {(m.__doc__ or '').splitlines()[0]}" for m in modules
        ]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="modules"), self.content_offset, container)
        return container.children


def _drop_docstring_of_type(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Drop the docstring of its type where a constant has none of its own."""
    if what == "data" and lines == prepare_docstring(getattr(value, "__doc__", None) or ""):
        lines.clear()


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("autodoc-process-docstring", _drop_docstring_of_type, priority=400)
    app.add_directive("public", PublicNames)
    app.add_directive("modules", Modules)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
