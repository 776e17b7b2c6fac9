import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ewc_lib import EWC
from ewc_lib.continual import mlp
from ewc_lib.experiments.__main__ import app
from ewc_lib.experiments.cost import overhead as module
from ewc_lib.experiments.cost.overhead import NETWORKS, Overhead, overhead, overheads, resnet18


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Train a small network instead of that of the book."""
    monkeypatch.setitem(NETWORKS, "mlp", (lambda: mlp((4, 5, 10), seed=0), (4,)))
    monkeypatch.setitem(NETWORKS, "resnet18", (lambda: resnet18((2,) * 9), (3, 4, 4)))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_form_is_timed_after_every_number_of_tasks(network, tmp_path):
    path, threads = tmp_path / "overhead.json", torch.get_num_threads()
    result = overhead(path, network=network, tasks=(1, 2), rounds=3)
    keys = [(run["form"], run["tasks"]) for run in result["runs"]]
    forms = ("gradient", "proximal", "penalty")
    assert keys == [("plain", 0), *((form, n) for n in (1, 2) for form in forms)]
    assert all(len(run["seconds"]) == 3 for run in result["runs"])
    assert json.loads(path.read_text())["network"] == network
    assert len(overheads(result)) == 6
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("form", module.FORMS)
def test_each_form_is_asked_once_in_each_of_its_steps(form, monkeypatch):
    calls = []

    def counted(name, method):
        return lambda *args: calls.append(name) or method(*args)

    for name in ("add_gradient_", "proximal_step_", "penalty"):
        monkeypatch.setattr(EWC, name, counted(name, getattr(EWC, name)))
    steps = module._steps("mlp", [1], "cpu")
    calls.clear()
    steps["plain", 0]()
    assert not calls
    steps[form, 1]()
    named = {"gradient": "add_gradient_", "proximal": "proximal_step_", "penalty": "penalty"}
    assert calls == [named[form]]


def test_the_residual_network_is_that_of_eighteen_layers():
    model = resnet18()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) - 3 == 18  # without the shortcuts
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], "overhead.json"),
        (["--network", "resnet18", "--threads", "1"], "overhead_resnet18_cpu.json"),
    ],
)
def test_other_networks_and_devices_have_files_of_their_own(options, file, tmp_path):
    run = CliRunner().invoke(app, ["overhead", "--rounds", "4", "--out", str(tmp_path), *options])
    assert run.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert run.output.count("of a plain step") == 6


def test_an_unknown_network_is_refused_by_name(tmp_path):
    run = CliRunner().invoke(app, ["overhead", "--network", "vgg", "--out", str(tmp_path)])
    assert run.exit_code == 2
    assert "there are mlp, resnet18" in " ".join(run.stderr.replace("│", "").split())


def test_an_overhead_is_relative_to_the_plain_step_of_the_same_round():
    runs = [
        {"form": "plain", "tasks": 0, "seconds": [1.0, 2.0, 4.0]},
        {"form": "gradient", "tasks": 50, "seconds": [1.1, 2.4, 5.2]},
    ]
    (found,) = overheads({"runs": runs})
    assert found == Overhead("gradient", 50, *[pytest.approx(v) for v in (0.2, 0.1, 0.3)])
