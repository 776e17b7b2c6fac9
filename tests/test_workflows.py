"""What the workflows promise: nothing is published that was not checked, and nothing half."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CHECKS = "./.github/workflows/checks.yml"
PUBLISHERS = {"ci": "actions/deploy-pages", "release": "pypa/gh-action-pypi-publish"}
"""By workflow, the action that publishes."""


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))


def names() -> list[str]:
    return sorted(path.stem for path in (ROOT / ".github" / "workflows").glob("*.yml"))


def steps(job: dict, key: str) -> list[str]:
    return [step[key] for step in job.get("steps", []) if key in step]


def publishing(name: str) -> list[str]:
    """Return the jobs of a workflow that publish something."""
    actions = tuple(PUBLISHERS.values())
    jobs = workflow(name)["jobs"]
    return [n for n, job in jobs.items() if any(u.startswith(actions) for u in steps(job, "uses"))]


def awaited(jobs: dict, name: str) -> set[str]:
    """Return all jobs that must be green before a job starts."""
    needs = jobs[name].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(awaited(jobs, other) for other in direct))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_only_the_known_workflows_publish() -> None:
    assert {name: len(publishing(name)) for name in names() if publishing(name)} == {
        name: 1 for name in PUBLISHERS
    }


@pytest.mark.parametrize("name", PUBLISHERS)
def test_publication_waits_for_the_checks_and_for_every_other_job(name: str) -> None:
    jobs = workflow(name)["jobs"]
    (last,) = publishing(name)
    assert awaited(jobs, last) == jobs.keys() - {last}
    assert CHECKS in {job.get("uses") for job in jobs.values()}


@pytest.mark.parametrize("name", PUBLISHERS)
def test_no_job_is_published_after_a_failure(name: str) -> None:
    jobs = [*workflow(name)["jobs"].values(), *workflow("checks")["jobs"].values()]
    conditions = [str(job.get("if", "")) for job in jobs]
    assert not [c for c in conditions if re.search(r"always|failure|cancelled", c)]
    assert not [job for job in jobs if "continue-on-error" in job]


@pytest.mark.parametrize("name", PUBLISHERS)
def test_publication_is_never_cancelled_midway(name: str) -> None:
    (last,) = publishing(name)
    assert workflow(name)["jobs"][last]["concurrency"]["cancel-in-progress"] is False
    assert "concurrency" not in workflow(name)


def test_superseded_checks_of_a_branch_are_cancelled() -> None:
    assert workflow("ci")["jobs"]["checks"]["concurrency"] == {
        "group": "checks-${{ github.ref }}",
        "cancel-in-progress": True,
    }


def test_pages_are_published_from_pushes_to_main_alone() -> None:
    ci = workflow("ci")
    assert ci[True]["push"] == {"branches": ["main"]}  # YAML reads the key `on` as true
    guarded = {n for n, job in ci["jobs"].items() if job.get("if") == "github.event_name == 'push'"}
    (last,) = publishing("ci")
    assert guarded & awaited(ci["jobs"], last)


@pytest.mark.parametrize("name", names())
def test_only_publication_may_write(name: str) -> None:
    parts = workflow(name)
    if name != "checks":
        assert parts["permissions"] == {"contents": "read"}
    writing = [n for n, job in parts["jobs"].items() if "permissions" in job]
    assert writing == publishing(name)


def test_a_release_is_tagged_with_the_version_of_the_package() -> None:
    release = workflow("release")
    assert release[True] == {"push": {"tags": ["v*"]}}
    (check,) = steps(release["jobs"]["version"], "run")
    assert '"v$version"' in check
    assert "version" in awaited(release["jobs"], "checks")


def test_what_is_released_is_what_was_installed_and_tried() -> None:
    package = workflow("checks")["jobs"]["package"]
    assert ".ci/package" in steps(package, "run")
    (uploaded,) = (step["with"]["name"] for step in package["steps"] if "with" in step)
    (last,) = publishing("release")
    fetched, _ = workflow("release")["jobs"][last]["steps"]
    assert fetched["with"]["name"] == uploaded


def test_the_oldest_versions_are_those_that_the_package_allows() -> None:
    (install,) = (r for r in steps(workflow("checks")["jobs"]["oldest"], "run") if "pip" in r)
    extras = project()["optional-dependencies"]
    needed = [*project()["dependencies"], *extras["experiments"], *extras["transformers"]]
    lowest = {
        f"{requirement.name}=={bound.version}.*"
        for requirement in map(Requirement, needed)
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert {word for word in shlex.split(install) if "==" in word} == lowest


def test_the_oldest_versions_run_the_tests_of_the_core() -> None:
    (command,) = (c for c in steps(workflow("checks")["jobs"]["oldest"], "run") if "pytest" in c)
    tested = {path for word in shlex.split(command)[1:] for path in ROOT.glob(word)}
    floors = ("likelihood", "score", "fisher", "regularizers", "continual")
    assert {ROOT / "tests" / floor for floor in floors} <= tested
    assert set((ROOT / "tests").glob("test_*.py")) <= tested


def test_the_versions_of_python_are_allowed_and_begin_with_the_oldest() -> None:
    versions = workflow("checks")["jobs"]["test"]["strategy"]["matrix"]["python"]
    allowed = SpecifierSet(project()["requires-python"])
    assert [v for v in versions if not allowed.contains(v)] == []
    assert f">={versions[0]}" == project()["requires-python"]


def test_a_hook_runs_each_command_of_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    commands = re.findall(r"^\t@?\$\(BIN\)/(.*)", recipe[1], re.MULTILINE)
    assert commands
    assert [c for c in commands if not f".venv/bin/{c}".startswith(tuple(entries))] == []


def test_workflows_make_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(texts))) <= targets
