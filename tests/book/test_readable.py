"""Notebooks show plain Markdown: no directive, no role and no label of MyST is left."""

import re
from pathlib import Path

import nbformat
import pytest
from notebook_pairs import chapters, opening
from prose import BOOK
from pybtex.database import parse_file
from readable import readable

LEFT = re.compile(
    r"\{[a-z]+(?::[a-z]+)?(?:-[a-z]+)*\}`|^[`:]{3,}\{|^:::|^\([\w-]+\)=|\$\$ *\(", re.M
)


def text_of(chapter: Path) -> str:
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_nothing_that_only_myst_knows_is_left(chapter: Path) -> None:
    assert LEFT.findall(text_of(chapter)) == []


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_every_fold_and_fence_is_closed(chapter: Path) -> None:
    text = text_of(chapter)
    assert text.count("<details>") == text.count("</details>")
    assert len(re.findall(r"^```", text, re.M)) % 2 == 0
    assert text.count("$$") % 2 == 0


def test_a_theorem_gets_a_heading_and_its_proof_an_end() -> None:
    myst = "```{prf:theorem} Means\n:label: thm-x\n\nA claim.\n```\n\n```{prf:proof}\nClear.\n```"
    assert readable(myst) == "**Theorem (Means).**\n\nA claim.\n\n\n*Proof.*\nClear.\n∎"


def test_a_solution_folds_around_the_code_within_it() -> None:
    myst = "````{solution} ex-x\n:class: dropdown\n\n```python\nx = 1\n```\n````"
    shown = readable(myst)
    assert shown.startswith("<details><summary>Solution</summary>")
    assert shown.endswith("</details>")
    assert "```python\nx = 1\n```" in shown


def test_a_labelled_formula_gets_a_tag_that_links_show() -> None:
    shown = readable("$$\nx = 1\n$$ (eq-x)\n\nBy {eq}`eq-x` it is so.")
    assert shown == "$$\nx = 1\n\\tag{eq-x}\n$$\n\nBy (eq-x) it is so."


def test_a_formula_of_a_directive_gets_its_tag_too() -> None:
    assert readable("```{math}\n:label: eq-x\n\nx\n```") == "$$\nx\n\\tag{eq-x}\n$$"


def test_boxes_stay_in_the_list_or_the_quotation_that_holds_them() -> None:
    listed = "* ~~~{prf:proof}\n  By {eq}`eq-x`.\n\n  $$\n  x\n  $$ (eq-y)\n  ~~~\n* B"
    quoted = "> :::{prf:proof}\n> Clear.\n> :::"
    shown = "* *Proof.*\n  By (eq-x).\n\n  $$\n  x\n  \\tag{eq-y}\n  $$\n  ∎\n* B"
    assert readable(listed) == shown
    assert readable(quoted) == "> *Proof.*\n> Clear.\n> ∎"


def test_nested_boxes_lose_their_options_and_keep_their_ends() -> None:
    myst = "::::{prf:proof}\n:::{note} N\n---\nclass: tip\n---\nA\n::: \n::::"
    assert readable(myst) == "*Proof.*\n**Note (N).**\nA\n\n∎"


def test_code_is_left_as_it_is() -> None:
    code = "````python\n```{note}\n(a)=\n$$ (eq-a)\n```\n````\n\nand `` {eq}`a` ``."
    assert readable(code) == code


def test_the_end_of_a_solution_may_stand_in_another_cell() -> None:
    shown = [readable(f"```{{solution-{place}}}\n```") for place in ("start", "end")]
    assert shown == ["<details><summary>Solution</summary>\n\n", "\n\n</details>"]


def test_labels_and_comments_are_not_shown() -> None:
    assert readable("(sec-a)=\n# A\n% to do\nB") == "# A\nB"


def test_computed_numbers_are_filled_in_where_they_are_known() -> None:
    text = "It is {glue:text}`share:.1%`, or {glue:text}`other:.2f`."
    assert readable(text, {"share": 0.123}) == "It is 12.3%, or ⟨other⟩."


def test_links_become_the_words_that_they_show() -> None:
    text = "{term}`the score <score>` of {func}`ewc_lib.score.score`, {doc}`as before </book/x>`"
    assert readable(text) == "the score of `ewc_lib.score.score`, as before"


def test_citations_become_names_and_years() -> None:
    assert readable("{cite:t}`Fisher1922` and {cite:p}`Kirkpatrick2017`") == (
        "Fisher (1922) and (Kirkpatrick et al. 2017)"
    )


def test_the_references_are_those_that_pages_cite() -> None:
    text = "".join(page.read_text("utf-8") for page in BOOK.rglob("*.md"))
    cited = re.findall(r"\{cite:[pt]\}`([^`]+)`", text)
    references = parse_file(str(BOOK / "references.bib")).entries
    assert set(references) == {key for keys in cited for key in keys.split(",")}


def test_a_paper_on_arxiv_is_linked_and_not_only_named() -> None:
    references = parse_file(str(BOOK / "references.bib")).entries.values()
    assert not any("arXiv" in entry.fields.get("note", "") for entry in references)


def test_a_section_of_another_page_is_named_by_its_title() -> None:
    assert re.fullmatch("See “[A-Z].*”", readable("See {ref}`intro-run`"))


def test_the_class_of_a_paragraph_is_not_shown() -> None:
    assert readable("{.path}\nNext: {ref}`the end <sec-end>`.") == "Next: the end."


def test_a_notebook_begins_with_the_macros_of_its_formulas() -> None:
    assert r"\newcommand{\KL}{\operatorname{KL}}" in opening()


def test_a_number_of_another_chapter_keeps_its_own_name() -> None:
    assert readable("{glue:text}`score.md::share:.0%`") == "⟨share⟩"
