"""A question is written once: it folds on a page, and is a list on paper and in a notebook."""

import io
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from readable import readable
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

QUIZ = """# Page

:::{quiz}
Is the *likelihood* a density of $\\theta$?

Yes, since $L > 0$
: Wrong. Its integral
  need not be 1.

No
: Right. It is a density of the data.
:::
"""
SETTINGS = {
    "extensions": ["myst_parser", "quizzes"],
    "myst_enable_extensions": ["colon_fence", "deflist", "dollarmath"],
}


def build(folder: Path, text: str, builder: str) -> tuple[str, str]:
    """Build a page; return what a file of the builder holds, and the warnings."""
    folder.joinpath("index.md").write_text(text, "utf-8")
    warnings = io.StringIO()
    with patch_docutils(), docutils_namespace():
        app = Sphinx(
            folder, None, folder / "out", folder / "trees", builder, SETTINGS, None, warnings
        )
        app.build()
    written = next(folder.glob("out/index.html"), None) or next(folder.glob("out/*.tex"))
    return written.read_text("utf-8"), warnings.getvalue()


def test_on_a_page_answers_are_folds_of_which_one_is_open(tmp_path: Path) -> None:
    written, warnings = build(tmp_path, QUIZ, "html")
    quiz = BeautifulSoup(written, "html.parser").select_one(".quiz")
    wrong, right = quiz("details")
    assert warnings == ""
    assert quiz.p.em.get_text() == "likelihood"
    assert wrong.summary.select_one(".math")
    assert right.summary.get_text() == "No"
    assert wrong.p.get_text() == "Wrong. Its integral\nneed not be 1."
    assert wrong["class"] + right["class"] == ["wrong", "right"]
    assert wrong["name"] == right["name"]
    assert not wrong.has_attr("open")


def test_on_paper_the_reasons_follow_the_answers(tmp_path: Path) -> None:
    written, warnings = build(tmp_path, QUIZ, "latex")
    text = written.partition(r"\begin{document}")[2]
    order = [text.index(words) for words in ("Yes, since", "No", "Wrong. Its", "Right. It")]
    assert warnings == ""
    assert order == sorted(order)
    assert written.count(r"\begin{enumerate}") == 2


def test_in_a_notebook_each_answer_folds_its_reason() -> None:
    shown = readable(QUIZ)
    assert "{quiz}" not in shown
    assert ":::" not in shown
    assert shown.index("* No\n") < shown.index("Right. It is")
    assert shown.count("<details>") == shown.count("</details>") == 2


@pytest.mark.parametrize("verdict", ["Right. It is", "It is"])
def test_a_question_has_one_right_answer(tmp_path: Path, verdict: str) -> None:
    _, warnings = build(tmp_path, QUIZ.replace("Wrong. Its", f"{verdict} its"), "html")
    assert 'One answer begins with "Right."' in warnings
