import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ewc_lib import _archives
from ewc_lib.data import Images, digits
from ewc_lib.experiments.runs import protocols
from ewc_lib.experiments.runs.protocols import measure
from ewc_lib.experiments.streams import split_cifar10
from ewc_lib.experiments.streams.fisher_variants import VARIANTS
from ewc_lib.experiments.streams.split_cifar10 import SPLIT_CIFAR10, FreezingPenalty, standardised
from tests.experiments.cases import run, short

TINY = {"blocks": [1], "width": 2, "steps": 2, "knobs": {"strength": [1.0, 100.0]}, "budget": 2}


def coloured(n=40):
    """Return a few images of 3 x 4 x 4 in ten classes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 48, generator=generator), torch.arange(n) % 10
    return Images("cifar10", x, y, x[:20], y[:20])


def test_every_variant_is_searched_and_shown_at_its_best(tmp_path):
    variants = ["sampled", "exact, frozen norms"]
    result = run(SPLIT_CIFAR10, tmp_path, variants=variants, **TINY)
    searched = [r for r in result["runs"] if r["search"]]
    assert {r["variant"] for r in searched} == set(variants)
    assert len(searched) == TINY["budget"] * len(variants)
    shown = [r for r in result["runs"] if not r["search"]]
    assert [r["variant"] for r in shown] == ["none", "none, frozen norms", *variants]
    assert all(len(r["final"]) == 5 for r in result["runs"])


def test_the_rows_of_the_protocol_are_the_variants_and_frozen_norms():
    protocol = SPLIT_CIFAR10.protocols["cifar10"]
    assert protocol["variants"] == [*VARIANTS, "exact, frozen norms"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_on_images_with_colours(variant):
    protocol = {**SPLIT_CIFAR10.protocols["digits"], **TINY, "batch": 4}
    asked = {"variant": variant, "strength": 1.0, "search": False, "seed": 0}
    found = SPLIT_CIFAR10.play(coloured(), protocol, "cpu", asked)
    assert len(found["final"]) == 5


def test_the_search_is_judged_by_images_that_are_held_out(monkeypatch):
    seen = []
    monkeypatch.setattr(
        split_cifar10, "hold_out", lambda images: (None, seen.append(images) or images)
    )
    protocol = {**SPLIT_CIFAR10.protocols["digits"], **TINY, "batch": 4}
    for search in (True, False):
        asked = {"variant": "none", "strength": 0.0, "search": search, "seed": 0}
        SPLIT_CIFAR10.play(coloured(), protocol, "cpu", asked)
    assert len(seen) == 1


@pytest.mark.parametrize("images", [coloured(), digits()], ids=["colours", "grey"])
def test_each_colour_of_the_training_images_is_standardised(images):
    shown = standardised(images)
    colours = 3 if images.name == "cifar10" else 1
    x = shown.x_train.unflatten(1, (colours, -1))
    torch.testing.assert_close(x.mean((0, 2)), torch.zeros(colours), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.square().mean((0, 2)), torch.ones(colours))
    assert shown.y_train is images.y_train


def test_running_statistics_are_frozen_after_the_first_task_and_not_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    penalty = FreezingPenalty(model, 1.0, split_cifar10._alike)
    x = torch.randn(8, 3)
    moved = []
    for _ in range(3):
        model.train()(x)
        moved.append(model[1].num_batches_tracked.item())
        penalty.consolidate((x, None))
    assert moved == [1, 1, 1]


def test_it_runs_from_a_local_copy_of_cifar(tmp_path, monkeypatch):
    sums, rng = {}, np.random.default_rng(0)
    for name in ("data_batch_1", "test_batch"):
        batch = {b"data": rng.integers(0, 256, (60, 3072), np.uint8), b"labels": [*range(10)] * 6}
        content = pickle.dumps(batch)
        (tmp_path / name).write_bytes(content)
        sums[name] = _archives.hashlib.md5(content).hexdigest()
    train, test = ({name: sums[name]} for name in sums)
    monkeypatch.setattr(_archives, "CIFAR10", _archives.CIFAR10._replace(train=train, test=test))
    protocols._images.cache_clear()
    experiment = short(SPLIT_CIFAR10)
    small = {**experiment.protocols["digits"], **TINY, "variants": ["exact"], "batch": 8}
    experiment.protocols["cifar10"] = small
    found = measure(experiment, root=str(tmp_path), seeds=1, out=tmp_path, workers=1)
    assert (found["data"], found["protocol"]["preset"]) == ("cifar10", "cifar10")
    assert {r["variant"] for r in found["runs"]} == {"exact", "none", "none, frozen norms"}


def test_another_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "_images", lambda root: digits()._replace(name="mnist"))
    with pytest.raises(ValueError, match="split-cifar10 needs CIFAR-10, and copy holds mnist"):
        measure(SPLIT_CIFAR10, root="copy", out=tmp_path)
