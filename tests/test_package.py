"""The package itself: what it offers, and what it costs to import."""

import subprocess
import sys
from pathlib import Path

import pytest

import ewc_lib


@pytest.mark.parametrize("name", ewc_lib.__all__)
def test_each_public_name_is_there_and_listed(name):
    assert getattr(ewc_lib, name) is not None
    assert name in dir(ewc_lib)


def test_modules_are_found_without_an_import_of_their_own():
    code = "import ewc_lib; print(ewc_lib.regularizers.L2.__name__, ewc_lib.fisher.__name__)"
    assert run(code) == "L2 ewc_lib.fisher"


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="'ewc_lib' has no attribute 'fishre'"):
        ewc_lib.fishre  # noqa: B018


def test_the_package_alone_does_not_import_torch():
    assert run("import sys, ewc_lib; print('torch' in sys.modules)") == "False"


def run(code):
    """Run some code in a new process, and return what it prints."""
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
