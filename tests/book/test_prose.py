"""The reader of the pages tells prose, formulas and code apart."""

import ast
from pathlib import Path

import pytest
from prose import blank, blank_math, code_of, inline, maths, page_name, pages, parts

PAGE = """---
kernelspec: x
---

# Title

Text with $a$ and
`code $b$`.

:::{admonition} Objectives
:class: tip
* One.
:::

````{prf:theorem} Name
:label: thm-name

Let

$$
x = 1
$$ (eq-x)

```python
y = "$c$"
```
````

```{solution-start} ex-name
:label: sol-name
```

Answer.

```{code-cell} ipython3
---
mystnb:
  figure:
    caption: Of $d$.
---
z = 2
```

```{solution-end}
```

End.
"""


def test_the_parts_of_a_page_are_told_apart_and_know_what_encloses_them() -> None:
    found = [(part.kind, part.text.split("\n")[0], part.inside) for part in parts(PAGE)]
    theorem = ("prf:theorem",)
    assert found == [
        ("heading", "Title", ()),
        ("text", "Text with $a$ and", ()),
        ("open", "Objectives", ()),
        ("text", "* One.", ("admonition",)),
        ("open", "Name", ()),
        ("text", "Let", theorem),
        ("math", "x = 1", theorem),
        ("code", 'y = "$c$"', theorem),
        ("open", "ex-name", ()),
        ("text", "Answer.", ("solution",)),
        ("code", "---", ("solution",)),
        ("open", "", ("solution",)),
        ("text", "End.", ()),
    ]


def test_labels_and_lines_are_those_of_the_page() -> None:
    found = {part.label: part for part in parts(PAGE) if part.label}
    assert found.keys() == {"thm-name", "eq-x", "sol-name"}
    assert PAGE.splitlines()[found["eq-x"].line - 1] == "x = 1"


def test_formulas_are_found_in_text_and_captions_and_not_in_code() -> None:
    assert [f for part in parts(PAGE) for f in maths(part)] == ["a", "x = 1", "d"]


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_every_line_of_a_page_is_where_its_part_says(page: Path) -> None:
    text = page.read_text("utf-8")
    lines = text.splitlines()
    for part in parts(text):
        if part.kind in {"text", "math", "code"} and part.text:
            assert lines[part.line - 1 : part.end] == part.text.splitlines()


