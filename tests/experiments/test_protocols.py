"""Every experiment on streams, on small images and for a few steps."""

import copy
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ewc_lib import data
from ewc_lib.continual import Learned, MultiHead, mlp
from ewc_lib.experiments import __main__ as command
from ewc_lib.experiments import protocols
from ewc_lib.experiments.fisher_variants import (
    FISHER_VARIANTS,
    VARIANTS,
    OnlinePenalty,
    of_batch_means,
)
from ewc_lib.experiments.laplace_50 import LAPLACE_50
from ewc_lib.experiments.permuted_mnist import PERMUTED_MNIST
from ewc_lib.experiments.protocols import METHODS, measure, outcome, read
from ewc_lib.experiments.published import PUBLISHED
from ewc_lib.experiments.report import rows
from ewc_lib.experiments.split_mnist import SEARCH_SEED, SPLIT_MNIST
from ewc_lib.experiments.stability import STABILITY

EXPERIMENTS = {e.name: e for e in command.EXPERIMENTS}


@pytest.fixture(autouse=True)
def no_mnist(monkeypatch):
    monkeypatch.delenv("EWC_DATA", raising=False)


def short(experiment, **changes):
    """Return an experiment with its demonstration cut to a few steps and strengths."""
    digits = copy.deepcopy(dict(experiment.protocols["digits"]))
    digits |= {"steps": 3, "hidden": [8], "batch": 16} | changes
    if "grid" in digits:
        digits["grid"] = digits["grid"][:2]
    if "searched" in digits:
        digits["searched"] = {name: grid[:2] for name, grid in digits["searched"].items()}
    return replace(experiment, protocols={**experiment.protocols, "digits": digits})


def run(experiment, tmp_path, seeds=1, **changes):
    return measure(
        short(experiment, **changes), seeds=seeds, out=tmp_path, workers=1, progress=False
    )


def test_split_mnist_has_every_method_in_every_scenario(tmp_path):
    result = run(SPLIT_MNIST, tmp_path)
    found = rows(result["runs"], search=False)
    methods = {"none", "joint", "replay", "LwF", "EWC", "online EWC", "SI", "MAS", "L2"}
    for scenario in ("task", "domain", "class"):
        own = [row for row in found if row.settings["scenario"] == scenario]
        assert {row.settings["method"] for row in own} == methods
        assert all(0 <= row.mean <= 1 for row in own)
    assert (result["experiment"], result["data"]) == ("split-mnist", "digits")
    assert read("split_mnist_digits", tmp_path) == result


def test_strengths_are_chosen_on_a_seed_that_is_not_used_again(tmp_path):
    result = run(SPLIT_MNIST, tmp_path, seeds=2)
    for scenario, method in (("task", "MAS"), ("class", "L2")):
        own = [r for r in result["runs"] if (r["scenario"], r["method"]) == (scenario, method)]
        tried = [r for r in own if r["search"]]
        used = [r for r in own if not r["search"]]
        assert {r["seed"] for r in tried} == {SEARCH_SEED}
        assert [r["seed"] for r in used] == [0, 1]
        top = max(tried, key=lambda r: r["accuracy"])
        assert {r["strength"] for r in used} == {top["strength"]}


def test_fisher_variants_has_a_grid_and_the_decades_around_the_best(tmp_path):
    result = run(FISHER_VARIANTS, tmp_path)
    for variant in VARIANTS:
        own = [r for r in result["runs"] if r["variant"] == variant]
        strengths = sorted(r["strength"] for r in own)
        assert {1.0, 100.0} <= set(strengths)
        assert len(strengths) == 4  # of five, one is on the grid already
    assert sum(r["variant"] == "none" for r in result["runs"]) == 1


def test_permuted_mnist_has_its_methods(tmp_path):
    result = run(PERMUTED_MNIST, tmp_path)
    assert [r["method"] for r in result["runs"]] == ["none", "EWC", "online EWC", "SI", "joint"]
    assert all(len(r["final"]) == len(r["average"]) == 5 for r in result["runs"])


def test_stability_tells_runs_that_diverge_from_others(tmp_path):
    found = short(STABILITY, steps=30, optimizers={"SGD": 0.1})
    found.protocols["digits"]["grid"] = [0.1, 1e12]
    result = measure(found, seeds=1, out=tmp_path, workers=1, progress=False)
    diverged = {(r["form"], r["strength"]): r["diverged"] for r in result["runs"]}
    assert diverged == {
        ("gradient", 0.1): False,
        ("gradient", 1e12): True,
        ("proximal", 0.1): False,
        ("proximal", 1e12): False,
    }
    assert {r["accuracy"] is None for r in result["runs"] if r["diverged"]} == {True}


def test_laplace_50_searches_both_methods_and_compares_them(tmp_path):
    result = run(LAPLACE_50, tmp_path, tasks=2)
    compared = [r["method"] for r in result["runs"] if not r["search"]]
    assert compared == ["none", "online EWC", "Kronecker Laplace"]
    assert sum(r["search"] for r in result["runs"]) == 4


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_demonstration_and_the_protocol_differ_in_size_only(name):
    experiment = EXPERIMENTS[name]
    first, digits = next(iter(experiment.protocols.values())), experiment.protocols["digits"]
    assert first.keys() == digits.keys()
    assert experiment.file("digits").endswith("_digits.json")
    assert experiment.file(next(iter(experiment.protocols))) == f"{name.replace('-', '_')}.json"


