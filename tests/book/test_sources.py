"""Pages are told from those of other sources by content, and not by the time of a file."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from sources import STAMP, _note, _stamp, digest, is_current


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("_toc.yml", "book/part/a.md", "book/_ext/b.py", "ewc_lib/c.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", ["_toc.yml", "book/part/a.md", "book/_ext/b.py", "ewc_lib/c.py"])
def test_a_changed_or_removed_source_changes_the_stamp(root: Path, name: str) -> None:
    before = digest(root)
    (root / name).write_text("changed")
    changed = digest(root)
    (root / name).unlink()
    assert len({before, changed, digest(root)}) == 3


def test_a_new_time_or_a_file_beside_the_book_changes_nothing(root: Path) -> None:
    before = digest(root)
    os.utime(root / "book/part/a.md", (1, 1))
    (root / "README.md").write_text("changed")
    assert digest(root) == before


@pytest.mark.parametrize("error", [None, RuntimeError()])
def test_only_a_build_that_succeeds_leaves_a_stamp(root: Path, error: Exception | None) -> None:
    _stamp(SimpleNamespace(outdir=root), error, "before")
    assert (root / STAMP).is_file() == (error is None)


def test_pages_are_current_until_a_source_changes_even_while_they_are_built(root: Path) -> None:
    connected = {}
    app = SimpleNamespace(
        outdir=root / "_build" / "html",
        srcdir=root,
        builder=SimpleNamespace(format="html"),
        connect=connected.__setitem__,
    )
    app.outdir.mkdir(parents=True)
    assert not is_current(root)
    _note(app)
    connected["build-finished"](app, None)
    assert is_current(root)
    _note(app)
    (root / "ewc_lib/c.py").write_text("changed while the pages are built")
    connected["build-finished"](app, None)
    assert not is_current(root)
