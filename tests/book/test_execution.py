"""Chapters that have changed are executed, the others are not, and what fails is not kept."""

from pathlib import Path
from types import SimpleNamespace

import execution
import nbformat
import pytest
from execution import cached, changed, code_of, execute
from jupyter_cache.cache.main import JupyterCacheBase
from myst_nb.core.read import read_myst_markdown_notebook
from notebook_pairs import chapters, notebook_text
from prose import page_name

HEADER = "---\nkernelspec:\n  display_name: Python 3\n  language: python\n  name: python3\n---\n"
CELL = "\n```{code-cell} ipython3\n:tags: [hide-input]\n\n{code}\n```\n"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JupyterCacheBase:
    """Return an empty cache, for chapters in a folder of their own."""
    monkeypatch.setattr(execution, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(execution, "chapters", lambda: sorted(tmp_path.glob("*.md")))
    monkeypatch.setattr(execution, "page_name", lambda path: path.stem)
    monkeypatch.setattr(execution, "fingerprint", lambda code: "as ever")
    return cached()


def write(folder: Path, name: str, *cells: str) -> Path:
    path = folder / f"{name}.md"
    path.write_text(HEADER + "".join(CELL.replace("{code}", code) for code in cells))
    return path


def test_a_chapter_that_fails_shows_its_traceback_and_only_the_others_are_kept(
    tmp_path: Path, store: JupyterCacheBase, capfd: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path, "good", "x = 1", "print(x + 1)")
    bad = write(tmp_path, "bad", "x = 1", "y = x / (x - 1)", "print('not reached')")
    assert changed(store).keys() == {good, bad}
    assert not execute()
    shown = capfd.readouterr().out
    assert "ZeroDivisionError" in shown
    assert "y = x / (x - 1)" in shown
    assert changed(store).keys() == {bad}
    (kept,) = store.list_cache_records()
    assert kept.uri == "good"
    outputs = [cell.outputs for cell in store.get_cache_bundle(kept.pk).nb.cells]
    assert outputs[1][0].text == "2\n"
    assert 0 < kept.data["execution_seconds"] < 300
    bad.unlink()
    assert execute()  # nothing is left to do
    assert capfd.readouterr().out == ""


def keep_as_if_executed(store: JupyterCacheBase, chapter: Path, now: str = "as ever") -> None:
    notebook = nbformat.reads(notebook_text(chapter), as_version=4)
    for count, cell in enumerate(notebook.cells[1:], 1):
        cell.execution_count = count
    executed = chapter.with_suffix(".executed")
    nbformat.write(notebook, executed)
    execution.keep(store, chapter, executed, now)


def test_a_chapter_has_changed_if_its_code_has(tmp_path: Path, store: JupyterCacheBase) -> None:
    chapter = write(tmp_path, "a", "x = 1")
    keep_as_if_executed(store, chapter)
    assert changed(store) == {}
    chapter.write_text(chapter.read_text() + "\nMore text.\n")
    assert changed(store) == {}
    write(tmp_path, "a", "x = 2")
    assert changed(store).keys() == {chapter}


def test_outputs_of_another_fingerprint_are_dropped(
    tmp_path: Path, store: JupyterCacheBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    chapter = write(tmp_path, "a", "x = 1")
    keep_as_if_executed(store, chapter)
    monkeypatch.setattr(execution, "fingerprint", lambda code: "another")
    assert changed(store) == {chapter: "another"}
    assert store.list_cache_records() == []


@pytest.mark.parametrize("damage", ["not a notebook", None])
def test_damaged_or_deleted_outputs_are_made_again(
    damage: str | None, tmp_path: Path, store: JupyterCacheBase
) -> None:
    chapter = write(tmp_path, "a", "x = 1")
    keep_as_if_executed(store, chapter)
    (kept,) = (tmp_path / "cache").rglob("base.ipynb")
    kept.unlink() if damage is None else kept.write_text(damage)
    assert changed(store).keys() == {chapter}
    keep_as_if_executed(store, chapter)
    assert changed(store) == {}


def test_a_chapter_that_glues_a_name_twice_is_not_kept_and_the_name_is_told(
    tmp_path: Path, store: JupyterCacheBase, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"once": ["a", "b"], "twice": ["a", "b", "a"]}
    for stem, glued in names.items():
        chapter = write(tmp_path, stem, "x = 1")
        notebook = nbformat.reads(notebook_text(chapter), as_version=4)
        notebook.cells[1].execution_count = 1
        notebook.cells[1].outputs = [
            nbformat.v4.new_output("display_data", metadata={"scrapbook": {"name": name}})
            for name in glued
        ]
        executed = chapter.with_suffix(".executed")
        nbformat.write(notebook, executed)
        execution.keep(store, chapter, executed, "as ever")
    assert [record.uri for record in store.list_cache_records()] == ["once"]
    assert capsys.readouterr().out == "twice glues twice: a\n"


def test_a_chapter_that_nobody_ran_is_told(
    tmp_path: Path, store: JupyterCacheBase, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write(tmp_path, "a", "x = 1")
    monkeypatch.setattr(execution, "_run", lambda notebooks, workers: True)
    assert not execute()
    assert "These did not run to the end: a" in capsys.readouterr().out


def test_the_pages_read_every_chapter_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f"book/{page_name(chapter)}" for chapter in chapters()}
    environment = SimpleNamespace(found_docs=found | {"book/intro"})
    assert set(execution._outdated(None, environment)) == found


def test_a_chapter_whose_last_cells_were_not_reached_is_not_kept(
    tmp_path: Path, store: JupyterCacheBase
) -> None:
    chapter = write(tmp_path, "a", "x = 1", "y = 2")
    notebook = nbformat.reads(notebook_text(chapter), as_version=4)
    notebook.cells[1].execution_count = 1
    executed = tmp_path / "a.executed"
    nbformat.write(notebook, executed)
    execution.keep(store, chapter, executed, "as ever")
    assert store.list_cache_records() == []


@pytest.mark.parametrize("chapter", chapters(), ids=page_name)
def test_the_pages_find_what_nbmake_has_run(chapter: Path, store: JupyterCacheBase) -> None:
    text = chapter.read_text("utf-8")
    page = read_myst_markdown_notebook(text, path=chapter)
    notebook = nbformat.reads(notebook_text(chapter), as_version=4)
    assert code_of(page) == code_of(notebook)
    assert store.create_hashed_notebook(page)[1] == store.create_hashed_notebook(notebook)[1]