def test_a_measurement_is_resumed_with_more_seeds(tmp_path):
    first = run(PERMUTED_MNIST, tmp_path)
    second = run(PERMUTED_MNIST, tmp_path, seeds=2)
    assert second["runs"][: len(first["runs"])] == first["runs"]
    assert len(second["runs"]) == 2 * len(first["runs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "large"}, "unknown preset 'large' of permuted-mnist; there are small, three"),
        ({"preset": "zenke"}, "needs MNIST: give --data or set EWC_DATA"),
    ],
)
def test_presets_that_cannot_be_run_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure(PERMUTED_MNIST, out=tmp_path, **options)


def test_mnist_is_taken_if_it_is_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(protocols, "run_all", lambda *a, **o: asked.append(o) or {"runs": []})
    monkeypatch.setattr(protocols, "_images", lambda root: pytest.fail("not yet"))
    measure(PERMUTED_MNIST, root="copy", out=tmp_path)
    monkeypatch.setenv("EWC_DATA", "other copy")
    measure(PERMUTED_MNIST, out=tmp_path)
    measure(PERMUTED_MNIST, preset="digits", out=tmp_path)
    assert [o["data"] for o in asked] == ["mnist", "mnist", "digits"]
    assert [o["protocol"]["preset"] for o in asked] == ["small", "small", "digits"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_made_and_used(method):
    digits = data.digits()
    model = MultiHead(mlp((64, 8, 10), 0))
    found = METHODS[method](model, 1.0, 0)
    assert (found is None) == (method == "none")
    if found is not None:
        found.before_task()
        torch.nn.functional.cross_entropy(model(digits.x_train[:9]), digits.y_train[:9]).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found.before_step(digits.x_train[:9])
        optimizer.step()
        found.after_step()
        found.consolidate((digits.x_train[:9], digits.y_train[:9]))
        for p in model.parameters():
            p.data += 0.1
        found.before_step(digits.x_train[:9])
        assert found.penalty() > 0


def test_outcomes_are_read_off_the_matrix():
    R = torch.tensor([[1.0, 0.2], [0.5, 0.9]], dtype=torch.float64)
    found = outcome(Learned(R, R[0], [1.0, 2.0], [0.25, 0.25]))
    assert found == {
        "accuracy": 0.7,
        "final": [0.5, 0.9],
        "average": [1.0, 0.7],
        "learning": 0.95,
        "seconds_training": 3.0,
        "seconds_consolidation": 0.5,
    }


def test_squared_batch_means_are_what_many_implementations_compute():
    model = mlp((3, 4, 2), 0).double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 3, generator=generator, dtype=torch.float64), torch.arange(10) % 2
    found = of_batch_means(model, (x, y), batch_size=4)
    for name, p in model.named_parameters():
        total = 0
        for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
            loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
            total = total + torch.autograd.grad(loss, p)[0] ** 2 / 3
        torch.testing.assert_close(found.values[name], total)


def test_an_online_penalty_adds_importances_around_the_latest_optimum():
    model = mlp((3, 2), 0)
    x, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
    penalty = OnlinePenalty(model, 1.0, of_batch_means)
    penalty.consolidate((x, y))
    first = penalty.precision.trace()
    model[0].weight.data += 1
    penalty.consolidate((x, y))
    assert penalty.precision.trace() > first
    assert penalty.penalty().item() == 0


def test_published_rows_are_rows_of_ours():
    known = {e.name for e in command.EXPERIMENTS}
    assert {p.experiment.split()[0] for p in PUBLISHED} <= known
    scenarios = {"task", "domain", "class"}
    for p in PUBLISHED:
        first, _, rest = p.row.partition(" ")
        method = rest if first in scenarios else p.row
        assert method in METHODS or method in VARIANTS
        assert 0 < p.value < 100


def test_the_command_runs_a_demonstration(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda e, **o: run(e, tmp_path))
    result = CliRunner().invoke(command.app, ["permuted-mnist"])
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

    monkeypatch.setattr(command, "measure", fails)
    result = CliRunner().invoke(command.app, ["stability"])
    assert result.exit_code == code
    assert text in result.output + result.stderr


def test_options_reach_the_experiment(monkeypatch):
    asked = []
    empty = {"experiment": "x", "data": "mnist", "runs": []}
    monkeypatch.setattr(command, "measure", lambda e, **o: asked.append((e, o)) or empty)
    options = "--preset zenke --data copy --seeds 3 --device cpu --out here --workers 2 --fresh"
    assert CliRunner().invoke(command.app, ["permuted-mnist", *options.split()]).exit_code == 0
    ((experiment, found),) = asked
    assert experiment is PERMUTED_MNIST
    assert found["preset"] == "zenke"
    assert found["root"] == "copy"
    assert (found["seeds"], found["workers"], found["fresh"]) == (3, 2, True)
    assert str(found["out"]) == "here"
