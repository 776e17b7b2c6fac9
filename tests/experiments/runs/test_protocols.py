"""What experiments on streams of tasks have in common."""

import pytest

from ewc_lib import data
from ewc_lib.experiments import __main__ as command
from ewc_lib.experiments.runs import protocols
from ewc_lib.experiments.runs.protocols import measure
from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST
from tests.experiments.cases import run


@pytest.mark.parametrize("name", command.STREAMS)
def test_the_demonstration_and_the_protocol_differ_in_size_only(name):
    experiment = command.experiment(name)
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


@pytest.fixture
def asked(monkeypatch):
    """Return what the runs are asked for; a copy holds the data set by which it is called."""
    found = []
    monkeypatch.setattr(protocols, "run_all", lambda *a, **o: found.append(o) or {"runs": []})
    monkeypatch.setattr(data, "local_copy", lambda root: data.digits()._replace(name=root))
    return found


def test_a_local_copy_is_taken_if_it_is_there(asked, tmp_path, monkeypatch):
    measure(PERMUTED_MNIST, root="fashion-mnist", out=tmp_path)
    monkeypatch.setenv("EWC_DATA", "mnist")
    measure(PERMUTED_MNIST, out=tmp_path)
    measure(PERMUTED_MNIST, preset="digits", out=tmp_path)
    assert [o["data"] for o in asked] == ["fashion-mnist", "mnist", "digits"]
    assert [o["protocol"]["preset"] for o in asked] == ["small", "small", "digits"]


def test_a_copy_of_another_data_set_is_refused(asked, tmp_path):
    with pytest.raises(ValueError, match="permuted-mnist needs MNIST, and cifar10 holds cifar10"):
        measure(PERMUTED_MNIST, root="cifar10", out=tmp_path)
    assert not asked


def test_only_the_wanted_runs_are_done_and_the_others_later(tmp_path):
    some = run(PERMUTED_MNIST, tmp_path, only={"method": ["EWC", "SI"], "strength": ["0.2"]})
    assert [(r["method"], r["strength"]) for r in some["runs"]] == [("SI", 0.2)]
    assert len(run(PERMUTED_MNIST, tmp_path)["runs"]) == 6


def test_settings_that_no_run_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run of permuted-mnist has method as wanted"):
        run(PERMUTED_MNIST, tmp_path, only={"method": ["ewc"]})
