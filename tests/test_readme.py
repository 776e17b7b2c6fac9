import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text("utf-8")


def python_block(text=README):
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def without_comments(code):
    return re.sub(r"[ ]*#.*", "", code)


def test_the_example_runs_and_protects_the_first_task(capsys):
    exec(python_block(), {})
    with_ewc = [float(word) for word in capsys.readouterr().out.split()]
    exec(python_block().replace("strength=30.0", "strength=0.0"), {})
    without = [float(word) for word in capsys.readouterr().out.split()]
    assert with_ewc == pytest.approx([7 / 8, 5 / 6], abs=0.03)
    assert without[0] == pytest.approx(0.7, abs=0.03)


def test_the_example_is_short():
    statements = [line for line in python_block().splitlines() if line.strip()]
    assert len(statements) <= 15


def test_the_chinese_readme_has_the_same_example_code_and_links():
    blocks = [re.findall(r"```.*?```", text, flags=re.DOTALL) for text in (README, CHINESE)]
    one, other = ([without_comments(block) for block in found] for found in blocks)
    assert one == other
    prose = (re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in (README, CHINESE))
    names = [re.findall(r"`[^`\n]+`", text) for text in prose]
    assert {*names[0]} <= {*names[1]}


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_every_local_link_and_picture_exists(text):
    targets = re.findall(r"\]\(([^)]+)\)", text)
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
