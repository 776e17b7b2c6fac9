"""What the book on paper needs of the pages."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from paper import _set_paper
from prose import page_name, pages


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_no_caption_cites(page: Path) -> None:
    """LaTeX cannot set a citation within a caption; the text beside the figure can cite."""
    captions = re.findall(
        r"^    caption: (.*?)(?=^  image:|^---)", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert [caption for caption in captions if "{cite" in caption] == []


@pytest.mark.parametrize(
    ("language", "scripts", "font"),
    [
        ("en", "[Latin,Greek,CJK]{ucharclasses}", "setTransitionsForCJK"),
        ("zh_CN", "", "setCJKmainfont"),
    ],
)
def test_chinese_has_a_font_in_both_editions(language: str, scripts: str, font: str) -> None:
    elements = {"preamble": r"\usepackage[Latin,Greek]{ucharclasses}"}
    _set_paper(None, SimpleNamespace(language=language, latex_elements=elements))
    assert re.findall(r"\[.*\]\{ucharclasses\}", elements["preamble"]) == [scripts] * bool(scripts)
    assert font in elements["preamble"]
