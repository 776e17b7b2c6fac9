"""What the pages were built from, so that a check can tell whether they are those of the sources.

Times of files would not do: a checkout or a copy changes them and nothing else.
"""

import hashlib
from pathlib import Path

from sphinx.application import Sphinx

STAMP = ".sources"
PATTERNS = (
    "_*.yml",
    "book/**/*.md",
    "book/**/*.bib",
    "book/_*/*",
    "book/results/*",
    "ewc_lib/**/*.py",
)


def digest(root: Path) -> str:
    """Return a hash of all files that the pages follow from, by name and content."""
    files = {path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()}
    total = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _stamp(app: Sphinx, error: Exception | None) -> None:
    if not error and app.builder.format == "html":
        (Path(app.outdir) / STAMP).write_text(digest(Path(app.srcdir)), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("build-finished", _stamp)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
