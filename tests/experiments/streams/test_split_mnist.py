from ewc_lib.experiments.runs.protocols import read
from ewc_lib.experiments.runs.report import rows
from ewc_lib.experiments.streams.split_mnist import SEARCH_SEED, SPLIT_MNIST
from tests.experiments.cases import run


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
