"""The files around the package agree with one another, and with what is there."""

import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ewc_lib
from ewc_lib.experiments.runs import folders

ROOT = Path(__file__).parents[1]


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[Requirement]:
    """Return all that pyproject.toml asks for, the project itself left out.

    The extra ``peers`` is none of it: what is only compared with is not pinned here.
    """
    extras = {n: lines for n, lines in project()["optional-dependencies"].items() if n != "peers"}
    lists = [project()["dependencies"], *extras.values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in found if requirement.name != project()["name"]]


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def releases() -> list[tuple[str, str]]:
    """Return version and date of each release in the changelog."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    return re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would track, or nothing outside a git repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_each_requirement_stands_once() -> None:
    names = [canonicalize_name(requirement.name) for requirement in requirements()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_tested_version_is_in_the_allowed_range(requirement: Requirement) -> None:
    version = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_tested_versions_are_public_ones() -> None:
    assert [name for name, version in constraints().items() if version.local] == []


def test_environment_repeats_nothing() -> None:
    conda = read_yaml("environment.yml")["dependencies"]
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    names = [re.split("[=<>]", entry)[0] for entry in conda if isinstance(entry, str)]
    assert names == ["python", "pip"]
    assert pip == ["-e .[book,test]"]
    assert not set(names) & {requirement.name for requirement in requirements()}


def test_environment_has_an_allowed_python() -> None:
    (python,) = (
        entry for entry in read_yaml("environment.yml")["dependencies"] if "python" in entry
    )
    wanted = Requirement(f"python{project()['requires-python']}")
    assert wanted.specifier.contains(python.split("=")[1])


def test_each_entry_of_the_contents_exists() -> None:
    contents = read_yaml("_toc.yml")
    pages = [contents["root"]]
    pages += [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    missing = [page for page in pages if not (ROOT / page).with_suffix(".md").is_file()]
    assert missing == []


def test_a_page_is_named_with_its_ending_exactly_if_it_runs_code() -> None:
    for part in read_yaml("_toc.yml")["parts"]:
        for chapter in part["chapters"]:
            text = (ROOT / chapter["file"]).with_suffix(".md").read_text(encoding="utf-8")
            assert ("\nkernelspec:" in text) == chapter["file"].endswith(".md"), chapter["file"]


def test_both_lists_of_macros_define_the_same_macros() -> None:
    settings = read_yaml("_config.yml")["sphinx"]["config"]
    web = settings["mathjax3_config"]["tex"]["macros"]
    paper = dict(
        re.findall(
            r"\\(?:re)?newcommand\{\\(\w+)\}\{(.*)\}", settings["latex_elements"]["preamble"]
        )
    )
    assert web == paper


def test_the_version_is_the_same_everywhere() -> None:
    assert read_yaml("CITATION.cff")["version"] == project()["version"] == ewc_lib.__version__


def test_the_package_does_not_repeat_its_version() -> None:
    version = project()["version"]
    sources = sorted((ROOT / "ewc_lib").rglob("*.py"))
    assert [path.name for path in sources if f'"{version}"' in path.read_text("utf-8")] == []


def test_a_checkout_that_is_not_installed_can_be_imported(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    names = runpy.run_path(str(ROOT / "ewc_lib" / "__init__.py"))
    assert names["__version__"] == "0+unknown"


def test_the_newest_release_of_the_changelog_is_the_cited_version() -> None:
    citation = read_yaml("CITATION.cff")
    version, date = releases()[0]
    assert (version, date) == (citation["version"], str(citation["date-released"]))


def test_the_changelog_goes_from_the_newest_release_to_the_oldest() -> None:
    versions = [Version(version) for version, _ in releases()]
    assert versions == sorted(set(versions), reverse=True)


def test_the_changelog_has_the_headings_of_its_form() -> None:
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert [h for h in headings if h != "[Unreleased]"] == [f"[{v}] - {d}" for v, d in releases()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that was built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, "sdist", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    build(folder / archive.name.removesuffix(".tar.gz"), "wheel", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build(tree: Path, target: str, folder: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=tree, capture_output=True, check=True)


def test_the_wheel_has_the_package_and_the_results_of_the_book(built: Path) -> None:
    here = {path.name: path.read_bytes() for path in (ROOT / "book" / "results").glob("*.json")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ewc_lib").rglob("*.py")}
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        inside = f"{folders.__package__.replace('.', '/')}/results/"
        packed = {n.removeprefix(inside): wheel.read(n) for n in names if n.startswith(inside)}
    assert packed == here
    assert {n for n in names if not n.startswith(inside)} == modules | {"ewc_lib/py.typed"}


def test_each_public_module_has_its_tests() -> None:
    package, tests = ROOT / "ewc_lib", ROOT / "tests"
    modules = [path.relative_to(package) for path in package.rglob("[!_]*.py")]
    for module in modules:  # the parts of one package may be tested together
        together = module.parent.parent / f"test_{module.parent.name}.py"
        own = module.with_name(f"test_{module.name}")
        assert (tests / own).is_file() or (tests / together).is_file(), module


def test_no_file_names_a_path_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.])/(?:work|tmp|root|home)/|\.\./shared")
    guilty = []
    for path in tracked_files():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if machine.search(text):
            guilty.append(path.relative_to(ROOT).as_posix())
    assert guilty == []
