import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def python_block():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_the_example_runs_and_protects_the_first_task(capsys):
    exec(python_block(), {})
    with_ewc = [float(word) for word in capsys.readouterr().out.split()]
    exec(python_block().replace("strength=30.0", "strength=0.0"), {})
    without = [float(word) for word in capsys.readouterr().out.split()]
    assert with_ewc[0] > without[0] + 0.05
    assert min(with_ewc) > 0.75


def test_the_example_is_short():
    statements = [line for line in python_block().splitlines() if line.strip()]
    assert len(statements) <= 15


def test_every_local_link_and_picture_exists():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    assert not [t for t in targets if "://" not in t and not (ROOT / t).exists()]


def test_the_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].keys() - {"dev"}
    assert [name for name in extras if f"`{name}`" not in README] == []


if __name__ == "__main__":
    exec(python_block(), {})
