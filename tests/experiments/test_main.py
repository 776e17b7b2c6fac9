import json
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ewc_lib.experiments import __main__ as module
from ewc_lib.experiments.cost_report import RESULT
from ewc_lib.experiments.peers import CONTESTANTS
from ewc_lib.experiments.permuted_mnist import PERMUTED_MNIST
from tests.experiments.cases import run as cut

EMPTY = {"sections": {}}


@pytest.fixture
def calls(monkeypatch):
    """Record how the measurement was called instead of running it."""
    found = []

    def record(*arguments, **options):
        found.append((arguments, options))
        return EMPTY

    monkeypatch.setattr(module, "fisher_cost", record)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return found


def run(*arguments):
    return CliRunner().invoke(module.app, arguments)


def test_help_lists_the_experiments():
    result = run("--help")
    assert result.exit_code == 0
    assert "fisher-cost" in result.output


def test_help_names_the_sections_and_the_wait_policy():
    words = " ".join(run("fisher-cost", "--help").output.split())
    assert "mlp, cnn, cnn-norms, transformer, gpt2, linearity" in words
    assert "OMP_WAIT_POLICY=PASSIVE" in words


def test_by_default_everything_is_measured_for_the_book(calls):
    assert run("fisher-cost").exit_code == 0
    options = {"contestants": CONTESTANTS, "repetitions": 5, "threads": 2, "fresh": False}
    assert calls == [((RESULT, ()), options)]


@pytest.mark.parametrize("name", ["fisher-cost", "split-mnist", "overhead", "language-models"])
def test_help_says_where_an_installed_package_writes(name):
    words = run(name, "--help").output.replace("│", "").split()
    assert "book/results in a checkout, elsewhere ./results" in " ".join(words)


def test_options_reach_the_measurement(calls):
    options = ("--repetitions", "3", "--threads", "1", "--fresh", "--output", "x.json")
    only = ("--only", "ewc_lib", "--only", "loop")
    assert run("fisher-cost", "cnn", "mlp", *options, *only).exit_code == 0
    some = {name: CONTESTANTS[name] for name in ("ewc_lib", "loop")}
    expected = {"contestants": some, "repetitions": 3, "threads": 1, "fresh": True}
    assert calls == [((Path("x.json"), ["cnn", "mlp"]), expected)]


def test_an_unknown_library_is_refused_by_name(calls):
    result = run("fisher-cost", "--only", "elsewhere")
    assert result.exit_code != 0
    assert "elsewhere" in result.stderr
    assert calls == []


def test_threads_that_wait_actively_are_warned_of(calls, monkeypatch):
    assert "OMP_WAIT_POLICY" not in run("fisher-cost").stderr
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "OMP_WAIT_POLICY=PASSIVE is not set" in run("fisher-cost").stderr


def test_a_result_that_must_not_be_mixed_is_an_error_of_the_command_line(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"settings": {}, "provenance": {}, "sections": {}}))
    result = run("fisher-cost", "--output", str(path))
    assert result.exit_code == 2
    assert "must not be mixed" in " ".join(result.stderr.replace("│", "").split())


def test_an_unknown_model_is_named(calls):
    result = run("fisher-cost", "--profile", "vgg", "exact")
    assert result.exit_code == 2
    assert "unknown model 'vgg'" in result.stderr


def test_a_profile_is_printed_and_nothing_is_measured(calls, monkeypatch):
    monkeypatch.setattr(module, "profile", lambda model, kind, threads: f"{model.title} {kind}")
    result = run("fisher-cost", "--profile", "cnn", "sketch")
    assert result.output == "CNN sketch\n"
    assert calls == []


def test_the_package_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ewc_lib.experiments.__main__")
    monkeypatch.setattr(sys, "argv", ["experiments", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("ewc_lib.experiments", run_name="__main__")
    assert stopped.value.code == 0
    assert "fisher-cost" in capsys.readouterr().out


# Experiments on streams of tasks


def test_the_command_runs_a_demonstration(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda e, **o: cut(e, tmp_path))
    result = CliRunner().invoke(module.app, ["permuted-mnist"])
    assert result.exit_code == 0
    assert "demonstration" in result.output
    assert "online EWC strength 30" in result.output


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "Stopped. What was finished is saved"),
        (ValueError("not like this"), 2, "not like this"),
        (FileNotFoundError("no MNIST there"), 2, "no MNIST there"),
    ],
)
def test_what_goes_wrong_is_told_in_a_sentence(problem, code, text, monkeypatch):
    def fails(experiment, **options):
        raise problem

    monkeypatch.setattr(module, "measure", fails)
    result = CliRunner().invoke(module.app, ["stability"])
    assert result.exit_code == code
    assert text in result.output + result.stderr


def test_options_reach_the_experiment(monkeypatch):
    asked = []
    empty = {"experiment": "x", "data": "mnist", "runs": []}
    monkeypatch.setattr(module, "measure", lambda e, **o: asked.append((e, o)) or empty)
    options = "--preset zenke --data copy --seeds 3 --device cpu --out here --workers 2 --fresh"
    assert CliRunner().invoke(module.app, ["permuted-mnist", *options.split()]).exit_code == 0
    ((experiment, found),) = asked
    assert experiment is PERMUTED_MNIST
    assert found["preset"] == "zenke"
    assert found["root"] == "copy"
    assert (found["seeds"], found["workers"], found["fresh"]) == (3, 2, True)
    assert str(found["out"]) == "here"


@pytest.mark.parametrize("name", ["beyond-diagonal", "language-models"])
def test_a_comparison_writes_its_file_and_prints_its_table(monkeypatch, tmp_path, name):
    seen = []
    comparing = getattr(module, name.replace("-", "_"))

    def record(path, **options):
        seen.append((path, options))
        return {"runs": []}

    monkeypatch.setattr(comparing, "comparison", record)
    monkeypatch.setattr(comparing, "table", lambda result: f"the table of {result}")
    result = run(name, "--seeds", "2", "--out", str(tmp_path), "--workers", "3")
    assert result.exit_code == 0
    assert result.output == "the table of {'runs': []}\n"
    options = {"seeds": 2, "workers": 3, "fresh": False}
    assert seen == [(tmp_path / f"{name.replace('-', '_')}.json", options)]


@pytest.mark.parametrize("name", ["beyond-diagonal", "language-models"])
def test_a_comparison_refuses_results_of_another_protocol(monkeypatch, name):
    def refuse(*arguments, **options):
        raise ValueError("results of another protocol")

    monkeypatch.setattr(getattr(module, name.replace("-", "_")), "comparison", refuse)
    result = run(name)
    assert result.exit_code == 2
    assert "another protocol" in result.stderr
