"""The notebook beside each chapter is the chapter, without outputs, and is never edited by hand."""

from pathlib import Path

import nbformat
import pytest
from notebook_pairs import BOOK, chapters, notebook_text


@pytest.fixture(params=chapters(), ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_notebook_is_what_its_chapter_says(chapter: Path) -> None:
    notebook = chapter.with_suffix(".ipynb")
    assert notebook.exists(), "run `make notebooks`"
    assert notebook.read_text(encoding="utf-8") == notebook_text(chapter), "run `make notebooks`"


def test_notebook_is_valid_and_holds_no_output(chapter: Path) -> None:
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_every_notebook_has_its_chapter() -> None:
    found = {path for path in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert found == {path.with_suffix(".ipynb") for path in chapters()}
