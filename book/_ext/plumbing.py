"""Pages without plumbing: what a cell does for the text or the register of claims is not shown.

Readers see neither statements that only glue, nor `# checks:` comments, nor cells of which nothing
else is left. What is executed, and the notebook, keep them. The bar of a folded cell says what it
folds: the code of what is shown below it, or, where nothing is shown, what it does.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from claims import CHECKS
from docutils import nodes
from sphinx.application import Sphinx
from translation import LANGUAGE

_BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.FunctionDef)


def visible(cells: list[str]) -> list[str]:
    """Return what is shown of the cells of a chapter; of a cell of plumbing alone, nothing."""
    trees = [ast.parse(cell) for cell in cells]
    chapter = _Chapter([statement for tree in trees for statement in tree.body])
    return [
        _without(cell, set(chapter.hidden(tree.body)))
        for cell, tree in zip(cells, trees, strict=True)
    ]


class _Chapter:
    """Knows what is plumbing among the statements of a chapter."""

    def __init__(self, statements: list[ast.stmt]) -> None:
        self.statements, self.glues = statements, {"glue"}
        for statement in statements:
            if isinstance(statement, ast.FunctionDef) and self.glue_only(statement, statement):
                self.glues.add(statement.name)

    def hidden(self, body: Iterable[ast.AST], around: ast.stmt | None = None) -> Iterator[int]:
        """Yield the lines of plumbing in the body of a statement of the chapter."""
        for node in body:
            if isinstance(node, ast.stmt) and self.glue_only(node, around or node):
                yield from range(node.lineno, node.end_lineno + 1)
            else:
                yield from self.hidden(ast.iter_child_nodes(node), around or node)

    def glue_only(self, node: ast.stmt, around: ast.stmt) -> bool:
        """Whether a statement glues, or is a block that glues and sets what nothing else uses."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return getattr(node.value.func, "id", "") in self.glues
        if isinstance(node, ast.ImportFrom):
            return node.module == "myst_nb"
        if not isinstance(node, _BLOCKS):
            return False
        inside = [*node.body, *getattr(node, "orelse", ())]
        rest = [part for part in inside if not self.glue_only(part, around)]
        return len(rest) < len(inside) and all(self._is_private(p, node, around) for p in rest)

    def _is_private(self, part: ast.stmt, block: ast.stmt, around: ast.stmt) -> bool:
        if not isinstance(part, ast.Assign) or any(map(_is_item, ast.walk(part))):
            return False
        within, whole = _loads(block), _loads(around)
        return not any(
            within[name] < whole[name] or self._is_used_after(name, around)
            for name in _stores(part)
        )

    def _is_used_after(self, name: str, around: ast.stmt) -> bool:
        """Whether a later statement uses the value that one of the chapter gives to a name."""
        if isinstance(around, ast.FunctionDef):
            return False
        for statement in self.statements[self.statements.index(around) + 1 :]:
            if name in _stores(statement) or _loads(statement)[name]:
                return name not in _stores(statement)
        return False


def _loads(part: ast.stmt) -> Counter[str]:
    return Counter(n.id for n in ast.walk(part) if _is_name(n, ast.Load))


def _stores(part: ast.stmt) -> set[str]:
    names = {n.id for n in ast.walk(part) if _is_name(n, ast.Store)}
    return names | {n.arg for n in ast.walk(part) if isinstance(n, ast.arg)}


def _is_item(node: ast.AST) -> bool:
    """Whether a node is a part of an object that an assignment changes."""
    kinds = ast.Subscript, ast.Attribute
    return isinstance(node, kinds) and isinstance(node.ctx, ast.Store)


def _is_name(node: ast.AST, context: type[ast.expr_context]) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def _without(cell: str, hidden: set[int]) -> str:
    """Leave lines out of a cell, and the blank lines that would follow one another."""
    shown, left_out = list[str](), False
    for number, line in enumerate(cell.splitlines(), 1):
        if number in hidden or CHECKS.match(line):
            left_out = True
        elif line.strip() or not (left_out and (not shown or not shown[-1].strip())):
            shown.append(line)
            left_out = left_out and not line.strip()
    text = "\n".join(shown).rstrip()
    return text if re.search(r"^\s*[^#\s]", text, re.MULTILINE) else ""


def _hide(app: Sphinx, document: nodes.document) -> None:
    inputs = [c for c in document.findall(nodes.container) if c.get("nb_element") == _INPUT]
    for source, text in zip(inputs, visible([i.astext() for i in inputs]), strict=True):
        cell = source.parent
        if text:
            source[0].rawsource, source[0][:] = text, [nodes.Text(text)]
        else:
            cell.remove(source)
        if not cell.children:
            cell.parent.remove(cell)
        elif cell.get("hide_mode"):
            name = "{type}" if len(cell.children) > 1 else folded(text)
            cell["prompt_show"], cell["prompt_hide"] = _prompts(name, app.config.language)


def _prompts(name: str, language: str) -> tuple[str, str]:
    if language == LANGUAGE:
        return f"显示{_IN_CHINESE[name]}", f"隐藏{_IN_CHINESE[name]}"
    return f"Show the {name}", f"Hide the {name}"


def folded(text: str) -> str:
    """Say what a cell without an output does."""
    if text.startswith(("import ", "from ")):
        return "preparation"
    return "check" if re.search(r"^\s*assert\b", text, re.MULTILINE) else "computation"


_IN_CHINESE = {"preparation": "准备代码", "check": "检验", "computation": "计算", "{type}": "代码"}
_INPUT = "cell_code_source"


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("doctree-read", _hide)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
