"""What the outputs of a chapter depend on, besides its own cells.

These are the modules of the package that it imports, directly or not, the measured tables that it
or one of those modules names, the data set, and the pinned versions. Importing has no effect in
this package, so a module that is not imported cannot matter.
"""

import ast
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
from prose import BOOK

ROOT = BOOK.parent


def fingerprint(code: str) -> str:
    """Return a digest of all files that the outputs of some code depend on.

    Parameters
    ----------
    code
        The cells of a chapter.
    """
    digest = hashlib.sha256(f"{sys.version} {bool(os.environ.get('EWC_DATA'))}".encode())
    for path in [*ingredients(code), *data_files()]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def ingredients(code: str) -> list[Path]:
    """Return the files of the project that the outputs of some code depend on."""
    sources = [_source(module) for module in modules(code)]
    said = _strings(code).union(*(_strings(source.read_text("utf-8")) for source in sources))
    kept = [*(ROOT / "book" / "results").glob("*.json"), *(ROOT / "book" / "figures").glob("*.png")]
    read = [path for path in kept if path.stem in said]
    return sorted([*sources, *read, ROOT / "constraints.txt"])


def modules(code: str) -> set[str]:
    """Return the modules of the package that some code imports, directly or not."""
    known, found, waiting = _imports().modules, set[str](), list(_named(code))
    while waiting:
        module = waiting.pop()
        if module in known and module not in found:
            found.add(module)
            # A package hands out what it names for type checkers, when it is asked for it.
            graph = _imports(for_types=_source(module).name == "__init__.py")
            waiting += graph.find_modules_directly_imported_by(module)
            waiting.append(module.rpartition(".")[0])  # a package is imported before its modules
    return found


@cache
def _imports(for_types: bool = False) -> grimp.ImportGraph:
    return grimp.build_graph("ewc_lib", exclude_type_checking_imports=not for_types, cache_dir=None)


def _named(code: str) -> Iterator[str]:
    """Yield what is imported or called by its full name, be it a module or something in it."""
    for node in ast.walk(_parsed(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _parsed(code: str) -> ast.AST:
    """Parse some code; of a chapter that Python cannot read, its kernel will say more."""
    try:
        return ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.MULTILINE))
    except SyntaxError:
        return ast.Module([], [])


def _source(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    package = path / "__init__.py"
    return package if package.is_file() else path.with_suffix(".py")


@cache
def _strings(code: str) -> set[str]:
    """Return the strings in some code, as the names of files without their endings."""
    nodes = ast.walk(_parsed(code))
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = (string.rpartition("/")[2].removesuffix(".json") for string in strings)
    return {name.replace("-", "_") for name in names}


def data_files() -> list[Path]:
    """Return the files of the data set at the place that ``$EWC_DATA`` names, if any."""
    if not (named := os.environ.get("EWC_DATA")):
        return []
    place = Path(named).expanduser()
    files = [place] if place.is_file() else [*place.glob("*.npz"), *place.rglob("*-ubyte*")]
    return sorted(file for file in files if file.is_file())
