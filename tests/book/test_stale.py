"""A number on a page follows the package: where the package changes, the number changes too."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prose import BOOK, code_of, parts

ROOT = BOOK.parent
CHAPTER = BOOK / "foundations" / "score.md"
CONSTANT = ("test_fraction: float = 0.2", "test_fraction: float = 0.5")
# Stands in for the real one: keeps the numbers, and ends the chapter when it has seen the last.
GLUE = """
import json, sys
found = {}
def glue(key, value, display=True):
    found[key] = value
    if key == "right-all":
        print(json.dumps(found)), sys.stdout.flush(), sys.exit()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return the folder of a copy of the package."""
    shutil.copytree(ROOT / "ewc_lib", tmp_path / "ewc_lib")
    (tmp_path / "myst_nb.py").write_text(GLUE)
    return tmp_path


def change(package: Path) -> None:
    path = package / "ewc_lib" / "data.py"
    text = path.read_text("utf-8")
    assert text.count(CONSTANT[0]) == 1
    path.write_text(text.replace(*CONSTANT), "utf-8")


def glued(package: Path) -> dict[str, float]:
    """Run the chapter on a copy of the package, up to its last number of interest."""
    cells = (part for part in parts(CHAPTER.read_text("utf-8")) if part.name == "code-cell")
    code = "\n".join(code_of(cell) for cell in cells)
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-O", "-c", code]  # what holds for the digits need not hold for others
    done = subprocess.run(run, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_changed_constant_of_the_package_changes_the_numbers_of_a_chapter(package: Path) -> None:
    before = glued(package)
    change(package)
    after = glued(package)
    assert (before["n-all"], after["n-all"]) == (360, 899)
    assert before["right-all"] < after["right-all"]
