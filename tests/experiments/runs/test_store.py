import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ewc_lib.experiments.runs import store
from ewc_lib.experiments.runs.store import load, run_all

RUNS = [{"strength": s, "seed": seed} for seed in (0, 1) for s in (1.0, 1e5)]


def double(run):
    return {"value": 2 * run["strength"] + run["seed"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "x.json"


@pytest.fixture
def start(path):
    def start(function=double, runs=RUNS, **options):
        shared = {"experiment": "x", "data": "digits", "protocol": {"steps": 3, "sizes": (1, 2)}}
        return run_all(path, function, runs, **shared | options)

    return start


def values(result):
    return {(run["strength"], run["seed"]): run["value"] for run in result["runs"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_run_is_in_the_file_with_its_settings_and_its_outcome(workers, start, path):
    result = start(workers=workers)
    assert result == load(path)
    assert values(result) == {(1.0, 0): 2.0, (1e5, 0): 2e5, (1.0, 1): 3.0, (1e5, 1): 200001.0}
    assert all(run["seconds"] >= 0 and run["sitting"] == 0 for run in result["runs"])
    assert result["sittings"][0]["seeds"] == [0, 1]


def test_what_is_finished_is_not_done_again(start):
    done = []
    start(runs=RUNS[:1])
    result = start(lambda run: done.append(run) or double(run))
    assert done == RUNS[1:]
    assert len(result["runs"]) == 4
    assert [run["sitting"] for run in result["runs"]] == [0, 1, 1, 1]
    assert len(start(lambda run: pytest.fail("again"))["sittings"]) == 2


def test_a_fresh_start_drops_what_was_there(start):
    start(runs=RUNS[:2])
    assert len(start(runs=RUNS[2:], fresh=True)["runs"]) == 2


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"experiment": "y"}, "another experiment"),
        ({"data": "mnist"}, "another data"),
        ({"protocol": {"steps": 4, "sizes": (1, 2)}}, "another protocol"),
    ],
)
def test_results_of_something_else_are_not_mixed(options, what, start, path):
    start(runs=RUNS[:1])
    before = path.read_text()
    with pytest.raises(ValueError, match=f"x.json holds results of {what}.*--fresh"):
        start(**options)
    assert path.read_text() == before


def test_results_of_another_version_of_torch_are_not_mixed(start, path):
    start(runs=RUNS[:1])
    path.write_text(path.read_text().replace('"torch": "2', '"torch": "1'))
    with pytest.raises(ValueError, match="another version of PyTorch"):
        start()


def test_a_build_of_torch_that_its_metadata_does_not_name_goes_on(start, monkeypatch):
    monkeypatch.setattr(torch, "__version__", f"{torch.__version__}.cu999")
    start(runs=RUNS[:1])
    assert len(start()["runs"]) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"runs": []}', "\x00"])
def test_a_damaged_file_is_refused_by_name_and_left_alone(content, start, path):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is damaged or does not hold the runs"):
        start()
    assert path.read_text() == content


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_is_told_after_the_others_are_saved(workers, start, path):
    def fails(run):
        if run == RUNS[1]:
            raise ZeroDivisionError("mine")
        return double(run)

    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed; .*ZeroDivisionError: mine"):
        start(fails, workers=workers)
    assert set(values(load(path))) == {(1.0, 0), (1.0, 1), (1e5, 1)}


def test_a_disk_that_is_full_for_a_while_loses_no_result(start, path, monkeypatch):
    save, full = store.save, [True, True, False, False, False]

    def sometimes(*arguments):
        if full.pop(0):
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(store, "save", sometimes)
    with pytest.warns(UserWarning, match="No space left on device"):
        start()
    assert len(load(path)["runs"]) == 4


def test_a_disk_that_stays_full_is_an_error_and_keeps_the_old_file(start, path, monkeypatch):
    start(runs=RUNS[:2])
    before = path.read_text()
    replace = Path.write_text

    def full(self, *arguments, **options):
        replace(self, "half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="cannot write"), pytest.raises(OSError, match="No space"):
        start()
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_numbers_that_json_does_not_know_become_none(start, path):
    result = start(lambda run: {"value": math.nan, "many": [1.0, math.inf]}, runs=RUNS[:1])
    (run,) = load(path)["runs"]
    assert run["value"] is None
    assert run["many"] == [1.0, None]
    assert len(result["runs"]) == 1
    json.dumps(load(path), allow_nan=False)


def test_a_bar_counts_the_runs(start, capfd, monkeypatch):
    monkeypatch.setattr("ewc_lib._progress.DELAY", 0.0)
    start(progress=True)
    assert "/4" in capfd.readouterr().err


SCRIPT = """
import signal
import time
from pathlib import Path
from ewc_lib.experiments.runs.store import run_all

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def slow(run):
    if run["seed"]:
        time.sleep(60)
    return {"value": 1.0}

run_all(Path("x.json"), slow, [{"seed": 0}, {"seed": 1}], experiment="x", data="", protocol={})
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_keeps_what_was_finished(stop, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        file, deadline = tmp_path / "x.json", time.monotonic() + 300
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(stop)
        assert process.wait(timeout=50) != 0  # the run itself takes 60 seconds
    finally:
        process.kill()
        process.wait()
    assert [run["seed"] for run in load(file)["runs"]] == [0]
