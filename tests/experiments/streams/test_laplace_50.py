from ewc_lib.experiments.streams.laplace_50 import LAPLACE_50
from tests.experiments.cases import run


def test_laplace_50_searches_both_methods_and_compares_them(tmp_path):
    result = run(LAPLACE_50, tmp_path, tasks=2)
    compared = [r["method"] for r in result["runs"] if not r["search"]]
    assert compared == ["none", "online EWC", "Kronecker Laplace"]
    assert sum(r["search"] for r in result["runs"]) == 4
