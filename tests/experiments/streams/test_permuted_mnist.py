import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.data import digits
from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST, ArgMaxEWC
from ewc_lib.fisher import fisher_information
from tests.experiments.cases import run


def test_permuted_mnist_has_its_methods(tmp_path):
    result = run(PERMUTED_MNIST, tmp_path)
    assert [r["method"] for r in result["runs"]] == [
        "none",
        "EWC",
        "online EWC",
        "SI",
        "SI",
        "joint",
    ]
    assert all(len(r["final"]) == len(r["average"]) == 5 for r in result["runs"])


def test_the_preset_of_three_scenarios_runs_on_padded_images(tmp_path):
    """Its methods, with the frame and the decay, on small images and for a few steps."""
    theirs = PERMUTED_MNIST.protocols["three-scenarios"]
    methods = theirs["methods"]
    settings = {"side": 9, "decay": theirs["decay"], "methods": methods, "n_samples": 50}
    result = run(PERMUTED_MNIST, tmp_path, **settings)
    assert [r["method"] for r in result["runs"]] == list(methods)
    assert all(r["accuracy"] is not None for r in result["runs"])


def test_online_ewc_decays_as_the_preset_says(tmp_path):
    settings = {"methods": {"online EWC": [100.0]}, "steps": 50}
    (forgets,) = run(PERMUTED_MNIST, tmp_path / "0", decay=0.0, **settings)["runs"]
    (keeps,) = run(PERMUTED_MNIST, tmp_path / "1", decay=1.0, **settings)["runs"]
    assert forgets["final"] != keeps["final"]


def test_arg_max_ewc_takes_the_label_that_the_network_finds_most_likely():
    x, y = (tensor[:50] for tensor in digits().train)
    model = mlp((64, 8, 10), seed=0)
    found = ArgMaxEWC(model, 1.0, kind="empirical").consolidate((x, y))
    likely = model(x).argmax(1)
    wanted = fisher_information(model, (x, likely), kind="empirical")
    assert not torch.equal(likely, y)
    for name, value in wanted.values.items():
        assert found.values[name] == pytest.approx(value)
