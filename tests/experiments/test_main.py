import json
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ewc_lib.experiments import __main__ as module
from ewc_lib.experiments.cost import counts, fisher_cost, keeping, measure
from ewc_lib.experiments.cost.benchmarks import BENCHMARKS, LARGE, benchmarks
from ewc_lib.experiments.cost.peers import CONTESTANTS
from ewc_lib.experiments.cost.report import CUDA_RESULT, RESULT
from ewc_lib.experiments.runs import protocols
from ewc_lib.experiments.runs.protocols import Experiment
from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST
from tests.experiments.cases import run as cut

EMPTY = {"sections": {}}
ONE = counts.Count(1.5, 0, 9.5, 12)


@pytest.fixture
def calls(monkeypatch):
    """Record how the measurement was called instead of running it."""
    found = []

    def record(*arguments, **options):
        found.append((arguments, options))
        return EMPTY

    monkeypatch.setattr(fisher_cost, "fisher_cost", record)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return found


def run(*arguments):
    return CliRunner().invoke(module.app, arguments)


def test_help_lists_the_experiments():
    result = run("--help")
    assert result.exit_code == 0
    assert "fisher-cost" in result.output


def words(*arguments):
    """Return what the command prints, without frames and line breaks."""
    return " ".join(run(*arguments).output.replace("│", "").split())


