"""What a translation shares with its original, and how Chinese is set.

A translation has the formulas, roles, code and numbers of its original, each as often. Its terms
are those of the glossary: one word for one. Punctuation is full-width, and a space stands between
Chinese and Latin, digits, formulas and code, but none beside punctuation.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

# A formula, a role with its target, code, a place for a number.
_PARTS = re.compile(
    r"(?P<formula>\$[^$]+\$)|\{(?P<role>[\w:]+)\}`(?P<target>[^`]*)`|(?P<code>`[^`]+`)|\{\d\}"
)
_TARGET = re.compile(r"^.*<([^<>]+)>$", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_HAN, _LATIN = r"[\u3400-\u9fff]", "[A-Za-z0-9$]"
_CLOSED, _OPEN = "[，。；：？！、）」”》]", "[（「“《]"
_WORD = rf"(?:{_HAN}|{_LATIN})"

SETTING = {
    "half-width punctuation": rf"{_HAN}(?:[,;:?!()]|\.(?!\w))|[,;?!)]{_HAN}",
    "no space between Chinese and Latin": rf"{_HAN}{_LATIN}|(?:{_LATIN}|%){_HAN}",
    "a space beside punctuation": rf"(?:{_CLOSED}|{_OPEN}) | (?:{_CLOSED}|{_OPEN})",
    "a space between Chinese": rf"{_HAN} +{_HAN}",
    "emphasis beside punctuation": rf"{_CLOSED}\*+{_WORD}|{_WORD}\*+{_OPEN}",
    "a straight quotation mark": '"',
}
# A second word for what the book calls by one.
SECOND = {
    "情景": "情境",
    "词元": "token",
    "对角线元素|对角元(?!素)": "对角元素",
    "海[森塞]": "黑塞",
    "贝努利": "伯努利",
    "施瓦兹": "施瓦茨",
    "费[雪希]": "Fisher",
    "准确度": "准确率",
}


def shared(text: str, terms: Mapping[str, str]) -> Counter[str]:
    """Return what a text shares with its translation: of a term, its entry in the glossary."""
    found = Counter[str]()
    for match in _PARTS.finditer(text):
        role, target = match["role"], match["target"]
        if role == "term":
            name = _target(target)
            found[f"term {terms.get(name.lower(), name)}"] += 1
        elif role:
            found[f"{role} {_target(target)}"] += 1
        else:
            found[match[0]] += 1
    found.update(_NUMBER.findall(_PARTS.sub(" ", text)))
    return found


def _target(text: str) -> str:
    match = _TARGET.match(text)
    return match[1] if match else text


def problems(original: str, translation: str, terms: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with a translation.

    Parameters
    ----------
    original, translation
        The sources of both.
    terms
        The entry of the glossary of each term, by its English or Chinese name in lower case.
    """
    here, there = shared(original, terms), shared(translation, terms)
    yield from (f"lacks {part}" for part in (here - there))
    yield from (f"adds {part}" for part in (there - here))
    text = _plain(translation)
    for fault, pattern in SETTING.items():
        yield from (f"has {fault}: …{match[0]}…" for match in re.finditer(pattern, text))
    for pattern, word in SECOND.items():
        yield from (f"has {match[0]} for {word}" for match in re.finditer(pattern, text))


def _plain(text: str) -> str:
    """Return a translation with Latin where it shows something that is set in another way."""

    def put(match: re.Match[str]) -> str:
        role = match["role"] or ""
        if role in ("term", "ref", "doc", "eq", "numref", "prf:ref", "cite", "cite:p"):
            return ""
        return "a"

    return _PARTS.sub(put, text)
