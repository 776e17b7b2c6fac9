"""The reader of the pages tells prose, formulas and code apart."""

from pathlib import Path

import pytest
from prose import blank, blank_math, maths, page_name, pages, parts

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
def test_code_that_is_shown_fits_its_column(page: Path) -> None:
    columns = 87  # of a wide window; on a narrow one code scrolls
    shown = [
        part
        for part in parts(page.read_text("utf-8"))
        if part.kind == "code" and "hide-input" not in part.text
    ]
    lines = [line for part in shown for line in part.text.splitlines()]
    assert [line for line in lines if len(line) > columns] == []
