import pytest
import torch

from ewc_lib.experiments.language.texts import documentation, sequences, source_code


def test_the_documentation_is_english_and_has_every_paragraph_once():
    text = documentation()
    paragraphs = text.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert 'The "for" statement' in text
    assert 200_000 < len(text) < 1_000_000


def test_the_source_code_is_that_of_the_standard_library():
    code = source_code()
    assert "def dataclass(" in code
    assert len(code) > 2_000_000


def test_each_target_is_the_byte_that_comes_next():
    text = sequences("the quick brown fox jumps over the lazy dog", length=5)
    for x, y in (text.train, text.test):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape == y.shape
    assert bytes(text.test[1][0].tolist()) == b"he qu"


def test_one_sequence_in_ten_is_held_out_and_none_is_in_both_parts():
    letters = "".join(chr(33 + i % 90) + chr(33 + i // 90) for i in range(600))
    text = sequences(letters, length=3)
    train, test = ({bytes(row.tolist()) for row in part[0]} for part in text)
    assert len(text.test[0]) == 30
    assert len(text.train[0]) == 270
    assert not train & test


def test_fewer_sequences_are_spread_over_the_whole_text():
    text = "".join(f"{i:03}" for i in range(100))
    some = sequences(text, length=2, n=10)
    whole = torch.cat([some.test[0], some.train[0]]).tolist()
    assert [bytes(row) for row in whole] == [f"{10 * i:03}"[:2].encode() for i in range(10)]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_or_too_many_sequences_are_refused(n):
    with pytest.raises(ValueError, match="the text has 4 sequences of 2 bytes"):
        sequences("abcdefghijkl", length=2, n=n)


def test_letters_of_several_bytes_are_cut_into_bytes():
    text = sequences("äöü" * 4, length=2)
    assert text.test[0].max() > 127
