import json
from functools import partial

import pytest
import torch

from ewc_lib.continual import mlp
from ewc_lib.experiments.cost import fisher_cost as module
from ewc_lib.experiments.cost.benchmarks import Benchmark, _vectors
from ewc_lib.experiments.cost.fisher_cost import fisher_cost
from ewc_lib.experiments.cost.peers import CONTESTANTS, plain_pass
from ewc_lib.experiments.cost.report import load, rows

TINY = Benchmark(
    "Tiny MLP",
    partial(mlp, (4, 5, 3), 0),
    partial(_vectors, shape=(4,), classes=3),
    n=20,
    batch_size=8,
)
SIZES = (8, 16, 24)
MIB = 2**20


def impossible(model, batches):
    raise NotImplementedError("no " + 200 * "x" + "\nsecond line")


def doubled(model, batches):
    found = CONTESTANTS["ewc_lib"]["exact"](model, batches)
    return {name: 2 * f for name, f in found.items()}


ALL = {
    "ewc_lib": CONTESTANTS["ewc_lib"],
    "careless": {"exact": doubled},
    "limited": {"empirical": impossible},
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Return what measures tiny models, without a process for the memory of each run.

    The code is looked at once, and said to be the same all the time, even if it is edited.
    """
    record = module.provenance(seeds=[0], wall_seconds=0.0)

    def provenance(**options):
        return {**record, "threads": {"torch": torch.get_num_threads()}}

    monkeypatch.setattr(module, "provenance", provenance)
    monkeypatch.setattr(module, "peak_bytes", lambda contestant, benchmark, n, threads: MIB)

    def run(sections=(), *, benchmarks=None, **options):
        settings = {"contestants": ALL, "sizes": SIZES, "repetitions": 2, "threads": 1}
        benchmarks = benchmarks or {"mlp": TINY, "other": TINY._replace(n=12, exact=False)}
        path = tmp_path / "results" / "cost.json"
        found = fisher_cost(path, sections, benchmarks=benchmarks, **settings | options)
        assert load(path) == found
        return found

    return run


def test_each_contestant_has_its_numbers_or_a_reason(measured):
    result = measured()
    assert list(result) == ["experiment", "settings", "provenance", "sections"]
    assert result["settings"] == {
        "device": "cpu",
        "matmul_precision": "highest",
        "repetitions": 2,
        "threads": 1,
        "sizes": [8, 16, 24],
        "contestants": list(ALL),
    }
    assert list(result["sections"]) == ["mlp", "other", "linearity"]
    section = result["sections"]["mlp"]
    assert (section["parameters"], section["n"], section["batch_size"]) == (43, 20, 8)
    for library, kinds in section["contestants"].items():
        for entry in kinds.values():
            if library == "limited":
                assert entry.keys() == {"reason"}
            else:
                wanted = {"n", "error", "plain_seconds", "seconds", "peak_bytes"}
                assert entry.keys() == wanted
                assert len(entry["seconds"]) == len(entry["plain_seconds"]) == 2
                assert min(entry["seconds"]) > 0


def test_linearity_has_a_run_for_each_kind_and_size(measured):
    runs = measured(["linearity"])["sections"]["linearity"]["runs"]
    kinds = ("plain", *CONTESTANTS["ewc_lib"])
    assert [(run["kind"], run["n"]) for run in runs] == [(k, n) for n in SIZES for k in kinds]
    assert all(len(run["seconds"]) == 2 for run in runs)


def test_the_provenance_counts_all_sections(measured):
    result = measured()
    total = sum(section["wall_seconds"] for section in result["sections"].values())
    assert result["provenance"]["wall_seconds"] == pytest.approx(total, abs=1e-3)
    assert result["provenance"]["seeds"] == [0]
    assert result["provenance"]["threads"]["torch"] == 1


def test_answers_are_compared_with_the_truth(measured):
    found = {(row.library, row.kind): row for row in rows(measured(["mlp"]))}
    assert found["ewc_lib", "exact"].error < 1e-12
    assert found["ewc_lib", "empirical"].error < 1e-12
    assert found["careless", "exact"].error == pytest.approx(1)
    assert [key for key, row in found.items() if row.wrong] == [("careless", "exact")]
    assert found["ewc_lib", "sketch"].error > 1e-3


def test_a_reason_is_one_short_line(measured):
    (entry,) = measured(["mlp"])["sections"]["mlp"]["contestants"]["limited"].values()
    assert entry["reason"].startswith("NotImplementedError: no xxx")
    assert len(entry["reason"]) == 120


def test_exact_is_not_tried_where_it_is_out_of_reach(measured):
    found = {(row.library, row.kind): row for row in rows(measured(["other"]))}
    assert "out of reach" in found["ewc_lib", "exact"].reason
    assert found["ewc_lib", "sketch"].reason is None
    assert found["ewc_lib", "sketch"].error is None


def test_a_second_run_adds_only_what_is_missing(measured, monkeypatch):
    first = measured(["other"])
    assert list(first["sections"]) == ["other"]
    tried = []
    examine = module._examine
    monkeypatch.setattr(
        module, "_examine", lambda *given: tried.append(given[2]) or examine(*given)
    )
    second = measured(["mlp", "other"])
    assert second["sections"]["other"] == first["sections"]["other"]
    assert set(tried) == {TINY}


def test_a_stopped_run_keeps_what_was_done(measured, monkeypatch):
    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(module, "_linearity", stop)
        with pytest.raises(InterruptedError):
            measured()
    monkeypatch.setattr(module, "_compare", stop)
    assert list(measured()["sections"]) == ["mlp", "other", "linearity"]


def test_a_run_that_is_stopped_goes_on_where_it_was(measured, monkeypatch):
    """Every eleventh run stops the measurement, until nothing is left to be done."""
    timed, done = module.seconds, []

    def sometimes(contestant, *given):
        done.append(contestant)
        if len(done) % 11 == 0:
            raise KeyboardInterrupt
        return timed(contestant, *given)

    monkeypatch.setattr(module, "seconds", sometimes)
    stops = 0
    while True:
        try:
            result = measured(["mlp", "linearity"])
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 3
    assert list(result["sections"]) == ["mlp", "linearity"]
    assert "unfinished" not in result
    contestants = result["sections"]["mlp"]["contestants"].values()
    entries = [entry for kinds in contestants for entry in kinds.values() if "n" in entry]
    assert len(entries) == 5
    for entry in entries:
        assert len(entry["seconds"]) == len(entry["plain_seconds"]) == 2
    assert all(len(run["seconds"]) == 2 for run in result["sections"]["linearity"]["runs"])


def test_what_is_unfinished_is_in_the_file_and_in_no_table(measured, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "peak_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        measured(["mlp"])
    left = load(tmp_path / "results" / "cost.json")
    assert list(left["unfinished"]) == ["mlp"]
    assert left["unfinished"]["mlp"]["wall_seconds"] > 0
    assert rows(left) == []


def test_what_fails_on_more_observations_has_its_reason(measured):
    def hungry(model, batches):
        if sum(len(y) for _, y in batches) > 16:
            raise MemoryError("too many")
        return plain_pass(model, batches)

    result = measured(["mlp"], contestants={**ALL, "hungry": {"exact": hungry}})
    assert result["sections"]["mlp"]["contestants"]["hungry"] == {
        "exact": {"reason": "MemoryError: too many"}
    }
    assert len(result["sections"]["mlp"]["contestants"]["ewc_lib"]["exact"]["seconds"]) == 2


def test_a_card_is_measured_by_its_own_memory_and_in_a_file_of_its_own(tmp_path, monkeypatch):
    """The card is pretended: its tensors lie on the processor, and its counters say 7 MiB."""
    here = {name: getattr(Benchmark, name) for name in ("model", "batches")}
    monkeypatch.setattr(Benchmark, "model", lambda b: here["model"](b._replace(device="cpu")))
    monkeypatch.setattr(
        Benchmark, "batches", lambda b, n: here["batches"](b._replace(device="cpu"), n)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(module, "OUTPUT", tmp_path)
    options = {"benchmarks": {"mlp": TINY}, "contestants": ALL, "sizes": (8,), "repetitions": 1}
    result = fisher_cost(device="cuda", threads=1, **options)
    assert load(tmp_path / "fisher_cost_cuda.json") == result
    assert result["settings"]["device"] == "cuda"
    assert result["provenance"]["hardware"]["accelerator"] == "Pretended"
    peaks = {run["peak_bytes"] for run in result["sections"]["linearity"]["runs"]}
    peaks.add(result["sections"]["mlp"]["plain_peak_bytes"])
    peaks.add(result["sections"]["mlp"]["contestants"]["ewc_lib"]["exact"]["peak_bytes"])
    assert peaks == {7 * MIB}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(measured):
    with pytest.raises(ValueError, match="no CUDA device"):
        measured(["mlp"], device="cuda")


def test_results_of_other_settings_are_not_mixed(measured):
    measured(["mlp"])
    with pytest.raises(ValueError, match=r"settings\.repetitions was 2 and is 3.*--fresh"):
        measured(["other"], repetitions=3)
    with pytest.raises(ValueError, match=r"settings\.contestants"):
        measured(["other"], contestants={"ewc_lib": ALL["ewc_lib"]})
    assert list(measured(["other"], repetitions=3, fresh=True)["sections"]) == ["other"]


def test_results_of_other_code_are_not_mixed(measured, monkeypatch):
    measured(["mlp"])
    provenance = module.provenance
    monkeypatch.setattr(module, "provenance", lambda **o: {**provenance(**o), "source": "new"})
    with pytest.raises(ValueError, match=r"source was .* and is 'new'"):
        measured(["other"])


def test_code_that_changes_during_the_measurement_is_noticed(measured, monkeypatch):
    sources = iter(["old", "new"])
    provenance = module.provenance
    monkeypatch.setattr(
        module, "provenance", lambda **o: {**provenance(**o), "source": next(sources)}
    )
    with pytest.raises(RuntimeError, match="mlp was being measured while source was 'old'"):
        measured(["mlp"])


def test_an_unknown_section_is_named(measured):
    with pytest.raises(ValueError, match="unknown section 'vgg'; there are mlp, other, linearity"):
        measured(["vgg"])


def test_threads_are_put_back(measured):
    before = torch.get_num_threads()
    measured(["mlp"], threads=before + 1, benchmarks={"mlp": TINY._replace(n=8)})
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("slowness", "n"), [(50.0, 32), (1000.0, 16)])
def test_what_is_too_slow_is_measured_on_fewer_observations_and_scaled(
    slowness, n, measured, monkeypatch
):
    """Time is what it should be: so many plain passes for each observation."""
    passes = {plain_pass: 1.0, doubled: slowness}
    clock = lambda f, _, batches: passes.get(f, 2.0) * sum(len(y) for _, y in batches)  # noqa: E731
    monkeypatch.setattr(module, "seconds", clock)
    result = measured(["mlp"], benchmarks={"mlp": TINY._replace(n=200)})
    found = {(row.library, row.kind): row for row in rows(result)}
    slow, fast = found["careless", "exact"], found["ewc_lib", "exact"]
    assert (slow.n, slow.scaled, slow.passes) == (n, True, slowness)
    assert (fast.n, fast.scaled, fast.passes) == (200, False, 2)


def test_the_result_holds_no_number_that_json_does_not_know(measured):
    json.dumps(measured(["mlp"]), allow_nan=False)
