"""A decimal or a per cent value in the prose of a chapter comes from a cell, and is not typed.

Formulas, code, headings, roles and the statements of exercises may hold numbers. So may the phrases
below: values that a text chooses, and not results that could go stale.
"""

import re
from pathlib import Path

import pytest
from prose import blank, blank_math, page_name, pages, parts

CHOSEN = "chosen for an example, and typed into its cell alike"
GIVEN = "given by the statement of the exercise"
QUOTED = "quoted from the publication cited beside it"
ALLOWED = {
    "foundations/ewc": {"95 % interval of Student": "a level of confidence"},
    "foundations/fisher": {
        "hold 95 % of them": "a level of confidence",
    },
    "foundations/likelihood": {
        "accuracy be 0.90? Could it be 0.60": CHOSEN,
        "At the accuracy 0.95": CHOSEN,
        "as at 0.90": CHOSEN,
        "as at 0.60. Divide": CHOSEN,
        "1.96 standard deviations": "leaves out 5 of 100 cases of a Gaussian",
        "So 0.60 is out, 0.90 is not": CHOSEN,
        "0.95 times": CHOSEN,
        "a truth of 0.9 is kept": CHOSEN,
        "accuracies from 0.5 to 0.99": CHOSEN,
    },
    "foundations/score": {
        "accuracy is 0.80. Which way": CHOSEN,
        "claimed accuracy 0.80": CHOSEN,
        "accuracy is 0.80. There": CHOSEN,
        "from 0.80 to 0.81": CHOSEN,
        "$\\sigma = 2.5$": CHOSEN,
        "If the accuracy is 0.90": CHOSEN,
        "; at 0.91 none": CHOSEN,
        "at the claim 0.80": CHOSEN,
        "scores at 0.80 of all": CHOSEN,
        "truth 0.9 (vertical line)": CHOSEN,
        "zero at 0.90 because": CHOSEN,
        "with the accuracy 0.90 take": CHOSEN,
        "accuracy of 0.90": CHOSEN,
    },
    "practice/benchmarks": {
        "95 % confidence interval": "a level of confidence",
        "the 95 % interval of the difference": "a level of confidence",
        "with 95 % intervals": "a level of confidence",
        "with a probability of 80 %": "a chosen power",
        "report 29.4 % where EWC has 10.6 %": QUOTED,
        "off at 0.0001": "quoted from the code named beside it",
        "more than 90 % on average": QUOTED,
        "published 90 %": QUOTED,
    },
    "practice/beyond_diagonal": {
        "it explains 58 % of": QUOTED,
        "in the divergence 96 %": QUOTED,
        "95 % interval of a mean": "a level of confidence",
    },
    "practice/fine_tuning": {"95 % interval of Student": "a level of confidence"},
    "practice/language_models": {"half of the 95 % interval": "a level of confidence"},
    "practice/many_tasks": {"95 % interval of a mean": "a level of confidence"},
    "practice/stability": {
        "learning rate 0.1": CHOSEN,
        "strengths from 0.1 to": CHOSEN,
        "half of the 95 % interval": "a level of confidence",
    },
    "practice/which_fisher": {
        "half of the 95 % interval": "a level of confidence",
        "99 % sure of an image keeps 99 % of its information": CHOSEN,
    },
}

MADE_UP = {"exercise", "quiz"}
"""Directives whose numbers are those of a case that nobody measured."""

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+|\d[\d,.]*\s*(?:%|per\s?cent\b)")
CODE = r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)"


def phrase(words: str) -> re.Pattern[str]:
    """Return a pattern for words that may stand on two lines."""
    return re.compile(r"\s+".join(map(re.escape, words.split())))


def typed(page: Path) -> list[str]:
    """Return the typed numbers of a page, with their lines."""
    allowed = [phrase(words).pattern for words in ALLOWED.get(page_name(page), {})]
    found = []
    for part in parts(page.read_text("utf-8")):
        if part.kind == "text" and MADE_UP.isdisjoint(part.inside):
            text = blank(blank_math(blank(part.text, *allowed, CODE)), r"\]\([^)]*\)")
            for match in NUMBER.finditer(text):
                found.append(
                    f"line {part.line + text.count(chr(10), 0, match.start())}: {match[0]}"
                )
    return found


@pytest.fixture(params=pages(), ids=page_name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_numbers_in_the_prose_are_glued(page: Path) -> None:
    assert typed(page) == [], "take it from a cell by glue, or allow the phrase with a reason"


def test_every_allowed_phrase_still_stands_in_its_chapter(page: Path) -> None:
    text = page.read_text("utf-8")
    allowed = ALLOWED.get(page_name(page), {})
    assert [words for words in allowed if not phrase(words).search(text)] == []


@pytest.mark.parametrize("text", ["it is 3.14", "by 40 %", "97.2 per cent", "1,000.5 times", "0.5"])
def test_typed_numbers_are_found(text: str) -> None:
    assert NUMBER.search(text)


@pytest.mark.parametrize("text", ["100 tosses", "10,000 of them", "version v2.6", "in 2012."])
def test_other_numbers_are_not(text: str) -> None:
    assert not NUMBER.search(text)
