import pytest
import torch

from ewc_lib.experiments.cost import keeping as module
from ewc_lib.experiments.cost.keeping import ASKED, keeping, table

SMALL = {"small": {"vocabulary": 50, "width": 8, "layers": 1, "heads": 2}}


@pytest.fixture
def peaks(monkeypatch):
    """Count what is measured in processes of their own, which take seconds to start."""
    asked = []

    def peak(contestant, benchmark, n, threads):
        asked.append((contestant, n, threads))
        return len(asked) * 2**30

    monkeypatch.setattr(module, "peak_bytes", peak)
    return asked


def test_everything_is_measured_once_and_kept(tmp_path, peaks):
    options = {"sizes": SMALL, "length": 4, "progress": False}
    result = keeping(tmp_path / "keeping.json", **options)
    assert [run["asked"] for run in result["runs"]] == list(ASKED)
    assert peaks == [(asked, module.BATCH, 1) for asked in ASKED.values()]
    parameters = sum(p.numel() for p in module.GPT2(length=4, **SMALL["small"]).parameters())
    assert {run["parameters"] for run in result["runs"]} == {parameters}
    assert keeping(tmp_path / "keeping.json", **options)["runs"] == result["runs"]
    assert len(peaks) == len(ASKED)


def test_the_table_shows_what_is_above_the_model(tmp_path, peaks):
    result = keeping(tmp_path / "keeping.json", sizes=SMALL, length=4, progress=False)
    assert table(result).splitlines()[1].split()[-3:] == ["1.00", "2.00", "3.00"]


def test_a_held_step_is_a_step_with_a_penalty():
    torch.manual_seed(0)
    tokens = torch.randint(50, (2, 4))
    moved = []
    for asked in (module.step, module.held_step):
        torch.manual_seed(1)
        model = module.GPT2(length=4, **SMALL["small"])
        before = model.token.weight.detach().clone()
        asked(model, [(tokens, tokens)])
        moved.append((model.token.weight.detach() - before).norm().item())
    assert 0 < moved[1] < moved[0]
