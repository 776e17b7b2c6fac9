"""The chapters are executed once, by nbmake, and their outputs kept for all who need them.

`execute` runs the chapters that have changed since they last ran, some at a time, and puts their
outputs into the cache from which the pages are built. The cache compares the cells of a chapter;
a fingerprint of all else that its outputs depend on lies beside them.

Run as a program, it executes what has changed. With `--list` it names that instead, and with
`--record` it writes down how long each chapter took, for the next one who waits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from fingerprints import ROOT, fingerprint
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, NbValidityError
from jupyter_cache.cache.db import NbCacheRecord
from jupyter_cache.cache.main import JupyterCacheBase
from nbformat import NotebookNode
from nbformat.reader import NotJSONError
from notebook_pairs import chapters, notebook_text
from prose import page_name
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

CACHE = ROOT / "_build" / ".jupyter_cache"  # where Jupyter Book looks for it
SECONDS = ROOT / "book" / "results" / "chapter_seconds.json"
LIMIT = 100  # executed notebooks in the cache; the oldest go first
SIGN_OF_LIFE = 15  # seconds


def execute() -> bool:
    """Execute the chapters that have changed, and say whether all of them ran to the end."""
    store = cached()
    waiting = changed(store)
    if not waiting:
        return True
    order = sorted(waiting, key=lambda chapter: -expected_seconds(chapter))
    workers = min(len(order), os.cpu_count() or 1)
    about = sum(map(expected_seconds, order)) / workers
    _say(f"Executing {len(order)} chapters, {workers} at a time: {about:.0f} seconds or more")
    with TemporaryDirectory() as folder:
        copies = {c: Path(folder) / f"{page_name(c)}.ipynb" for c in order}
        for chapter, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(notebook_text(chapter), encoding="utf-8")
        passed = _run(list(copies.values()), workers)
        for chapter, copy in copies.items():
            keep(store, chapter, copy, waiting[chapter])
    if left := changed(store):
        _say(f"These did not run to the end: {', '.join(map(page_name, left))}")
    return passed and not left


def cached() -> JupyterCacheBase:
    """Return the cache of executed chapters."""
    store = get_cache(CACHE)
    store.change_cache_limit(LIMIT)
    return store


def changed(store: JupyterCacheBase) -> dict[Path, str]:
    """Return the chapters whose outputs are not in the cache, with their fingerprints.

    Outputs of another fingerprint are dropped from it, so that no page can show them.
    """
    found = {}
    for chapter in chapters():
        notebook = nbformat.reads(notebook_text(chapter), as_version=4)
        now = fingerprint(code_of(notebook))
        record = _record(store, notebook)
        if record is not None and record.data.get("fingerprint") == now and _whole(store, record):
            continue
        if record is not None:
            _drop(store, record)
        found[chapter] = now
    return found


def code_of(notebook: NotebookNode) -> str:
    """Return the code of all cells."""
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def _record(store: JupyterCacheBase, notebook: NotebookNode) -> NbCacheRecord | None:
    try:
        return store.match_cache_notebook(notebook)
    except KeyError:
        return None


def _whole(store: JupyterCacheBase, record: NbCacheRecord) -> bool:
    """Whether the outputs can be read, which someone may have deleted or damaged."""
    try:
        return bool(store.get_cache_bundle(record.pk).nb.cells)
    except (KeyError, NotJSONError):
        return False


def _drop(store: JupyterCacheBase, record: NbCacheRecord) -> None:
    """Forget outputs, and what is left of them."""
    NbCacheRecord.remove_records([record.pk], store.db)
    shutil.rmtree(CACHE / "executed" / record.hashkey, ignore_errors=True)


def expected_seconds(chapter: Path) -> float:
    """Return how long a chapter took where that was written down."""
    known: dict[str, float] = json.loads(SECONDS.read_text("utf-8"))["seconds"]
    return known.get(page_name(chapter), max(known.values(), default=0.0))


def _run(notebooks: list[Path], workers: int) -> bool:
    """Run notebooks in their place by nbmake, with a sign of life now and then."""
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "--verbose"]
    command += [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    command += [
        f"--numprocesses={workers}",
        "--dist=load",
        "--maxschedchunk=1",
        *map(str, notebooks),
    ]
    settings = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    settings |= os.environ
    settings.pop("PYTEST_ADDOPTS", None)
    if data := settings.get("EWC_DATA"):  # the kernels start elsewhere
        settings["EWC_DATA"] = str(Path(data).expanduser().absolute())
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=settings) as process:
        while True:
            try:
                return process.wait(SIGN_OF_LIFE) == 0
            except KeyboardInterrupt:
                process.terminate()
                raise
            except subprocess.TimeoutExpired:
                _say(f"\n... {time.monotonic() - start:.0f} seconds")


def _say(words: str) -> None:
    print(words, flush=True)


def keep(store: JupyterCacheBase, chapter: Path, executed: Path, now: str) -> None:
    """Put the outputs of a chapter into the cache, unless it failed or glued a name twice."""
    notebook = nbformat.read(executed, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return
    if twice := glued_twice(cells):
        _say(f"{page_name(chapter)} glues twice: {', '.join(twice)}")
        return
    data = {"fingerprint": now, "execution_seconds": _seconds(cells)}
    for cell in cells:  # the cache compares metadata, too, and a chapter has no times
        cell.metadata.pop("execution", None)
    try:
        store.cache_notebook_bundle(
            CacheBundleIn(notebook, page_name(chapter), data=data), overwrite=True
        )
    except NbValidityError:  # some cells were never reached
        return


def glued_twice(cells: list[NotebookNode]) -> list[str]:
    """Return the names that cells glue more than once, of which a page shows the last value."""
    found = (output.get("metadata", {}) for cell in cells for output in cell.outputs)
    names = Counter(data["scrapbook"]["name"] for data in found if "scrapbook" in data)
    return [name for name, count in names.items() if count > 1]


def _seconds(cells: list[NotebookNode]) -> float:
    """Return the time from the start of the first cell to the end of the last."""
    times = [
        datetime.fromisoformat(moment)
        for cell in cells
        for moment in cell.metadata.get("execution", {}).values()
    ]
    return (max(times) - min(times)).total_seconds() if times else 0.0


def write_down() -> None:
    """Write down how long the chapters took that are in the cache."""
    from ewc_lib.experiments.runs.provenance import provenance

    store, seconds = cached(), {}
    for chapter in chapters():
        record = _record(store, nbformat.reads(notebook_text(chapter), as_version=4))
        if record is not None:
            seconds[page_name(chapter)] = round(record.data["execution_seconds"], 1)
    origin = provenance(seeds=[], wall_seconds=sum(seconds.values()))
    text = json.dumps({"seconds": seconds, "provenance": origin}, indent=1)
    SECONDS.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Execute what has changed, or list it, or write down the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--list", action="store_true", help="name the changed chapters, run nothing")
    task.add_argument("--record", action="store_true", help=f"write {SECONDS.name}")
    chosen = parser.parse_args()
    if chosen.list:
        print(*map(page_name, changed(cached())), sep="\n")
    elif chosen.record:
        write_down()
    else:
        return 0 if execute() else 1
    return 0


def _execute(app: Sphinx, config: Config) -> None:
    if not execute():
        raise ExtensionError("some chapters did not run to the end")


def _outdated(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
    """Read the chapters again in every build: their outputs may be others than in the last one."""
    names = (f"book/{page_name(chapter)}" for chapter in chapters())
    return [name for name in names if name in env.found_docs]


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", _execute)
    app.connect("env-get-outdated", _outdated)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    sys.exit(main())
