"""What the pages were built from, so that a check can tell whether they are those of the sources.

Times of files would not do: a checkout or a copy changes them and nothing else. Run as a program,
it exits with 1 unless the pages are those of the sources, and no chapter has to run.
"""

import hashlib
import sys
from pathlib import Path

from sphinx.application import Sphinx

STAMP = ".sources"
PATTERNS = (
    "_*.yml",
    "constraints.txt",
    "book/**/*.md",
    "book/**/*.bib",
    "book/locale/**/*.po",
    "book/_*/*",
    "book/results/*",
    "book/figures/*",
    "ewc_lib/**/*.py",
    "tests/**/*.py",
    "_build/latex/*.pdf",
    "_build/zh/_build/latex/*.pdf",
)


def digest(root: Path) -> str:
    """Return a hash of all files that the pages follow from, by name and content."""
    files = {path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()}
    total = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def is_current(root: Path) -> bool:
    """Whether the pages follow from the sources as they are now."""
    stamp = root / "_build" / "html" / STAMP
    return stamp.is_file() and stamp.read_text("utf-8") == digest(root)


def _note(app: Sphinx) -> None:
    """Note the sources before they are read: what changes after that is not on the pages."""
    if app.builder.format == "html":
        before = digest(Path(app.srcdir))
        app.connect("build-finished", lambda app, error: _stamp(app, error, before))


def _stamp(app: Sphinx, error: Exception | None, before: str) -> None:
    if not error:
        (Path(app.outdir) / STAMP).write_text(before, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("builder-inited", _note)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    from execution import cached, changed

    sys.exit(not is_current(Path(__file__).parents[2]) or bool(changed(cached())))
