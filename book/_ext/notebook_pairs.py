"""The notebook beside each chapter, made from the chapter's text.

Run as a program it writes all of them. A notebook holds no output, and its bytes follow from the
text alone: a cell is named by what it says.
"""

from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import jupytext
import nbformat
import yaml
from prose import BOOK
from readable import readable

NOTE = """*A chapter of the book "Fisher Information and Elastic Weight Consolidation". It needs
`ewc_lib`; where that is missing, as on Colab, begin with `%pip install git+` and the address of the
repository. Names in ⟨angle brackets⟩ stand for numbers that the cells compute.*"""
"""What a notebook says first."""


def chapters() -> list[Path]:
    """Return the pages that run code, which are those that name a kernel."""
    pages = sorted(path for path in BOOK.rglob("*.md") if "/." not in path.as_posix())
    return [page for page in pages if "\nkernelspec:\n" in page.read_text(encoding="utf-8")]


def opening() -> str:
    """Return the note that a notebook begins with, and the macros of the formulas."""
    settings = yaml.safe_load((BOOK.parent / "_config.yml").read_text(encoding="utf-8"))
    macros = settings["sphinx"]["config"]["latex_elements"]["preamble"].strip()
    return f"{NOTE}\n\n$${macros}$$"


def say_plainly(notebook: nbformat.NotebookNode, values: Mapping[str, float] | None = None) -> None:
    """Begin a notebook with the note, and turn its text into plain Markdown.

    Parameters
    ----------
    notebook
        A chapter; changed in place.
    values
        What its cells have computed, by name.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = readable(cell.source, values)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(opening()))


def notebook_text(chapter: Path) -> str:
    """Return the text of the notebook that belongs beside ``chapter``."""
    notebook = jupytext.read(chapter)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    notebook.nbformat_minor = 5
    say_plainly(notebook)
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        name = sha256(cell.source.encode()).hexdigest()[:12]
        seen[name] += 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for chapter in chapters():
        chapter.with_suffix(".ipynb").write_text(notebook_text(chapter), encoding="utf-8")
