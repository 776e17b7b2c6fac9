"""Where results are read and written, in a checkout and in an installed package."""

import runpy
import shutil
from pathlib import Path

from ewc_lib.experiments.runs import folders

BOOK = Path(__file__).parents[3] / "book" / "results"


def installed(site: Path) -> dict[str, object]:
    """Return the names of the module, as it is in a package that was installed into a folder."""
    package = site / "ewc_lib" / "experiments" / "runs"
    shutil.copytree(BOOK, package / "results")
    shutil.copy(folders.__file__, package)
    return runpy.run_path(str(package / "folders.py"))


def test_a_checkout_reads_and_writes_the_results_of_the_book():
    assert folders.RESULTS == folders.OUTPUT == BOOK


def test_an_installed_package_reads_its_copy(tmp_path):
    assert (
        installed(tmp_path)["RESULTS"] == tmp_path / "ewc_lib" / "experiments" / "runs" / "results"
    )


def test_an_installed_package_writes_to_the_working_directory(tmp_path):
    assert installed(tmp_path)["OUTPUT"] == Path("results")