# What an author may well write, and what is in it: the kind, the line and the surroundings.
ORDINARY = {
    "a space after a fence": ("```{note}\nA\n``` \nB", "open 1, text 2 note, text 4"),
    "a longer fence": ("````{note}\n```python\na\n```\n````\nB", "open 1, code 3 note, text 6"),
    "a longer end": ("```{note}\nA\n`````\nB", "open 1, text 2 note, text 4"),
    "an end right after options": ("```{note}\n:label: a\n```", "open 1"),
    "options of YAML": ("```{note}\n---\nlabel: a\n---\nA\n```", "open 1, text 5 note"),
    "nested colons": (
        "::::{note}\n:::{tip}\n:class: a\n\nA\n:::\nB\n::::",
        "open 1, open 2 note, text 5 note/tip, text 7 note",
    ),
    "nested, of two kinds": (
        ":::{note}\n```{tip}\n~~~{hint}\nA\n~~~\n```\n:::\nB",
        "open 1, open 2 note, open 3 note/tip, text 4 note/tip/hint, text 8",
    ),
    "tildes": ("~~~{note}\nA\n~~~\n~~~python\n```\n~~~", "open 1, text 2 note, code 5"),
    "a fence in a list": ("* A\n\n  ```python\n  a\n  ```\n  B\n* C", "text 1, code 4, text 6"),
    "a directive in a list": ("* ```{note}\n  A\n  ```\n* B", "open 1, text 2 note, text 4"),
    "a directive in a quotation": ("> ```{note}\n> A\n> ```", "open 1, text 2 note"),
    "a class alone": (":::tip\nA\n:::", "open 1, text 2 "),
    "code in colons": (":::{code-cell}\n# A\n:::", "code 2"),
    "indented code": ("A\n\n    # B\n\nC", "text 1, code 3, text 5"),
    "an empty fence": ("```\n```\nA", "code 2, text 3"),
    "a heading that is underlined": ("A\n===\nB", "heading 1, text 3"),
    "a formula on one line": ("A\n\n$$ a $$ (eq-a)\n\nB", "text 1, math 3, text 5"),
    "a formula as a directive": ("```{math}\n:label: a\n\na\n```", "math 4"),
    "an environment": ("A\n\\begin{align}\na\n\\end{align}\nB", "text 1, math 2, text 5"),
    "labels and comments": ("(sec-a)=\n# A\n% B\nC", "heading 2, text 4"),
    "a header that is not closed": ("---\ntitle: a\n", "text 1"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "expected"), ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_ordinary_text_is_read_as_the_book_reads_it(text: str, expected: str, end: str) -> None:
    found = [
        f"{part.kind} {part.line}" + " ".join(["", "/".join(part.inside)] * bool(part.inside))
        for part in parts(text.replace("\n", end))
    ]
    assert found == expected.split(", ") * bool(expected)


WRONG = {
    "a fence that is not closed": ("A\n\n```{note}\nB\n", 3),
    "code that is not closed": ("A\n\n```python\n# B", 3),
    "nothing after options": ("A\n\n:::{note}\n:label: a", 3),
    "a fence that a longer one would close": ("A\n````{note}\n```\nB\n```", 2),
    "an inner fence that takes the end of the outer one": ("A\n:::{note}\n:::{tip}\n:::\n:::", 3),
    "a fence of a list that is not closed": ("* A\n  ```python\n  a\n\nB", 2),
    "a fence within a list within a box": ("```{note}\n:label: a\n\n* A\n\n  ~~~\n  B\n```", 6),
    "options without a colon": ("A\n```{note}\n:label\n```", 2),
    "an end that nothing started": ("A\n\n```{solution-end}\n```", 3),
    "an end of something else": ("```{exercise-start}\n```\n```{solution-end}\n```", 3),
    "a start without an end": ("A\n```{solution-start} a\n```\nB", 2),
    "a formula that is not closed": ("A\n\n$$\na\n", 3),
    "a formula that the next one closes": ("A\n\n$$\na\n\nB\n\n$$\nb\n$$", 3),
    "a formula within a paragraph": ("A\n$$\na\n$$", 2),
}


@pytest.mark.parametrize(("text", "line"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ValueError, match=f"^line {line}: "):
        parts(text)


def test_a_nested_label_and_its_formula_are_those_of_the_page() -> None:
    text = "* ~~~{prf:theorem} Name\n  :label: thm-a\n\n  $$\n  a\n  $$ (eq-a)\n  ~~~"
    theorem, formula = parts(text)
    assert (theorem.label, theorem.text, theorem.line) == ("thm-a", "Name", 1)
    assert (formula.label, formula.line, formula.inside) == ("eq-a", 5, ("prf:theorem",))


def test_dollars_in_code_are_no_formulas() -> None:
    text = r"`$a$` $b$ ``$c` $d$`` \$5 and {math}`e` [$f$](g) $h = $"
    assert [f for part in parts(text) for f in maths(part)] == ["b", "f", "h = "]
    assert blank_math(text) == r"`$a$`     ``$c` $d$`` \$5 and {math}`e` [   ](g)       "


def test_roles_are_found_where_they_stand() -> None:
    text = "`` {a}`b` `` {term}`c\nd` and {eq}``e`f``, *{doc}`g`*"
    found = {token.meta["name"]: text[place] for token, place in inline(text, "myst_role")}
    assert found == {"term": "{term}`c\nd`", "eq": "{eq}``e`f``", "doc": "{doc}`g`"}


@pytest.mark.parametrize("options", ["", ":tags: [a]\n", "---\nmystnb:\n  figure: {}\n---\n"])
def test_the_code_of_a_cell_keeps_its_lines_without_the_options(options: str) -> None:
    text = f"{options}\na = 1\n:b"
    (cell,) = parts(f"```{{code-cell}}\n{text}\n```")
    assert code_of(cell).lstrip() == "a = 1\n:b"
    assert code_of(cell).count("\n") == text.count("\n")


def test_blanks_keep_every_place() -> None:
    text = "a $b$ `c`\nd"
    assert blank(text, "`c`") == "a $b$    \nd"
    assert blank_math(text) == "a     `c`\nd"


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_the_code_of_every_solution_is_executed(page: Path) -> None:
    solved = [
        p for p in parts(page.read_text("utf-8")) if p.kind == "code" and "solution" in p.inside
    ]
    assert [part.line for part in solved if part.name != "code-cell"] == []


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_a_function_of_a_chapter_has_at_most_five_lines(page: Path) -> None:
    cells = [part for part in parts(page.read_text("utf-8")) if part.name == "code-cell"]
    found = [node for cell in cells for node in ast.walk(ast.parse(code_of(cell)))]
    functions = [node for node in found if isinstance(node, ast.FunctionDef)]
    lines = {f.name: f.body[-1].end_lineno - f.body[0].lineno + 1 for f in functions}
    assert {name: n for name, n in lines.items() if n > 5} == {}


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_code_that_is_shown_fits_its_column(page: Path) -> None:
    columns = 87  # of a wide window; on a narrow one code scrolls
    shown = [
        part
        for part in parts(page.read_text("utf-8"))
        if part.kind == "code" and "hide-input" not in part.text
    ]
    lines = [line for part in shown for line in part.text.splitlines()]
    assert [line for line in lines if len(line) > columns] == []