@pytest.mark.parametrize("command", [[], ["fisher-cost"], ["beyond-diagonal"], ["stability"]])
def test_help_imports_nothing_that_measures(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ewc_lib.experiments", *command, "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage: python -m ewc_lib.experiments" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    heavy = {"torch", "numpy", "scipy", "sklearn", "seaborn", "pandas", "matplotlib", "joblib"}
    assert not heavy & imported


def test_help_names_the_sections_and_the_wait_policy():
    told = words("fisher-cost", "--help")
    assert f"Sections: {', '.join(BENCHMARKS)}, linearity;" in told
    assert f"with --device cuda also {', '.join(LARGE)}." in told
    assert "OMP_WAIT_POLICY=PASSIVE" in told


def test_help_names_the_libraries_and_the_file_of_a_graphics_card():
    told = words("fisher-cost", "--help")
    assert f"By default all of {', '.join(CONTESTANTS)}." in told
    assert f"--device cuda --repetitions 3 writes {CUDA_RESULT.name}" in told


@pytest.mark.parametrize("name", module.STREAMS)
def test_help_says_of_an_experiment_what_it_says_itself(name):
    experiment = module.experiment(name)
    assert experiment.name == name
    assert module.STREAMS[name] == experiment.summary
    told = words(name, "--help")
    assert experiment.summary in told
    assert f"Presets: {', '.join(experiment.protocols)}." in told


def test_every_experiment_has_its_command():
    folder = Path(module.__file__).parent
    files = [path.relative_to(folder).with_suffix("") for path in folder.glob("*/[!_]*.py")]
    names = [".".join(("ewc_lib.experiments", *path.parts)) for path in files]
    found = (vars(import_module(name)).values() for name in names)
    known = {value.name for values in found for value in values if isinstance(value, Experiment)}
    assert known == set(module.STREAMS)


def test_by_default_everything_is_measured_for_the_book(calls):
    assert run("fisher-cost").exit_code == 0
    options = {"contestants": CONTESTANTS, "repetitions": 5, "threads": 2, "fresh": False}
    assert calls == [((RESULT, ()), {**options, "device": "cpu"})]


@pytest.mark.parametrize("name", ["fisher-cost", "split-mnist", "overhead", "language-models"])
def test_help_says_where_an_installed_package_writes(name):
    words = run(name, "--help").output.replace("│", "").split()
    assert "book/results in a checkout, elsewhere ./results" in " ".join(words)


def test_options_reach_the_measurement(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = "--repetitions 3 --threads 1 --fresh --out there --device cuda"
    only = ("--only", "ewc_lib", "--only", "loop")
    assert run("fisher-cost", "cnn", "mlp", *options.split(), *only).exit_code == 0
    some = {name: CONTESTANTS[name] for name in ("ewc_lib", "loop")}
    expected = {"contestants": some, "repetitions": 3, "threads": 1, "fresh": True}
    path = Path("there") / "fisher_cost_cuda.json"
    assert calls == [((path, ["cnn", "mlp"]), {**expected, "device": "cuda"})]


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
    path = tmp_path / RESULT.name
    path.write_text(json.dumps({"settings": {}, "provenance": {}, "sections": {}}))
    result = run("fisher-cost", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "must not be mixed" in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize("options", [["--profile", "vgg", "exact"], ["--count", "vgg"]])
def test_an_unknown_model_is_named(options, calls):
    result = run("fisher-cost", *options)
    assert result.exit_code == 2
    assert "unknown model 'vgg'" in result.stderr


def test_a_profile_is_printed_and_nothing_is_measured(calls, monkeypatch):
    monkeypatch.setattr(measure, "profile", lambda model, kind, threads: f"{model.title} {kind}")
    result = run("fisher-cost", "--profile", "cnn", "sketch")
    assert result.output == "CNN sketch\n"
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("options", [[], ["--count"], ["--profile", "mlp", "exact"]])
def test_a_device_that_is_not_there_is_an_error_of_the_command_line(options, calls):
    result = run("fisher-cost", "--device", "cuda", *options)
    assert result.exit_code == 2
    assert "no CUDA device" in " ".join(result.stderr.replace("│", "").split())
    assert calls == []


def test_large_models_are_known_on_a_graphics_card_only(monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "require", lambda device: None)
    monkeypatch.setattr(measure, "profile", lambda model, *_: asked.append(model) or "")
    assert run("fisher-cost", "--profile", "resnet18", "exact").exit_code == 2
    assert run("fisher-cost", "--device", "cuda", "--profile", "resnet18", "exact").exit_code == 0
    assert asked == [benchmarks("cuda")["resnet18"]]


def test_counts_are_printed_and_nothing_is_measured(calls, monkeypatch):
    monkeypatch.setattr(counts, "count_all", lambda found: {(n, "exact"): ONE for n in found})
    result = run("fisher-cost", "cnn", "mlp", "--count")
    assert result.output == counts.table({("cnn", "exact"): ONE, ("mlp", "exact"): ONE}) + "\n"
    assert all(name in run("fisher-cost", "--count").output for name in BENCHMARKS)
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
    monkeypatch.setattr(protocols, "measure", lambda e, **o: cut(e, tmp_path))
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

    monkeypatch.setattr(protocols, "measure", fails)
    result = CliRunner().invoke(module.app, ["stability"])
    assert result.exit_code == code
    assert text in result.output + result.stderr


def test_options_reach_the_experiment(monkeypatch):
    asked = []
    empty = {"experiment": "x", "data": "mnist", "runs": []}
    monkeypatch.setattr(protocols, "measure", lambda e, **o: asked.append((e, o)) or empty)
    options = "--preset zenke --data copy --seeds 3 --device cpu --out here --workers 2 --fresh"
    assert CliRunner().invoke(module.app, ["permuted-mnist", *options.split()]).exit_code == 0
    ((experiment, found),) = asked
    assert experiment is PERMUTED_MNIST
    assert found["preset"] == "zenke"
    assert found["root"] == "copy"
    assert (found["seeds"], found["workers"], found["fresh"]) == (3, 2, True)
    assert str(found["out"]) == "here"


@pytest.mark.parametrize("name", ["beyond-diagonal", "fine-tuning", "language-models"])
def test_a_comparison_writes_its_file_and_prints_its_table(monkeypatch, tmp_path, name):
    seen = []
    comparing = module.module_of(name)

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


def test_what_keeping_takes_is_written_to_its_file_and_printed(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(keeping, "keeping", lambda path, **o: seen.append((path, o)) or {})
    monkeypatch.setattr(keeping, "table", lambda result: f"the table of {result}")
    assert run("keeping", "--out", str(tmp_path)).output == "the table of {}\n"
    assert seen == [(tmp_path / "keeping.json", {"fresh": False})]


@pytest.mark.parametrize("name", ["beyond-diagonal", "fine-tuning", "language-models"])
def test_a_comparison_refuses_results_of_another_protocol(monkeypatch, name):
    def refuse(*arguments, **options):
        raise ValueError("results of another protocol")

    comparing = module.module_of(name)
    monkeypatch.setattr(comparing, "comparison", refuse)
    result = run(name)
    assert result.exit_code == 2
    assert "another protocol" in result.stderr
