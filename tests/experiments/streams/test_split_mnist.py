from ewc_lib.experiments.runs.protocols import read
from ewc_lib.experiments.runs.report import rows
from ewc_lib.experiments.streams.split_mnist import SPLIT_MNIST
from tests.experiments.cases import run


def test_split_mnist_has_every_method_in_every_scenario(tmp_path):
    result = run(SPLIT_MNIST, tmp_path)
    found = rows(result["runs"])
    methods = {"none", "joint", "replay", "LwF", "EWC", "online EWC", "SI"}
    for scenario in ("task", "domain", "class"):
        own = [row for row in found if row.settings["scenario"] == scenario]
        assert {row.settings["method"] for row in own} == methods
        assert all(0 <= row.mean <= 1 for row in own)
    assert (result["experiment"], result["data"]) == ("split-mnist", "digits")
    assert read("split_mnist_digits", tmp_path) == result


def test_strengths_are_the_published_ones_and_only_those_are_run(tmp_path):
    result = run(SPLIT_MNIST, tmp_path, seeds=2)
    for (scenario, method), strengths in {
        ("task", "EWC"): {1e5},
        ("domain", "SI"): {1e5},  # twice 5e4, since our penalty has a factor of one half
        ("class", "none"): {None},
    }.items():
        own = [r for r in result["runs"] if (r["scenario"], r["method"]) == (scenario, method)]
        assert {r["strength"] for r in own} == strengths
        assert [r["seed"] for r in own] == [0, 1]
