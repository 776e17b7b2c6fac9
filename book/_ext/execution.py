"""How the chapters run: what their kernels inherit, and when a cached result is stale.

The cache of executed chapters compares only the text of a chapter. A change of the package, of
the measured tables or of the data would leave old numbers on the page, so the name of the cache
folder carries a fingerprint of all of them.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config


def _ingredients(root: Path) -> Iterator[Path]:
    yield from sorted((root / "ewc_lib").rglob("*.py"))
    yield from sorted((root / "book" / "results").rglob("*.json"))
    yield root / "constraints.txt"


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256(os.environ.get("EWC_DATA", "").encode())
    for path in _ingredients(root):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _prepare(app: Sphinx, config: Config) -> None:
    root = Path(app.srcdir)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("EWC_FIGURES", str(root / "book" / "figures"))
    caches = Path(app.outdir).parent / "cache"
    current = caches / _fingerprint(root)
    for stale in caches.glob("*"):
        if stale != current:
            shutil.rmtree(stale)
    config.nb_execution_cache_path = str(current)


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _prepare)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
