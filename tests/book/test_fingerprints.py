"""A chapter is stale exactly if something that it depends on has changed."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat
import pytest
from execution import SECONDS, code_of
from fingerprints import ROOT, fingerprint, ingredients, modules
from notebook_pairs import chapters
from prose import page_name

CODE = {page_name(c): code_of(nbformat.read(c.with_suffix(".ipynb"), 4)) for c in chapters()}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of all files that outputs depend on, which are looked for there."""
    shutil.copytree(ROOT / "ewc_lib", tmp_path / "ewc_lib")
    for folder in ("results", "figures"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    monkeypatch.setattr("fingerprints.ROOT", tmp_path)
    monkeypatch.delenv("EWC_DATA", raising=False)
    return tmp_path


@pytest.fixture
def stale(project: Path) -> Callable[[Iterable[Path]], set[str]]:
    """Return a function that changes files and says which chapters are stale then."""

    def after(paths: Iterable[Path]) -> set[str]:
        before = {name: fingerprint(code) for name, code in CODE.items()}
        for path in paths:
            path.write_bytes(path.read_bytes() + b"\n")
        return {name for name, code in CODE.items() if fingerprint(code) != before[name]}

    return after


def test_nothing_is_stale_if_nothing_has_changed(stale) -> None:
    assert stale([]) == set()


def test_the_pinned_versions_concern_every_chapter(project: Path, stale) -> None:
    assert stale([project / "constraints.txt"]) == CODE.keys()


def test_the_fisher_information_concerns_every_chapter(project: Path, stale) -> None:
    assert stale([project / "ewc_lib" / "fisher" / "output.py"]) == CODE.keys()


def test_the_regularizers_concern_the_chapters_that_import_them(project: Path, stale) -> None:
    found = stale((project / "ewc_lib" / "regularizers").glob("*.py"))
    assert {"foundations/ewc", "practice/benchmarks", "practice/language_models"} <= found
    assert not {"foundations/likelihood", "foundations/score", "foundations/fisher"} & found


def test_a_measured_table_concerns_the_chapters_that_read_it(project: Path, stale) -> None:
    results = project / "book" / "results"
    assert stale([results / "fisher_cost.json"]) == {"practice/at_scale"}
    assert "practice/benchmarks" in stale([results / "split_mnist.json"])
    assert "practice/stability" in stale([results / "overhead.json"])


def test_a_stored_picture_concerns_the_chapter_that_compares_its_numbers(
    project: Path, stale
) -> None:
    assert stale([project / "book" / "figures" / "main_result.png"]) == {"foundations/ewc"}


def test_a_table_may_be_named_with_its_folder() -> None:
    path = ROOT / "book" / "results" / "overhead.json"
    assert path in ingredients("open('book/results/overhead.json')")


def test_a_place_without_a_data_set_is_not_the_same_as_none(monkeypatch) -> None:
    monkeypatch.delenv("EWC_DATA", raising=False)
    before = fingerprint("")
    monkeypatch.setenv("EWC_DATA", "nowhere")
    assert fingerprint("") != before


def test_code_that_python_cannot_read_is_left_to_its_kernel() -> None:
    assert modules("from ewc_lib import (") == set()


def test_every_measured_table_is_read_by_a_chapter() -> None:
    read = {path for code in CODE.values() for path in ingredients(code)}
    assert {*(ROOT / "book" / "results").glob("*.json")} - read == {SECONDS}


@pytest.mark.parametrize("place", ["mnist.npz", "MNIST/raw/train-images-idx3-ubyte"])
def test_the_data_set_concerns_every_chapter(
    place: str, project: Path, stale, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "data" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"some")
    without = fingerprint("")
    monkeypatch.setenv("EWC_DATA", str(project / "data"))
    assert fingerprint("") != without
    assert stale([path]) == CODE.keys()
    monkeypatch.setenv("EWC_DATA", str(path))
    assert fingerprint("") != without


def test_a_new_version_of_python_concerns_every_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint("")
    monkeypatch.setattr("sys.version", "4.0")
    assert fingerprint("") != before


@pytest.mark.parametrize(
    "code",
    [
        "import ewc_lib.regularizers.mas as m",
        "from ewc_lib.regularizers import mas",
        "from ewc_lib.regularizers.mas import MAS",
        "def f():\n    from ewc_lib.regularizers import MAS",
        "import ewc_lib\newc_lib.regularizers.mas.MAS",
        "import importlib\nimportlib.import_module('ewc_lib.regularizers.mas')",
        "%matplotlib inline\nfrom ewc_lib.regularizers.mas import MAS",
    ],
)
def test_an_import_is_followed_however_it_is_written(code: str) -> None:
    found = modules(code)
    assert {"ewc_lib", "ewc_lib.regularizers", "ewc_lib.regularizers.mas"} <= found
    assert "ewc_lib.fisher.output" in found  # and what these import in turn


def test_an_import_for_the_types_only_is_not_followed() -> None:
    assert "ewc_lib.regularizers.protocol" not in modules("from ewc_lib.continual import train")
