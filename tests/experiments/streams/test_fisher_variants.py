from itertools import product

import torch

from ewc_lib import fisher_information
from ewc_lib.continual import mlp
from ewc_lib.experiments.streams.fisher_variants import (
    FISHER_VARIANTS,
    VARIANTS,
    OnlinePenalty,
    at_their_best,
    of_batch_means,
    of_drawn_labels,
)
from tests.experiments.cases import run


def test_fisher_variants_has_a_grid_and_the_decades_around_the_best(tmp_path):
    result = run(FISHER_VARIANTS, tmp_path)
    for variant in VARIANTS:
        own = [r for r in result["runs"] if r["variant"] == variant]
        strengths = sorted(r["strength"] for r in own)
        assert {1.0, 100.0} <= set(strengths)
        assert len(strengths) == 4  # of five, one is on the grid already
    assert sum(r["variant"] == "none" for r in result["runs"]) == 1


def test_the_best_strength_of_the_grid_stays_when_its_neighbours_are_known():
    protocol, (grid, around) = {"grid": [1.0, 1e2, 1e4], "grid_seeds": 2}, FISHER_VARIANTS.stages
    first = [{**r, "accuracy": float(r["strength"] == 1e2)} for r in grid(protocol, 2, [])]
    asked = list(around(protocol, 3, first))
    assert {r["strength"] for r in asked} == {10.0, 100.0, 1000.0}
    finished = [*first, *({**r, "accuracy": r["strength"] / 100} for r in asked)]
    assert list(around(protocol, 3, finished)) == asked


def test_squared_batch_means_are_what_many_implementations_compute():
    model = mlp((3, 4, 2), 0).double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 3, generator=generator, dtype=torch.float64), torch.arange(10) % 2
    found = of_batch_means(model, (x, y), batch_size=4)
    for name, p in model.named_parameters():
        total = 0
        for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
            loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
            total = total + torch.autograd.grad(loss, p)[0] ** 2 / 3
        torch.testing.assert_close(found.values[name], total)


def test_an_online_penalty_adds_importances_around_the_latest_optimum():
    model = mlp((3, 2), 0)
    x, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
    penalty = OnlinePenalty(model, 1.0, of_batch_means)
    penalty.consolidate((x, y))
    first = penalty.precision.trace()
    model[0].weight.data += 1
    penalty.consolidate((x, y))
    assert penalty.precision.trace() > first
    assert penalty.penalty().item() == 0


def test_a_variant_is_shown_at_its_best_strength_among_those_with_most_seeds():
    def at(variant, strength, *accuracies):
        times = {"seconds_training": 1.0, "seconds_consolidation": 1.0}
        return [
            {"variant": variant, "strength": strength, "seed": seed, "accuracy": a, **times}
            for seed, a in enumerate(accuracies)
        ]

    runs = at("none", 0.0, 0.8) + at("exact", 1.0, 0.99) + at("exact", 10.0, 0.97, 0.98)
    runs += at("exact", 100.0, 0.96, 0.98) + at("sketch", 10.0, 0.5)
    found = [(row.settings["variant"], row.settings["strength"]) for row in at_their_best(runs)]
    assert found == [("none", 0.0), ("exact", 10.0), ("sketch", 10.0)]


def test_batches_with_labels_from_the_model_have_the_fisher_information_as_their_mean(monkeypatch):
    model = mlp((2, 3, 3), 0).double()
    x = torch.tensor([[1.0, -2.0], [0.5, 1.5], [-1.0, 1.0]], dtype=torch.float64)
    p = model(x).softmax(1).detach()
    y, mean = torch.zeros(3, dtype=torch.long), 0.0
    for labels in product(range(3), repeat=3):
        drawn = torch.tensor(labels)
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: drawn[:, None])
        found = of_drawn_labels(model, (x, y), batch_size=2, generator=torch.Generator())
        mean = mean + p[torch.arange(3), drawn].prod() * found.values["0.weight"]
    exact = fisher_information(model, (x, y)).diagonal()["0.weight"]
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-15)
