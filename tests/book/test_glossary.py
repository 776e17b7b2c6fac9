"""Every term of the glossary has both names, is used, and is linked where a chapter first uses it.

A use is the term or its plural, in any case and with hyphens or spaces, in the running text of a
chapter. Headings, titles, formulas, code and the texts of other links are left out.
"""

import re
from pathlib import Path

import pytest
from prose import blank, blank_math, glossary, page_name, pages, parts

# Phrases, by chapter or for all of them, in which a word means something else than the term.
OTHERWISE: dict[str, tuple[str, ...]] = {
    "": ("single precision", "double precision", "weight decay"),
    "foundations/fisher": ("output biases",),
    "foundations/score": ("at *one* fixed point",),
    "practice/at_scale": ("Biases", "bias", "precision"),
    "practice/benchmarks": ("the row and the column", "bias", "Bias"),
    "practice/fine_tuning": ("half precision",),
    "practice/stability": ("heads", "a head in each"),
}

LINK = r"\{term\}`(?P<text>[^`<]+?)\s*(?:<(?P<target>[^`>]+)>)?`"
# Roles, code and links.
NOT_RUNNING = r"(?:\{[\w:+-]+\})?(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|\[[^\]]*\]\([^)]*\)"


def pattern(term: str) -> re.Pattern[str]:
    words = r"[\s-]+".join(map(re.escape, re.split(r"[\s-]", term)))
    return re.compile(rf"(?<![\w-]){words}(?:s|es)?(?![\w-])", re.IGNORECASE)


def keep_terms(match: re.Match[str]) -> str:
    return match[0] if match["text"] else blank(match[0], ".")


def running_text(page: Path) -> str:
    """Return the text of a page with all else blank: the places are those of the file."""
    source = page.read_text("utf-8")
    lines = [""] * (source.count("\n") + 1)
    for part in parts(source):
        if part.kind == "text" and "quiz" not in part.inside:  # whose answers hold no link
            text = re.sub(rf"{LINK}|{NOT_RUNNING}", keep_terms, part.text, flags=re.DOTALL)
            text = blank_math(text)
            lines[part.line - 1 : part.end] = text.splitlines()
    text = "\n".join(lines)
    otherwise = OTHERWISE.get("", ()) + OTHERWISE.get(page_name(page), ())
    return blank(text, *(r"\s+".join(map(re.escape, words.split())) for words in otherwise))


def first_uses(page: Path) -> dict[str, re.Match[str]]:
    """Return the first use of each entry, by its first term; long terms hide those within them."""
    text, found = running_text(page), {}
    terms = [(term, names[0]) for names in glossary() for term in names]
    for term, entry in sorted(terms, key=lambda pair: -len(pair[0])):
        uses = list(pattern(term).finditer(text))
        if uses and (entry not in found or uses[0].start() < found[entry].start()):
            found[entry] = uses[0]
        text = blank(text, pattern(term).pattern.replace("(?<!", "(?i)(?<!", 1))
    return found


def is_linked(text: str, use: re.Match[str], names: tuple[str, ...]) -> bool:
    """Whether a use stands in a link to its own entry."""
    link = next((m for m in re.finditer(LINK, text) if m.start() < use.start() < m.end()), None)
    target = link and re.sub(r"\s+", " ", link["target"] or link["text"])
    return bool(target) and target.lower() in {name.lower() for name in names}


def unlinked(page: Path) -> list[str]:
    """Return the first uses that are not linked."""
    text, entries = running_text(page), {names[0]: names for names in glossary()}
    return [
        f"line {text.count(chr(10), 0, use.start()) + 1}: {use[0]} <{entry}>"
        for entry, use in first_uses(page).items()
        if not is_linked(text, use, entries[entry])
    ]


@pytest.fixture(params=pages(), ids=page_name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_first_use_of_a_term_is_a_link_to_the_glossary(page: Path) -> None:
    assert unlinked(page) == []


def test_every_term_is_used_in_a_chapter() -> None:
    used = {entry for page in pages() for entry in first_uses(page)}
    assert [names[0] for names in glossary() if names[0] not in used] == []


def test_every_term_has_an_english_and_a_chinese_name() -> None:
    chinese = re.compile(r"[\u4e00-\u9fff]")
    entries = glossary().items()
    assert [names for names, text in entries if not chinese.search(text.split(".")[0])] == []
    assert [names for names in glossary() if not all(re.match(r"[A-Za-z]", n) for n in names)] == []


def test_terms_are_in_order_and_stand_once() -> None:
    first = [names[0].lower() for names in glossary()]
    everything = [name.lower() for names in glossary() for name in names]
    assert first == sorted(first)
    assert len(everything) == len(set(everything))


def test_every_phrase_with_another_meaning_still_stands_in_a_chapter() -> None:
    texts = {page_name(page): re.sub(r"\s+", " ", page.read_text("utf-8")) for page in pages()}
    texts[""] = " ".join(texts.values())
    gone = {
        name: [p for p in phrases if p not in texts[name]] for name, phrases in OTHERWISE.items()
    }
    assert not any(gone.values()), gone
