from collections import Counter

from ewc_lib.data import digits, hold_out
from ewc_lib.experiments.streams import laplace_50
from ewc_lib.experiments.streams.laplace_50 import LAPLACE_50
from tests.experiments.cases import run


def test_every_method_has_the_same_search_and_then_as_many_seeds(tmp_path):
    runs = run(LAPLACE_50, tmp_path, tasks=2, seeds=2)["runs"]
    methods = ["none", "online EWC", "Kronecker Laplace"]
    assert Counter(r["method"] for r in runs if r["search"]) == dict.fromkeys(methods, 7)
    compared = [(r["seed"], r["method"]) for r in runs if not r["search"]]
    assert compared == [(seed, method) for seed in (0, 1) for method in methods]


def test_what_is_compared_has_the_settings_that_the_search_found_best(tmp_path):
    runs = run(LAPLACE_50, tmp_path, tasks=2)["runs"]
    for final in (r for r in runs if not r["search"]):
        tried = [r for r in runs if r["search"] and r["method"] == final["method"]]
        best = max(tried, key=lambda r: r["accuracy"])
        assert (final["strength"], final["rate"]) == (best["strength"], best["rate"])


def test_the_search_never_sees_a_test_image(monkeypatch):
    seen = []

    def note(images, n_tasks, seed):
        seen.append(images)

    monkeypatch.setattr(laplace_50, "permuted", note)
    monkeypatch.setattr(laplace_50, "play", lambda *a, **o: {})
    protocol = LAPLACE_50.protocols["digits"]
    settings = {"method": "none", "strength": 0.0, "rate": 1e-3, "seed": 0}
    for search in (True, False):
        LAPLACE_50.play(digits(), protocol, "cpu", {**settings, "search": search})
    of_search, final = seen
    assert of_search.x_test.equal(hold_out(digits())[1].x_test)
    assert len(of_search.x_train) + len(of_search.x_test) == len(digits().x_train)
    assert final.x_test.equal(digits().x_test)
