import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ewc_lib.experiments.runs import provenance as module
from ewc_lib.experiments.runs.provenance import VARYING, differences, provenance


def record(**options):
    return provenance(seeds=[0, 1], wall_seconds=2.0, **options)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a package in a git repository of its own, all of it committed."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("one = 1\n")
    (tmp_path / "README.md").write_text("text\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(module, "PACKAGE", package)
    return package


def test_it_is_ready_for_json():
    found = record(packages=["pytest"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_code_is_that_of_the_commit(repository):
    head = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert (record()["commit"], record()["dirty"]) == (commit, False)


def test_changed_code_is_told_and_changed_text_elsewhere_is_not(repository):
    before = record()
    (repository.parent / "README.md").write_text("more text\n")
    assert differences(before, record()) == []
    (repository / "code.py").write_text("one = 2\n")
    assert [change.split()[0] for change in differences(before, record())] == ["dirty", "source"]


def test_outside_a_repository_the_source_still_tells_versions_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "code.py").write_text("one = 1\n")
    before = record()
    (tmp_path / "code.py").write_text("one = 2\n")
    assert (before["commit"], before["dirty"]) == (None, None)
    assert [change.split()[0] for change in differences(before, record())] == ["source"]


def test_versions_name_what_is_missing():
    versions = record(packages=["pytest", "no-such-package"])["versions"]
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-package"] is None


def test_threads_are_those_in_use():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert record()["threads"]["torch"] == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("experiments/__main__.py", "python -m ewc_lib.experiments a 'b c'"),
        ("bin/pytest", "pytest a 'b c'"),
    ],
)
def test_the_command_shows_no_folder_of_this_machine(program, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path.home() / program), "a", "b c"])
    assert record()["command"] == shown


def test_date_command_and_duration_may_differ():
    before = record()
    assert differences(before, before | dict.fromkeys(VARYING)) == []


def test_what_is_new_or_gone_is_a_difference():
    assert differences({"a": {"b": 1}}, {"c": 2}) == [
        "a.b was 1 and is None",
        "c was None and is 2",
    ]
