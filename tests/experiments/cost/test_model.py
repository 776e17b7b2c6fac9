from functools import partial

import pytest
import torch
from torch import nn

from ewc_lib import fisher_information
from ewc_lib.continual import mlp
from ewc_lib.experiments.cost.benchmarks import BENCHMARKS
from ewc_lib.experiments.cost.executed import executed
from ewc_lib.experiments.cost.model import SHAPES, Layer, Shape, Work, total
from ewc_lib.experiments.cost.models import GPT2
from ewc_lib.experiments.cost.peers import plain_pass

CLASSES = 5
STRUCTURES = (
    "diagonal",
    "block",
    "module",
    "dense",
    "kronecker",
    "kronecker-reduce",
    "eigenkronecker",
    "lowrank",
)
SMALL = Shape(layers=2, width=24, vocabulary=40, length=12)


class Mean(nn.Module):
    def forward(self, h):
        return h.mean(1)


def sequence_model():
    return nn.Sequential(nn.Linear(6, CLASSES), Mean())


def image_model():
    convolution = nn.Conv2d(2, 4, 3, stride=2)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))


def draws(*shape):
    def draw(n):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, *shape, generator=generator)
        return [(x, torch.randint(CLASSES, (n,), generator=generator))]

    return draw


def text(n):
    tokens = torch.randint(40, (n, 13), generator=torch.Generator().manual_seed(0))
    return [(tokens[:, :-1], tokens[:, 1:])]


def gpt2():
    return GPT2(vocabulary=40, length=12, width=24, layers=2, heads=3)


MODELS = {
    "linear": (
        lambda: nn.Linear(6, CLASSES),
        draws(6),
        [Layer(CLASSES, 6, first=True)],
    ),
    "mlp": (
        lambda: mlp((6, 8, CLASSES), 0),
        draws(6),
        [Layer(8, 6, first=True), Layer(CLASSES, 8)],
    ),
    "positions": (
        sequence_model,
        draws(7, 6),
        [Layer(CLASSES, 6, positions=7, first=True)],
    ),
    "convolution": (
        image_model,
        draws(2, 8, 8),
        [Layer(4, 18, positions=9, first=True), Layer(CLASSES, 36)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "columns"), [("sketch", 1), ("empirical", 1), ("exact", 4)])
def test_the_work_of_layers_is_what_is_executed(name, kind, columns):
    build, draw, layers = MODELS[name]
    model, work = build(), total(layer.work for layer in layers)
    assert executed(partial(plain_pass, model), draw) == work.plain
    run = partial(fisher_information, model, kind=kind)
    assert executed(run, draw) == work.diagonal(columns)
    assert work.ratio(columns) == work.diagonal(columns) / work.plain


def test_the_certificate_is_not_counted_as_work_of_an_observation():
    model = nn.Linear(6, CLASSES)
    run = partial(fisher_information, model, kind="sketch")
    assert executed(run, draws(6), 32) == executed(run, draws(6), 50)


def test_the_work_of_a_language_model_is_what_is_executed():
    model, work = gpt2(), SMALL.work
    assert executed(partial(plain_pass, model), text) == work.plain
    assert executed(partial(fisher_information, model, kind="sketch"), text) == work.diagonal()


def test_the_parameters_of_a_language_model_are_those_of_the_module():
    assert SMALL.parameters == sum(p.numel() for p in gpt2().parameters())
    measured = BENCHMARKS["gpt2"].model()
    assert SHAPES["measured here"].parameters == sum(p.numel() for p in measured.parameters())


@pytest.mark.parametrize(
    ("name", "published"), [("GPT-2", 124e6), ("GPT-2 XL", 1558e6), ("GPT-3 175B", 175e9)]
)
def test_the_parameters_of_large_models_are_the_published_ones(name, published):
    assert SHAPES[name].parameters == pytest.approx(published, rel=5e-3)


def test_shapes_reach_from_a_million_to_a_hundred_billion():
    sizes = [shape.parameters for shape in SHAPES.values()]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1e6
    assert sizes[-1] > 1e11


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_layer_stores_as_many_numbers_as_its_result_holds(structure, bias):
    model = nn.Linear(6, CLASSES, bias=bias)
    F = fisher_information(model, draws(6)(40), structure=structure, rank=7)
    assert numbers(F) == Layer(CLASSES, 6, bias=bias).stored(structure, rank=7)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "eigenkronecker", "lowrank"])
def test_a_language_model_stores_as_many_numbers_as_its_result_holds(structure):
    F = fisher_information(gpt2(), text(20), kind="sketch", structure=structure, rank=3)
    assert numbers(F) == SMALL.stored(structure, rank=3)


def numbers(F):
    return sum(t.numel() for t in F.state_dict().values() if t.is_floating_point())


def test_products_without_a_matrix_store_nothing():
    assert Layer(3, 4).stored("matrix-free") == SMALL.stored("matrix-free") == 0


def test_long_vectors_keep_their_diagonal():
    short, long = SMALL._replace(width=4096), SMALL._replace(width=4100)
    vectors = 2 * (2 * SMALL.layers + 1)
    for shape, each in ((short, 4096**2), (long, 4100)):
        factors = sum(m.stored("kronecker") for m in shape.matrices)
        tables = (shape.vocabulary + shape.length) * shape.width
        assert shape.stored("kronecker") == factors + tables + vectors * each


def test_an_unknown_structure_is_named():
    with pytest.raises(ValueError, match="unknown structure 'sparse'"):
        Layer(3, 4).stored("sparse")


def test_work_adds_up():
    one = Work(1, 2, 3, 4, 5)
    assert total([one, one]) == Work(2, 4, 6, 8, 10)
    assert one.plain == 10
    assert one.diagonal(10) == 1 + 10 * (2 + 4 + 5) + 3
