"""A translation that loses, adds or sets something wrongly is found, and a good one is not."""

import pytest
from wording import problems, shared

TERMS = {"likelihood": "likelihood", "似然函数": "likelihood", "score": "score", "得分": "score"}
ORIGINAL = (
    "Of {glue:text}`n` images, 95 % have $s = 0$ ({numref}`fig-a`): the {term}`likelihood` is "
    "flat, says `fit`; see {ref}`the rule <sec-rule>`."
)
TRANSLATION = (
    "{glue:text}`n` 张图像中有 95 % 满足 $s = 0$（{numref}`fig-a`）：{term}`似然函数`是平的，"
    "`fit` 这样说；见{ref}`规则 <sec-rule>`。"
)


def test_a_good_translation_has_no_fault() -> None:
    assert list(problems(ORIGINAL, TRANSLATION, TERMS)) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("$s = 0$", "$s = 1$"),
        ("95 %", "96 %"),
        ("{glue:text}`n`", "{glue:text}`m`"),
        ("{numref}`fig-a`", "{numref}`fig-b`"),
        ("{term}`似然函数`", "{term}`得分`"),
        ("{term}`似然函数`", "似然函数"),
        ("`fit`", "`fits`"),
        ("<sec-rule>", "<sec-role>"),
    ],
)
def test_a_part_that_differs_is_missing_and_added(good: str, bad: str) -> None:
    assert good in TRANSLATION
    assert [*problems(ORIGINAL, TRANSLATION.replace(good, bad), TERMS)]


def test_a_part_that_is_said_twice_is_one_too_many() -> None:
    assert "adds $s = 0$" in problems(ORIGINAL, f"{TRANSLATION}$s = 0$", TERMS)


def test_a_term_may_be_shown_in_other_words() -> None:
    assert shared("{term}`平坦 <似然函数>`", TERMS) == shared("{term}`likelihood`", TERMS)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("这是对的,不是错的。", "half-width"),
        ("这是对的. 不错。", "half-width"),
        ("似然(likelihood)", "half-width"),
        ("这是EWC。", "no space"),
        ("有20张图像。", "no space"),
        ("由$x$可得。", "no space"),
        ("由`x`可得。", "no space"),
        ("因此， 它是零。", "beside punctuation"),
        ("这 是零。", "between Chinese"),
        ("**重要。**然后", "emphasis"),
        ('所谓"零"。', "quotation"),
    ],
)
def test_what_is_set_wrongly_is_found(text: str, fault: str) -> None:
    found = [found for found in problems(text, text, TERMS) if fault in found]
    assert found


def test_a_second_word_for_one_thing_is_found() -> None:
    assert list(problems("a scenario", "一种情景", TERMS)) == ["has 情景 for 情境"]
    assert list(problems("a diagonal entry", "一个对角元素", TERMS)) == []
