import pytest

MIB = 2**20


def entry(seconds, **other):
    measured = {"n": 100, "error": 1e-16, "plain_seconds": [1.0, 2.0, 4.0], "seconds": seconds}
    return measured | {"peak_bytes": 30 * MIB} | other


@pytest.fixture
def result():
    """Return a result with one of everything."""
    contestants = {
        "ewc_lib": {"empirical": entry([1.5, 2.0, 8.0]), "exact": entry([3.0, 6.0, 9.0])},
        "slow": {"exact": entry([1.0, 2.0, 4.0], n=20, error=1e-7)},
        "careless": {"exact": entry([1.0, 2.0, 4.0], error=0.5, peak_bytes=9 * MIB)},
        "limited": {"exact": {"reason": "TypeError: no"}, "empirical": {"reason": "TypeError: no"}},
    }
    line = [
        {"kind": kind, "n": n, "seconds": [0.0, slope * n + 1, 9e9], "peak_bytes": peak + n}
        for n in (10, 20, 40)
        for kind, slope, peak in (("plain", 1.0, 0), ("exact", 3.0, 5 * MIB))
    ]
    tiny = {"title": "Tiny", "parameters": 1234, "n": 100, "batch_size": 8}
    tiny |= {"plain_peak_bytes": 10 * MIB, "contestants": contestants}
    return {"sections": {"mlp": tiny, "linearity": {"title": "Tiny", "runs": line}}}
