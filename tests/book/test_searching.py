"""The search takes every two characters of a Chinese word for a word."""

import pytest
from searching import _WithChinese


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("elastic weight-consolidation", ["elastic", "weight", "consolidation"]),
        ("似然", ["似然"]),
        ("弹性权重", ["弹性", "性权", "权重"]),
        ("Fisher信息, 列", ["Fisher", "信息", "列"]),
    ],
)
def test_a_text_is_split_into_words(text: str, words: list[str]) -> None:
    assert _WithChinese({}).split(text) == words
