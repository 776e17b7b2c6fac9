"""What the book on paper needs of the pages."""

import re
from pathlib import Path

import pytest
from prose import page_name, pages


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_no_caption_cites(page: Path) -> None:
    """LaTeX cannot set a citation within a caption; the text beside the figure can cite."""
    captions = re.findall(
        r"^    caption: (.*?)(?=^  image:|^---)", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert [caption for caption in captions if "{cite" in caption] == []
