"""Every labelled equation and every numbered result is checked by a cell or by a test."""

from pathlib import Path

import pytest
from claims import Check, Claim, checks_in_cells, checks_in_tests, problems, register, tables

CELL = "# T\n\n```{{code-cell}} ipython3\n:tags: [hide-input]\n\n{code}\n```\n"


def test_every_claim_is_checked_and_every_check_holds_an_assertion() -> None:
    claims, checks = register()
    assert len(claims) > 100
    assert problems(claims, checks) == []


def test_the_register_names_what_is_unchecked_unknown_empty_doubled_and_without_a_label() -> None:
    claims = [Claim(label, "equation", "page") for label in ("eq-a", "eq-b", "eq-b", "")]
    checks = [Check("eq-b", "page", "Title", True), Check("eq-c", "tests/test_a.py", "t", False)]
    found = "\n".join(problems(claims, checks))
    for words in (
        "eq-a (page) is not",
        "eq-b: two",
        "such claim: eq-c",
        "asserted of eq-c",
        "label:",
    ):
        assert words in found


@pytest.mark.parametrize(
    ("code", "sound"),
    [
        ("# checks: eq-a\nassert a == b", [True]),
        ("a = b  # checks: eq-a\nassert a == b", []),
        ("# checks: eq-a, thm-a\na = b", [False, False]),
        ("assert a == b\n# checks: eq-a", [False]),
        ("# checks: eq-a\nassert True", [False]),
        ("for a in b:\n    # checks: eq-a\n    assert a", [True]),
    ],
)
def test_a_cell_checks_what_its_comment_names_if_an_assertion_follows(
    code: str, sound: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claims.page_name", lambda page: page.stem)
    page = tmp_path / "page.md"
    page.write_text(CELL.format(code=code))
    assert [check.sound for check in checks_in_cells(page)] == sound


@pytest.mark.parametrize(
    ("test", "sound"),
    [
        ("def test_a():\n    assert a == b", [True]),
        ("def test_a():\n    torch.testing.assert_close(a, b)", [True]),
        ("def test_a():\n    with pytest.raises(ValueError):\n        a()", [True]),
        ("def test_a():\n    a()", [False]),
        ("@pytest.mark.skip\ndef test_a():\n    assert a == b", [False]),
        ("def a():\n    assert a == b", [False]),
    ],
)
def test_a_test_checks_what_its_mark_names_if_it_runs_and_asserts(
    test: str, sound: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claims.TESTS", tmp_path / "tests")
    path = tmp_path / "test_a.py"
    path.write_text(f'@pytest.mark.claim("eq-a")\n{test}\n')
    assert [check.sound for check in checks_in_tests(path)] == sound


def test_the_page_has_a_row_for_every_claim() -> None:
    claims, checks = register()
    text = tables(claims, checks, sorted({claim.page for claim in claims}))
    assert [claim.label for claim in claims if f"`{claim.label}` |" not in text] == []
    assert "tests/test_ewc.py::" in text
