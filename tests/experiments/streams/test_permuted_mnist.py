from ewc_lib.experiments.streams.permuted_mnist import PERMUTED_MNIST
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
