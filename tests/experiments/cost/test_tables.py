import pytest

from ewc_lib.experiments.cost.report import RESULT, Measured, rows
from ewc_lib.experiments.cost.tables import AGAIN, BEFORE, grid, stored_table, table

ROWS = [
    Measured("cnn", "ewc_lib", "exact", 100, 6.254, mebibytes=12.4),
    Measured("cnn", "slow", "exact", 10, 1234.5, scaled=True),
    Measured("cnn", "careless", "exact", 100, 2.0, error=0.5),
    Measured("transformer", "ewc_lib", "exact", reason="RuntimeError: out of memory"),
    Measured("transformer", "slow", "exact", reason="RuntimeError: out of memory"),
    Measured("cnn", "ewc_lib", "sketch", 100, 1.5, error=1.0),
]


def test_a_grid_has_a_line_for_each_library_and_a_column_for_each_model():
    head, *lines = grid(ROWS, "exact").splitlines()
    assert head.split() == ["exact", "cnn", "transformer"]
    cells = [line.split() for line in lines]
    assert cells == [["ewc_lib", "6.25", "–"], ["slow", "~1234", "–"], ["careless", "!2"]]


def test_a_grid_shows_memory_where_it_is_known():
    cells = [line.split() for line in grid(ROWS, "exact", "mebibytes").splitlines()[1:]]
    assert cells == [["ewc_lib", "12", "–"], ["slow", "–"], ["careless"]]


def test_an_estimate_that_differs_from_the_truth_is_not_marked():
    assert grid(ROWS, "sketch").splitlines()[1].split() == ["ewc_lib", "1.5"]


def test_the_stored_tables_are_read_with_what_they_were_measured_on():
    here, before = stored_table(RESULT), stored_table(BEFORE)
    assert here.rows == rows(here.result)
    assert here.title.startswith(here.result["provenance"]["hardware"]["processor"])
    assert "threads" in here.title
    assert before.title == "NVIDIA H100 80 GB, torch 2.11.0+cu130, 2026-11-27"
    assert before.found("transformer", "curvlinops", "sketch").passes == 6.33
    assert before.found("transformer", "curvlinops", "exact") is None


def test_what_was_measured_again_takes_the_place_of_what_the_harness_got_wrong():
    first, mended = stored_table(RESULT), stored_table(RESULT, AGAIN)
    cell = ("gpt2", "laplace", "empirical")
    assert first.found(*cell).reason.startswith("RuntimeError: Expected target size")
    assert mended.found(*cell).reason is None
    assert not mended.found(*cell).wrong
    assert len(first.rows) == len(mended.rows)
    assert first.ours() == mended.ours()


def test_a_table_that_is_not_there_is_none(tmp_path):
    assert stored_table(tmp_path / "fisher_cost_cuda.json") is None


def test_rivals_are_right_answers_of_others_from_the_fastest_on():
    here = stored_table(RESULT)._replace(rows=[*ROWS, Measured("cnn", "quick", "exact", 100, 3.0)])
    assert [row.library for row in here.rivals("cnn", "exact")] == ["quick", "slow"]
    assert here.rivals("transformer", "exact") == []
    assert list(here.ours()) == [("cnn", "exact"), ("cnn", "sketch")]


@pytest.mark.parametrize("path", [RESULT, BEFORE])
def test_no_answer_of_this_package_is_wrong(path):
    assert not any(row.wrong for row in stored_table(path).ours().values())


def test_the_table_shows_times_marks_and_reasons(result):
    title, head, *lines = table(result).splitlines()
    assert title == "Tiny: 1,234 parameters, 100 observations in batches of 8, 2 s for a plain pass"
    assert head.split() == ["empirical", "sketch", "sampled", "exact"]
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["ewc_lib"] == ["1.5", "(1–2)", "3", "(2.25–3)"]
    assert cells["slow"] == ["~5", "(5–5)"]
    assert cells["careless"] == ["!1", "(1–1)"]
    assert cells["limited"] == ["–", "–"]
    assert lines[-1] == "  – limited: TypeError: no"


def test_the_table_shows_memory_where_that_is_wanted(result):
    cells = {line.split()[0]: line.split()[1:] for line in table(result, "mebibytes").splitlines()}
    assert cells["ewc_lib"] == ["20", "20"]
    assert cells["careless"] == ["-1"]


def test_the_table_shows_errors_where_they_are_wanted(result):
    result["sections"]["mlp"]["contestants"]["slow"]["exact"]["error"] = None
    cells = {line.split()[0]: line.split()[1:] for line in table(result, "error").splitlines()}
    assert cells["ewc_lib"] == ["1e-16", "1e-16"]
    assert cells["careless"] == ["0.5"]
    assert cells["slow"] == ["unknown"]


def test_long_times_stay_readable(result):
    result["sections"]["mlp"]["contestants"]["slow"]["exact"]["seconds"] = [1e3, 2e3, 3e3]
    assert "~5,000 (3,750–5,000)" in table(result)


def test_the_table_knows_its_values(result):
    with pytest.raises(ValueError, match="got 'bytes'"):
        table(result, "bytes")
